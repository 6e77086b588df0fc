"""A run's directory always has a snapshot to go on from, whatever happens while one is written."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_halos.checkpoint import files
from lightning_halos.checkpoint.errors import CheckpointError
from lightning_halos.serving.storage import RunDirectory


def state(value: int) -> dict[str, Any]:
    return {"model": torch.full((1000,), float(value)), "total": value, "members": {"us-east": {"spans": [(0, value)]}}}


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def test_a_new_directory_has_no_snapshot(tmp_path: Path) -> None:
    assert RunDirectory(tmp_path / "runs" / "pile").load() is None


def test_the_newest_snapshot_is_read_and_two_are_kept(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    for value in range(1, 5):
        directory.save(state(value), {"global_step": value})
    assert names(tmp_path) == [
        "lock",
        "snapshot-00000003.json",
        "snapshot-00000003.pt",
        "snapshot-00000004.json",
        "snapshot-00000004.pt",
    ]
    directory.close()
    found = RunDirectory(tmp_path).load()
    assert found is not None
    assert torch.equal(found.pop("model"), state(4)["model"])
    assert found == {"total": 4, "members": {"us-east": {"spans": [(0, 4)]}}}


@pytest.mark.parametrize("file", ["snapshot-00000002.pt", "snapshot-00000002.json"])
@pytest.mark.parametrize("damage", ["cut off", "changed", "empty"])
def test_a_damaged_snapshot_is_skipped_and_named(
    tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    directory = RunDirectory(tmp_path)
    directory.save(state(1), {})
    directory.save(state(2), {})
    directory.close()
    content = bytearray((tmp_path / file).read_bytes())
    content[len(content) // 2] ^= 255
    changed = {"cut off": content[: len(content) // 2], "changed": content, "empty": b""}[damage]
    (tmp_path / file).write_bytes(changed)

    directory = RunDirectory(tmp_path)
    with caplog.at_level(logging.WARNING):
        found = directory.load()
    assert found is not None
    assert found["total"] == 1
    assert len(caplog.records) == 1
    assert "snapshot-00000002" in caplog.text

    # The damaged one does not count as one of the two that are kept.
    directory.save(state(3), {})
    assert [name for name in names(tmp_path) if name.endswith("pt")] == ["snapshot-00000001.pt", "snapshot-00000003.pt"]


def test_a_run_whose_snapshots_are_all_damaged_does_not_start_anew(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.save(state(1), {})
    directory.close()
    (tmp_path / "snapshot-00000001.pt").unlink()
    with pytest.raises(CheckpointError, match=r"All snapshots in .* are damaged"):
        RunDirectory(tmp_path).load()


def test_a_snapshot_of_another_format_is_refused(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.save(state(1), {"format": 99})
    with pytest.raises(CheckpointError, match="has format 99"):
        directory.load()


def test_nothing_is_unpickled_but_tensors_and_plain_values(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = RunDirectory(tmp_path)
    directory.save({"trap": Trap(tmp_path / "sprung")}, {})
    with pytest.raises(CheckpointError):
        directory.load()
    assert not (tmp_path / "sprung").exists()


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_failed_write_leaves_the_snapshots_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory(tmp_path)
    directory.save(state(1), {})

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            directory.save(state(2), {})
    assert directory.load() is not None
    directory.save(state(3), {})
    found = directory.load()
    assert found is not None
    assert found["total"] == 3


def test_a_snapshot_whose_small_file_cannot_be_written_does_not_stay_on_the_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDirectory(tmp_path)
    directory.save(state(1), {})
    before, write = names(tmp_path), files.write

    def fail(path: Path, fill: Any) -> files.WrittenFile:
        if path.suffix == ".json":
            raise OSError("No space left on device")
        return write(path, fill)

    monkeypatch.setattr(files, "write", fail)
    with pytest.raises(OSError, match="No space left"):
        directory.save(state(2), {})
    assert names(tmp_path) == before


def test_a_full_disk_does_not_keep_a_server_from_starting(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys, pathlib\n"
        "from lightning_halos.serving.storage import RunDirectory\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "RunDirectory(pathlib.Path(sys.argv[1])).close()\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, timeout=120)


def test_two_servers_never_use_one_directory(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    with pytest.raises(ValueError, match=rf"in use by another server \(process {os.getpid()} on "):
        RunDirectory(tmp_path)
    directory.close()
    RunDirectory(tmp_path)


@pytest.mark.slow  # tests/serving/test_serve.py kills a complete server
def test_a_server_killed_at_any_moment_leaves_a_snapshot_and_frees_the_directory(tmp_path: Path) -> None:
    """The process writes snapshot after snapshot, and prints the number of each that is complete."""
    program = (
        "import sys, pathlib, torch\n"
        "from lightning_halos.serving.storage import RunDirectory\n"
        "directory = RunDirectory(pathlib.Path(sys.argv[1]))\n"
        "value = (directory.load() or {'total': 0})['total']\n"
        "while True:\n"
        "    value += 1\n"
        "    directory.save({'model': torch.full((300_000,), float(value)), 'total': value}, {})\n"
        "    print(value, flush=True)\n"
    )
    complete = 0
    for pause in (0.005, 0.02):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        first = int(process.stdout.readline())
        assert first > complete
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        complete = int(([str(first), *process.stdout.read().split()])[-1])
        directory = RunDirectory(tmp_path)
        found = directory.load()
        directory.close()
        assert found is not None
        assert found["total"] in (complete, complete + 1)
        assert torch.equal(found["model"], torch.full((300_000,), float(found["total"])))
