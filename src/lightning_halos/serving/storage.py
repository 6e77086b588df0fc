"""The directory of a run: its lock, what was decided before its start, its snapshots, and its final model.

A snapshot is a file of tensors and plain values, and a small file beside it with its size and checksum, which is
written last: without it there is no snapshot. The newest two are kept. The server decides what a snapshot contains.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from lightning_halos.checkpoint import files
from lightning_halos.checkpoint.errors import CheckpointError
from lightning_halos.checkpoint.files import WrittenFile
from lightning_halos.version import __version__

log = logging.getLogger(__name__)

FORMAT = 2
"""Version of the snapshots. It changes when an older or this version of the package could not read the other's."""

_KEPT = 2  # snapshots
_PREFIX = "snapshot-"


class RunDirectory:
    """The directory of a run, which one server at a time may use.

    Args:
        path: The directory. It is created if it does not exist.

    Attributes:
        path: The directory.

    Raises:
        ValueError: If another server uses it.
        OSError: If it cannot be created.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(f"the directory {path} cannot be made, because a file is in its place.") from None
        self._lock = _lock(path)
        # What a server that was killed had not completed.
        for part in path.glob(".*.part"):
            part.unlink(missing_ok=True)
        self._next = max(self._numbers(), default=0) + 1
        self._good: list[int] = []  # numbers of the snapshots that were read or written here

    @property
    def final_model(self) -> Path:
        """The file of the final model, which exists when the run has finished."""
        return self.path / "final.ckpt"

    def load(self) -> dict[str, Any] | None:
        """Returns the state in the newest snapshot that is not damaged; ``None`` in a new directory.

        Raises:
            CheckpointError: If there are snapshots, but all are damaged, or they have another format.
        """
        numbers = sorted(self._numbers(), reverse=True)
        for number in numbers:
            try:
                state = self._read(number)
            except _DamagedError as error:
                log.warning(
                    "%s The snapshot before it is used. Members repeat the updates that it lacks and that they still"
                    " keep. Those that the damaged one had they may have forgotten: that work is lost, and its data is"
                    " trained on again.",
                    error,
                )
                continue
            self._good = [number]
            return state
        if numbers:
            raise CheckpointError(
                f"All snapshots in {self.path} are damaged. Put a copy of one there, with both of its files, or start a"
                " new run in another directory."
            )
        return None

    def save(self, state: Mapping[str, Any], summary: Mapping[str, Any]) -> WrittenFile:
        """Writes a snapshot, and removes the older ones when two newer ones exist.

        Args:
            state: Tensors and plain values. Nobody may change them meanwhile.
            summary: Plain values for the small file, which people may read.

        Raises:
            OSError: If it cannot be written. The older snapshots are still there.
        """
        number, self._next = self._next, self._next + 1
        written = files.write_state(self._state_file(number), dict(state))
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        seal = {"format": FORMAT, "version": __version__, "time": now, **summary, "state": asdict(written)}
        text = json.dumps(seal, indent=1) + "\n"
        try:
            files.write(self._seal_file(number), lambda file: file.write(text.encode()))
        except OSError:
            with contextlib.suppress(OSError):
                self._state_file(number).unlink()  # else what nobody reads would keep the disk full
            raise
        self._good = [*self._good, number][-_KEPT:]
        if len(self._good) == _KEPT:
            self._remove_others()
        return written

    def load_founding(self) -> dict[str, Any] | None:
        """Returns what was decided before the run has begun; ``None`` if there is nothing.

        Raises:
            CheckpointError: If it cannot be read.
        """
        try:
            state: dict[str, Any] = json.loads(self._founding_file.read_bytes())
            if not isinstance(state, dict) or not {"workers", "regions"} <= state.keys():
                raise ValueError("it has another format")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self._founding_file} cannot be read: {error}. Remove it if no job waits for the run to begin."
            ) from None
        return state

    def save_founding(self, state: Mapping[str, Any]) -> None:
        """Writes what was decided before the run has begun.

        Raises:
            OSError: If it cannot be written.
        """
        text = json.dumps(state, indent=1) + "\n"
        files.write(self._founding_file, lambda file: file.write(text.encode()))

    def write_final_model(self, checkpoint: Mapping[str, Any]) -> None:
        """Writes the final model.

        Raises:
            OSError: If it cannot be written.
        """
        files.write_state(self.final_model, dict(checkpoint))

    def close(self) -> None:
        """Lets another server use the directory."""
        self._lock.close()

    def _read(self, number: int) -> dict[str, Any]:
        seal = self._seal_file(number)
        try:
            fields = json.loads(seal.read_bytes())
            found, expected = fields["format"], WrittenFile(**fields["state"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _DamagedError(f"The snapshot {seal} is damaged: {error!r}.") from None
        if found != FORMAT:
            raise CheckpointError(
                f"{seal} has format {found}, written by lightning-halos {fields.get('version', '?')}; this version"
                f" reads format {FORMAT}. Use that version of lightning-halos for this run."
            )
        try:
            state: dict[str, Any] = files.read_state(self._state_file(number), expected)
            return state
        except Exception as error:  # reading a file of any contents may raise anything
            raise _DamagedError(f"The snapshot {seal.with_suffix('')} cannot be read: {error}") from None

    def _numbers(self) -> list[int]:
        """Returns the numbers of the snapshots whose small file exists."""
        names = (path.stem.removeprefix(_PREFIX) for path in self.path.glob(f"{_PREFIX}*.json"))
        return [int(name) for name in names if name.isdecimal()]

    def _remove_others(self) -> None:
        kept = {file for number in self._good for file in (self._state_file(number), self._seal_file(number))}
        # The small files go first, so that no snapshot has one without its state.
        for pattern in (f"{_PREFIX}*.json", f"{_PREFIX}*.pt"):
            for path in set(self.path.glob(pattern)) - kept:
                with contextlib.suppress(OSError):
                    path.unlink()

    @property
    def _founding_file(self) -> Path:
        return self.path / "founding.json"

    def _state_file(self, number: int) -> Path:
        return self.path / f"{_PREFIX}{number:08d}.pt"

    def _seal_file(self, number: int) -> Path:
        return self.path / f"{_PREFIX}{number:08d}.json"


class _DamagedError(Exception):
    """A snapshot that cannot be used."""


def _lock(path: Path) -> IO[str]:
    """Locks a directory for this process, until the returned file is closed or the process ends, however it ends."""
    file = (path / "lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise ValueError(
            f"the directory {path} is in use by another server ({holder}). End that one, or give another directory."
        ) from None
    file.truncate(0)
    with contextlib.suppress(OSError):  # the disk may be full; who holds the lock is only told
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return file
