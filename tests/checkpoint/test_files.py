"""A file is either complete or does not exist, whatever happens while it is written."""

import os
import resource
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_halos.checkpoint.errors import CheckpointError
from lightning_halos.checkpoint.files import WrittenFile, can_be_read, local_path, read_state, write, write_state

STATE = {"weights": torch.arange(5000.0), "step": 3, "nested": [1.5, "text", (None, True)]}


def same(found: object) -> bool:
    return isinstance(found, dict) and torch.equal(found.pop("weights"), STATE["weights"]) and found["step"] == 3


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = write_state(tmp_path / "made" / "state.pt", STATE)
    assert written.size == (tmp_path / "made" / "state.pt").stat().st_size
    assert same(read_state(tmp_path / "made" / "state.pt", written))
    assert [file.name for file in (tmp_path / "made").iterdir()] == ["state.pt"]


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    written = write_state(path, STATE)
    content = path.read_bytes()
    for end in [0, 1, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:end])
        with pytest.raises(CheckpointError, match=rf"state.pt is damaged: it has {end} bytes"):
            read_state(path, written)


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    written = write_state(path, STATE)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        read_state(path, written)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"state.pt is missing"):
        read_state(tmp_path / "state.pt", WrittenFile(1, 0))


class InTheMiddleError(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 100])
def test_what_was_there_stays_if_writing_fails(tmp_path: Path, after: int) -> None:
    path = tmp_path / "state.pt"
    written = write_state(path, STATE)

    def fill(file: Any) -> None:
        file.write(b"x" * after)
        raise InTheMiddleError

    with pytest.raises(InTheMiddleError):
        write(path, fill)
    assert same(read_state(path, written))
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


def killed_while_it_writes(file: Any) -> None:
    file.write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_was_there_stays_if_the_process_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    written = write_state(path, STATE)
    if (child := os.fork()) == 0:
        write(path, killed_while_it_writes)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert same(read_state(path, written))


def limited(size: int) -> None:
    """Simulates a full disk: no file of this process may grow beyond a size."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_path_is_read_as_by_lightning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path in ("~/run/a.ckpt", "run/a.ckpt", "other/../run/a.ckpt", f"file://{tmp_path}/run/a.ckpt"):
        assert local_path(path) == tmp_path / "run/a.ckpt"


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    written = write_state(path, STATE)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        limited(written.size // 2)
        with pytest.raises(OSError, match=r"state.pt could not be written.*File too large"):
            write_state(path, STATE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert same(read_state(path, written))
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("in the way")
    with pytest.raises(OSError, match="folder"):
        write_state(tmp_path / "folder" / "state.pt", STATE)


@pytest.mark.parametrize(
    "state", [STATE, {"milestones": Counter([1, 2])}, {}, {1: {"lr": 0.1}}], ids=["state", "counter", "empty", "number"]
)
def test_plain_states(state: object) -> None:
    assert can_be_read(state)


@pytest.mark.parametrize(
    "state", [{"path": Path()}, {"function": lambda: 0}, [object()]], ids=["path", "function", "object"]
)
def test_states_that_would_have_to_be_unpickled(state: object) -> None:
    assert not can_be_read(state)
