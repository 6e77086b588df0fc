"""Files that are either complete or do not exist.

A file is written under a temporary name, fsynced, and finally renamed, so that a crash at any byte leaves the previous
file. This file does not know what the bytes mean.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from fsspec.core import strip_protocol
from fsspec.utils import get_protocol
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_halos.checkpoint.errors import CheckpointError
from lightning_halos.core.compat import map_tensors


@dataclass(frozen=True)
class WrittenFile:
    """Size in bytes and checksum, by ``zlib.crc32``, of a file that was written."""

    size: int
    crc32: int


def write(path: Path, fill: Callable[[IO[bytes]], object]) -> WrittenFile:
    """Writes a file atomically, and its folder if it does not exist. ``fill`` writes the contents, front to back.

    Raises:
        OSError: If it cannot be written, for example because the disk is full. Then no file remains.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    checked = _Checked()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as checked.file:
            fill(checked)  # type: ignore[arg-type]
            checked.file.flush()
            os.fsync(checked.file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # torch replaces the OSError of a failed write by an error of its own.
        if reason := error if isinstance(error, OSError) else checked.error:
            raise OSError(f"{path} could not be written: {reason}") from error
        raise
    sync_folder(path.parent)
    return WrittenFile(checked.size, checked.crc32)


def write_state(path: Path, state: Any) -> WrittenFile:
    """Writes tensors and plain values atomically with ``torch.save``; see :func:`write`."""
    return write(path, lambda file: torch.save(state, file))


def read_state(path: Path, expected: WrittenFile, mapped: bool = False) -> Any:
    """Reads a file of :func:`write_state`, without unpickling anything but tensors and plain values.

    Args:
        path: The file.
        expected: What was written.
        mapped: Whether the tensors stay in the file, for callers that copy only some of their values.

    Raises:
        CheckpointError: If it is missing, or is not what was written.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.")
    size = path.stat().st_size
    if size != expected.size:
        raise CheckpointError(f"{path} is damaged: it has {size} bytes, but {expected.size} were written.")
    with path.open("rb") as file:
        found = 0
        while block := file.read(1 << 20):
            found = zlib.crc32(block, found)
        if found != expected.crc32:
            raise CheckpointError(
                f"{path} is damaged: its checksum is {found:08x}, but {expected.crc32:08x} was written."
            )
        if mapped:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def sync_folder(folder: Path) -> None:
    """Fsyncs a folder, so that names that were added or removed survive a crash of the machine."""
    with contextlib.suppress(OSError):  # file systems that cannot open folders do not need it
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def link(path: Path, link: Path) -> None:
    """Creates a symbolic link to a file, or atomically changes an existing link.

    As with Lightning, it is a copy where links are not possible, and takes the place of a folder of this name.
    """
    temporary = link.with_name(f".{link.name}.{uuid.uuid4().hex}.part")
    try:
        temporary.symlink_to(os.path.relpath(path, link.parent))
    except OSError:
        shutil.copyfile(path, temporary)
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)
    os.replace(temporary, link)


def share(folder: Path, names: Iterable[str], other: Path) -> None:
    """Adds files of a folder to another folder, as hard links if the file system supports them, else as copies.

    Files that do not exist are skipped, because they may be on the disk of another machine.
    """
    for name in names:
        if (folder / name).exists():
            try:
                os.link(folder / name, other / name)
            except OSError:
                shutil.copyfile(folder / name, other / name)
    sync_folder(other)


def is_local(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is in this machine's file system, and not a URL such as ``s3://bucket/file``."""
    return bool(get_protocol(str(path)) == "file")


def local_path(path: str | os.PathLike[str]) -> Path:
    """Returns the absolute path of a local file as Lightning opens it, without ``~`` and ``file://``."""
    return Path(os.path.abspath(strip_protocol(str(path))))


def can_be_read(state: Any) -> bool:
    """Returns whether ``torch.load(weights_only=True)`` can read a state, that is, tensors and plain values."""
    buffer = io.BytesIO()
    try:
        torch.save(map_tensors(lambda _: 0, state), buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception:  # pickling an object may raise anything
        return False
    return True


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes ``.ckpt`` files as Lightning does, but atomically, even if the machine crashes."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None or not is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_state(local_path(path), checkpoint)


class _Checked(io.RawIOBase):
    """Writes to a file and computes its size and checksum."""

    file: IO[bytes]
    size = 0
    crc32 = 0
    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.crc32 = zlib.crc32(data, self.crc32)
        size = memoryview(data).nbytes
        self.size += size
        return size
