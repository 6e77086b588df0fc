"""Writes in the background, one thing after the other.

Rules of this room: whoever hands something over never waits. That not too much piles up is up to who begins saves.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_halos.checkpoint import files
from lightning_halos.core.messages import Marker, ShardWritten

Tell = Callable[[ShardWritten], None]


class Writer:
    """A thread that writes. It ends with its process."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # a signal's handler may put, too
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """Number of writes that wait."""
        return self._jobs.qsize()

    def shard(self, marker: Marker, name: str, state: Any, tell: Tell) -> None:
        """Writes a shard in the background.

        Args:
            marker: Which save, and where.
            name: Name of the file.
            state: What to write. Nobody may change it from here on.
            tell: Told how it went, in the background.
        """
        self.submit(lambda: tell(write_shard(marker, name, state)))

    def submit(self, job: Callable[[], None]) -> None:
        """Does something after all that waits."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="halos writer", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            job()
            del job  # with the state that it holds, before the next one is waited for


def write_shard(marker: Marker, name: str, state: Any) -> ShardWritten:
    """Writes a shard. Returns how it went."""
    path = Path(marker.folder) / name
    try:
        written = files.write_state(path, state)
    except Exception as error:  # a save must not end the run, whatever an object raises while it is written
        reason = error if isinstance(error, OSError) else f"{path} could not be written: {error}"
        return ShardWritten(marker.save, name, error=str(reason))
    return ShardWritten(marker.save, name, written.size, written.sha256)
