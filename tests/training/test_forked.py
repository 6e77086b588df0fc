"""A forked process that reads a dataset changes nothing that the dataset uses in this process."""

import mmap
import multiprocessing
import os
import socket
import sqlite3
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_halos.training.forked import in_forked_process

RECORD = 5000  # bytes; more than one of them fits into the buffer of a Python file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(b"".join(bytes([index]) * RECORD for index in range(40)))
    return path


def record(file: Any, index: int) -> bytes:
    file.seek(index * RECORD)
    return bytes(file.read(RECORD))


def forked(function: Callable[[], Any], seconds: float = 60.0) -> str:
    return in_forked_process(lambda: str(function()), seconds).decode()


@pytest.mark.parametrize("buffering", [-1, 0])
@pytest.mark.parametrize("mode", ["rb", "r+b"])
def test_it_reads_open_files_and_leaves_their_positions(path: Path, mode: str, buffering: int) -> None:
    with open(path, mode, buffering=buffering) as file:
        assert record(file, 0) == bytes(RECORD)
        position = os.lseek(file.fileno(), 0, os.SEEK_CUR)
        assert forked(lambda: {*record(file, 30), *file.read(1)}) == "{30, 31}"
        assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == position
        assert record(file, 1) == b"\1" * RECORD


def test_it_reads_a_file_from_the_position_that_it_has_here(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    os.lseek(file, 3 * RECORD, os.SEEK_SET)
    path.unlink()  # an open file may have no name
    assert forked(lambda: os.read(file, 2)) == r"b'\x03\x03'"
    assert os.read(file, 1) == b"\3"
    os.close(file)


def test_it_cannot_write_files(path: Path, tmp_path: Path) -> None:
    content = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:
        assert forked(lambda: file.write(b"x")) == ""
    with open(path, "ab", buffering=0) as file:
        forked(lambda: file.write(b"x"))
    for change in (
        lambda: path.write_bytes(b""),
        lambda: (tmp_path / "other").touch(),
        lambda: os.truncate(path, 0),
        lambda: path.rename(tmp_path / "other"),
        lambda: tempfile.mkdtemp(dir=tmp_path),
        lambda: np.save(tmp_path / "other", np.zeros(3)),
        lambda: sqlite3.connect(tmp_path / "other"),
        lambda: subprocess.run(["touch", tmp_path / "other"], check=True),
    ):
        assert forked(change) == ""
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_it_cannot_use_connections() -> None:
    first, second = socket.socketpair()
    reader, writer = os.pipe()
    os.write(writer, b"data")
    first.send(b"data")
    assert forked(lambda: second.recv(1)) == ""
    assert forked(lambda: first.send(b"request")) == ""
    assert forked(lambda: os.read(reader, 1)) == ""
    forked(lambda: os.write(writer, b"request"))
    os.close(writer), first.close()
    assert (os.read(reader, 99), second.recv(99)) == (b"data", b"data")
    os.close(reader), second.close()


def test_it_reads_shared_memory_and_cannot_write_it(path: Path) -> None:
    tensor = torch.zeros(3).share_memory_()
    lock = multiprocessing.Lock()
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        assert forked(lambda: (tensor.tolist(), mapped[RECORD])) == "([0.0, 0.0, 0.0], 1)"
        assert forked(lambda: tensor.fill_(1.0)) == ""
        assert forked(lambda: mapped.__setitem__(0, 1)) == ""
        assert mapped[0] == 0
    assert forked(lock.acquire) == ""  # and would be killed before it releases it
    assert lock.acquire(timeout=60.0)
    assert not tensor.any()


def test_a_lock_that_another_thread_holds_ends_it() -> None:
    lock, is_held, may_end = threading.Lock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            is_held.set()
            may_end.wait(60.0)

    thread = threading.Thread(target=hold)
    thread.start()
    is_held.wait(60.0)
    assert forked(lock.acquire, seconds=0.2) == ""
    may_end.set()
    thread.join(60.0)


def test_it_opens_files_of_its_own_and_lists_folders(path: Path) -> None:
    assert forked(lambda: (path.read_bytes()[RECORD], os.listdir(path.parent))) == "(1, ['data'])"
