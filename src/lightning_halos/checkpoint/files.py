"""Files that are either complete or do not exist.

A file is written under a temporary name, brought to the disk, and renamed as the last act, so that a crash at any byte
leaves what was there before. Nothing here knows what the bytes mean.
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
from fsspec.utils import get_protocol
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_halos.checkpoint.errors import CheckpointError
from lightning_halos.core.compat import map_tensors


@dataclass(frozen=True)
class Written:
    """A file that is on the disk.

    Attributes:
        size: Bytes.
        crc32: Checksum, as ``zlib.crc32`` computes it.
    """

    size: int
    crc32: int


def write(path: Path, fill: Callable[[IO[bytes]], object]) -> Written:
    """Writes a file, atomically. Its folder is made if it is not there.

    Args:
        path: The file. What has this name is replaced.
        fill: Writes the content into what it is given, front to back.

    Raises:
        OSError: If it cannot be written: a full disk, a folder that is not writable. Nothing is left behind then.
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
        # torch reports a failed write in its own words.
        if reason := error if isinstance(error, OSError) else checked.error:
            raise OSError(f"{path} could not be written: {reason}") from error
        raise
    bring_to_disk(path.parent)
    return Written(checked.size, checked.crc32)


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
        found = 0
        while block := file.read(1 << 20):
            found = zlib.crc32(block, found)
        if found != expected.crc32:
            raise CheckpointError(
                f"{path} is damaged: its checksum is {found:08x}, and {expected.crc32:08x} was written."
            )
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


def link(path: Path, link: Path) -> None:
    """Makes a symbolic link to a file, or lets an existing one lead to it, in one step."""
    temporary = link.with_name(f".{link.name}.{uuid.uuid4().hex}.part")
    temporary.symlink_to(os.path.relpath(path, link.parent))
    os.replace(temporary, link)


def share(folder: Path, names: Iterable[str], other: Path) -> None:
    """Puts the files of a folder into another one, too, without a copy where the file system has hard links.

    Files that are not in the folder are left out: they may be on the disk of another machine.
    """
    for name in names:
        if (folder / name).exists():
            try:
                os.link(folder / name, other / name)
            except OSError:
                shutil.copyfile(folder / name, other / name)
    bring_to_disk(other)


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
    """Writes ``.ckpt`` files as Lightning does, but atomically, also if the machine crashes."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None or not is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_state(Path(path), checkpoint)


class _Checked(io.RawIOBase):
    """Writes to a file and computes the size and checksum."""

    file: IO[bytes]

    def __init__(self) -> None:
        self.crc32 = 0
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
        self.crc32 = zlib.crc32(data, self.crc32)
        size = memoryview(data).nbytes
        self.size += size
        return size

    def flush(self) -> None:
        """Does nothing: the file is flushed at the end."""
