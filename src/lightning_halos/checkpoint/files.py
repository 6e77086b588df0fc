"""Files that are there whole or not at all.

Rules of this room: bytes, names and disks; nothing about training. A file is written under a temporary name, brought to
the disk, and only then given its name, so that a crash at any byte leaves what was there before.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from fsspec.utils import get_protocol
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_halos.checkpoint.errors import CheckpointError
from lightning_halos.core.compat import map_tensors


@dataclass(frozen=True)
class Written:
    """A file that is on the disk.

    Attributes:
        size: Bytes.
        sha256: Checksum, in hexadecimal digits.
    """

    size: int
    sha256: str


def write(path: Path, fill: Callable[[IO[bytes]], object]) -> Written:
    """Writes a file, atomically. Its folder is made if it is not there.

    Args:
        path: The file. What has this name is replaced.
        fill: Writes the content into what it is given, front to back.

    Raises:
        OSError: If it cannot be written: a full disk, a folder that is not writable. Nothing is left behind then.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    hashed = _Hashed()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as hashed.file:
            fill(hashed)  # type: ignore[arg-type]
            hashed.file.flush()
            os.fsync(hashed.file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # torch reports a failed write in words of its own.
        if reason := error if isinstance(error, OSError) else hashed.error:
            raise OSError(f"{path} could not be written: {reason}") from error
        raise
    bring_to_disk(path.parent)
    return Written(hashed.size, hashed.digest.hexdigest())


def write_state(path: Path, state: Any) -> Written:
    """Writes tensors and plain values as ``torch.save`` does, atomically; see :func:`write`."""
    return write(path, lambda file: torch.save(state, file))


def read_state(path: Path, expected: Written) -> Any:
    """Reads what :func:`write_state` wrote, without unpickling anything but tensors and plain values.

    Args:
        path: The file.
        expected: What it was when it was written.

    Raises:
        CheckpointError: If it is missing, or not what was written.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.")
    size = path.stat().st_size
    if size != expected.size:
        raise CheckpointError(f"{path} is damaged: it has {size} bytes, {expected.size} were written.")
    with path.open("rb") as file:
        found = _sha256(file)
        if found != expected.sha256:
            raise CheckpointError(f"{path} is damaged: its checksum is {found}, {expected.sha256} was written.")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def bring_to_disk(folder: Path) -> None:
    """Makes names that were given or taken in a folder outlast a crash of the machine."""
    with contextlib.suppress(OSError):  # some file systems cannot open folders; there it is not needed
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_folder(folder: Path) -> None:
    """Removes a folder with all that is in it, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)


def is_local(path: str | os.PathLike[str]) -> bool:
    """Whether a path is of this machine's file system, and not a URL such as ``s3://bucket/file``."""
    return bool(get_protocol(str(path)) == "file")


def is_plain(state: Any) -> bool:
    """Whether ``torch.load(weights_only=True)`` reads a state: tensors, numbers, texts, and lists and dicts of them."""
    buffer = io.BytesIO()
    try:
        torch.save(map_tensors(lambda _: 0, state), buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception:  # whatever an object raises while it is pickled
        return False
    return True


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's way to write ``.ckpt`` files, in one step also if the machine crashes."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None or not is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_state(Path(path), checkpoint)


class _Hashed(io.RawIOBase):
    """Writes through to a file and keeps the checksum."""

    file: IO[bytes]

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        size = memoryview(data).nbytes
        self.size += size
        return size

    def flush(self) -> None:
        """Leaves that to the end."""


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    for block in _blocks(file):
        digest.update(block)
    return digest.hexdigest()


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(1 << 20):
        yield block
