"""A thread that writes the files of checkpoints in the background, one after the other.

It decides neither what to write nor how many jobs may wait; its callers do. It survives every error, so that later jobs
are still done.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_halos.checkpoint import files
from lightning_halos.core.messages import Marker, ShardWritten

log = logging.getLogger(__name__)

Tell = Callable[[ShardWritten], None]


_Job = tuple[Callable[[], None], Callable[[str], None]]


class Writer:
    """A thread that writes. It ends when nobody can give it another job."""

    def __init__(self) -> None:
        # A SimpleQueue, because a signal handler may submit a job, too.
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._submissions = itertools.count()  # several threads may make the first one at the same moment

    def shard(
        self, marker: Marker, name: str, state: Any, tell: Tell, complete: Callable[[], None] = lambda: None
    ) -> None:
        """Writes a shard in the background.

        Args:
            marker: The marker of the snapshot, with the folder.
            name: Name of the file.
            state: The state to write. Nobody else may change it from here on.
            tell: Called in the background with the result.
            complete: Called in the background before the state is written, to complete it.
        """

        def job() -> None:
            complete()
            tell(write_shard(marker, name, state))

        self.submit(job, lambda reason: tell(ShardWritten(marker.save, name, error=f"{name}: {reason}")))

    def submit(self, job: Callable[[], None], failed: Callable[[str], None]) -> None:
        """Queues a job, and never blocks. ``failed`` is called with the text of an error that the job raises."""
        if next(self._submissions) == 0:
            self._thread = threading.Thread(target=_run, args=(self._jobs,), name="halos writer", daemon=True)
            self._thread.start()
            weakref.finalize(self, self._jobs.put, None)
        self._jobs.put((job, failed))


def _run(jobs: queue.SimpleQueue[_Job | None]) -> None:
    while (next_job := jobs.get()) is not None:
        job, failed = next_job
        try:
            job()
        except BaseException as error:
            _report(error, failed)
        del next_job, job, failed  # release their state before waiting for the next job


def _report(error: BaseException, failed: Callable[[str], None]) -> None:
    try:
        log.warning("Writing a checkpoint raised an error.", exc_info=error)
        failed(str(error) if isinstance(error, OSError) else repr(error))
    except BaseException:
        log.exception("The failure to write a checkpoint could not be reported.")


def write_shard(marker: Marker, name: str, state: Any) -> ShardWritten:
    """Writes a shard. Returns the message about the result."""
    path = Path(marker.folder) / name
    try:
        written = files.write_state(path, state)
    except Exception as error:  # writing an object may raise anything, and a checkpoint must not end the run
        reason = error if isinstance(error, OSError) else f"{path} could not be written: {error}"
        return ShardWritten(marker.save, name, error=str(reason))
    return ShardWritten(marker.save, name, written.size, written.crc32)
