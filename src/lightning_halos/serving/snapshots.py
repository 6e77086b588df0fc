"""The thread that writes a snapshot of the run when one is due, while the host serves the members.

The server's state is copied portion by portion, and a message waits for one portion at most. Members keep what no
snapshot has, so the number of updates between two snapshots is also the number of updates that a member must keep.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any

from lightning_halos.serving.host import RunHost
from lightning_halos.serving.storage import RunDirectory

log = logging.getLogger(__name__)

_YIELD = 0.001  # seconds; without a pause the thread would take the lock again before those that wait for it wake up
_RETRY = 10.0  # seconds after a snapshot that could not be written


class SnapshotWriter:
    """Writes snapshots, one at a time.

    A snapshot is due when ``every`` updates have arrived since the last one, but not before as much time has passed as
    the last one took; and at once when a message waits for it. One that could not be written is tried again.

    Args:
        host: The host.
        directory: The run's directory.
        every: Number of updates.
        summary: Returns what the small file beside a snapshot tells.

    Attributes:
        failure: Why the last one could not be written, if it could not.
        failing_since: Since when none could be written, by ``time.monotonic``; ``None`` if the last one is on disk.
        last: About the last snapshot that is on disk: ``time`` (by ``time.time``), ``seconds`` and ``bytes``.
    """

    def __init__(
        self, host: RunHost, directory: RunDirectory, every: int, summary: Callable[[], dict[str, Any]]
    ) -> None:
        self.last: dict[str, float] | None = None
        self.failure = ""
        self.failing_since: float | None = None
        self._host = host
        self._directory = directory
        self._every = every
        self._summary = summary
        self._updates = 0  # that the last snapshot has
        self._next_at = 0.0
        self._has_failed = False
        self._is_ended = False
        self._thread = threading.Thread(target=self._run, name="halos snapshots", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def end(self) -> None:
        """Ends the thread, after the snapshot that it is writing."""
        self._is_ended = True
        self._host.changed.set()
        if self._thread.is_alive():
            self._thread.join()

    def write(self) -> bool:
        """Writes a snapshot now. Returns whether it is on disk; if it is not, the reason is logged."""
        founding = self._host.begin_founding()
        if founding is not None:
            return self._write_founding(*founding)
        start, updates = time.monotonic(), self._host.updates
        number, shard = self._host.begin_snapshot()
        self._has_failed = True
        try:
            while not self._host.ask(lambda _: shard.advance()):
                time.sleep(_YIELD)
            written = self._directory.save(shard.state, self._summary())
        except Exception as error:  # the run goes on; its members keep what no snapshot has
            self._note_failure("A snapshot", error, start)
            self._host.snapshot_failed(number)
            return False
        seconds = time.monotonic() - start
        self._has_failed, self.failing_since = False, None
        self._updates, self._next_at = updates, start + 2 * seconds
        self.last = {"time": time.time(), "seconds": seconds, "bytes": written.size}
        self._host.snapshot_written(number, shard)
        return True

    def _write_founding(self, number: int, state: dict[str, Any]) -> bool:
        start = time.monotonic()
        self._has_failed = True
        try:
            self._directory.save_founding(state)
        except Exception as error:  # regions wait
            self._note_failure("What regions are told", error, start)
            return False
        self._has_failed, self.failing_since = False, None
        self._host.founding_written(number)
        return True

    def _note_failure(self, what: str, error: Exception, start: float) -> None:
        self._next_at = time.monotonic() + _RETRY
        self.failure = str(error)
        self.failing_since = start if self.failing_since is None else self.failing_since
        self._host.note(f"{what} could not be written, and is tried again: {error}", logging.ERROR)
        if not isinstance(error, OSError):
            log.error("The error was not expected.", exc_info=error)

    def _run(self) -> None:
        while not self._is_ended:
            try:
                seconds = self._seconds_until_due()
                if seconds <= 0:
                    self.write()
                    continue
            except Exception:  # without this thread, members would wait for ever
                log.exception("The thread that writes snapshots has met an error, and goes on.")
                seconds = _RETRY
            self._host.changed.wait(min(seconds, 1.0))
            self._host.changed.clear()

    def _seconds_until_due(self) -> float:
        if self._host.must_save:
            return 0.0
        if self._host.updates - self._updates < self._every and not self._has_failed:
            return math.inf
        return self._next_at - time.monotonic()
