"""A thread that writes the files of checkpoints in the background, one after the other.

It neither decides what is written nor bounds how much waits: whoever begins saves does. It outlives every error, since
the jobs behind a failed one would never be done.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_halos.checkpoint import files
from lightning_halos.core.messages import Marker, ShardWritten

log = logging.getLogger(__name__)

Tell = Callable[[ShardWritten], None]


class Writer:
    """A thread that writes. It ends with its process."""

    def __init__(self) -> None:
        # A signal's handler may put a job, too.
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], Callable[[str], None]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def shard(self, marker: Marker, name: str, state: Any, tell: Tell) -> None:
        """Writes a shard in the background.

        Args:
            marker: Which save, and where.
            name: Name of the file.
            state: What to write. Nobody may change it from here on.
            tell: Told in the background how it went.
        """
        self.submit(
            lambda: tell(write_shard(marker, name, state)),
            lambda reason: tell(ShardWritten(marker.save, name, error=f"{name}: {reason}")),
        )

    def submit(self, job: Callable[[], None], failed: Callable[[str], None]) -> None:
        """Does a job after all that wait. Never blocks.

        Args:
            job: The job.
            failed: Told what the job raised, if it raised anything.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="halos writer", daemon=True)
            self._thread.start()
        self._jobs.put((job, failed))

    def _run(self) -> None:
        while True:
            job, failed = self._jobs.get()
            try:
                job()
            except BaseException as error:
                _report(error, failed)
            del job, failed  # with the state that they hold, before the next job is waited for


def _report(error: BaseException, failed: Callable[[str], None]) -> None:
    try:
        log.warning("Writing a checkpoint raised an error.", exc_info=error)
        failed(str(error) if isinstance(error, OSError) else repr(error))
    except BaseException:
        log.exception("That a checkpoint could not be written could not be reported either.")


def write_shard(marker: Marker, name: str, state: Any) -> ShardWritten:
    """Writes a shard. Returns how it went."""
    path = Path(marker.folder) / name
    try:
        written = files.write_state(path, state)
    except Exception as error:  # a save must not end the run, whatever an object raises while it is written
        reason = error if isinstance(error, OSError) else f"{path} could not be written: {error}"
        return ShardWritten(marker.save, name, error=str(reason))
    return ShardWritten(marker.save, name, written.size, written.crc32)
