"""One failure ends the run everywhere, and everybody learns why.

Rules of this room: links and hosts report here from any thread; the main thread asks :meth:`Alarm.check` wherever it
works or waits. The first failure counts, is passed on to all peers, and closes all links, so that no thread is left
waiting when the process ends. That the run is to end is passed on in the same way, and closes nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback

from lightning_halos.core.messages import Failure, Preempted
from lightning_halos.transport.errors import PeerFailedError, PeerLostError
from lightning_halos.transport.link import Link, since

EXIT_CODE = 128 + signal.SIGTERM
"""Of a process that SIGTERM has ended: not a success, so that torchrun and SLURM start again."""

_GRACE = 3.0  # seconds in which the peer that failed can print its own traceback first
_LIMIT = 20.0  # seconds after which a process that does not react is ended
_MOST = 8  # peers in an error message


class Alarm:
    """Collects the first failure of a process and its links, and passes it on.

    Args:
        here: Who this process is, for the peers' error messages.

    Attributes:
        here: Who this process is.
        links: All links of this process.
        preempted_since: When this process got SIGTERM or learned that another one did, by ``time.monotonic``.
    """

    def __init__(self, here: str) -> None:
        self.here = here
        self.links: list[Link] = []
        self.preempted_since: float | None = None
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self._since = 0.0
        self._off = self._failed = False

    def watch(self, timeout: float) -> None:
        """Notices a peer that stopped without closing its connection. Returns at once.

        Args:
            timeout: Seconds of silence after which a peer counts as lost.
        """
        threading.Thread(target=self._watch, args=(timeout,), name="halos watch", daemon=True).start()

    def fail(self, error: Exception) -> None:
        """A link lost its peer, or one of this process's servers failed."""
        reason = str(error) if isinstance(error, PeerLostError) else describe(error)
        self._ring(error, Failure(self.here, reason))

    def lost(self, peer: str, what: str, timeout: float) -> PeerLostError:
        """Returns the error for a wait that lasted too long. It says of all peers when they were last heard of.

        Args:
            peer: Who was waited for.
            what: What for, as in "the peer did not ...".
            timeout: Seconds that the wait lasted.
        """
        heard: dict[str, float | None] = {}
        for link in self.links:
            if link.is_remote:
                heard[link.peer] = max(filter(None, (link.heard, heard.get(link.peer))), default=None)
        longest_first = sorted(heard.items(), key=lambda item: item[1] or 0.0)
        told = "; ".join(f"{name} {since(time)}" for name, time in longest_first[:_MOST])
        return PeerLostError(
            f"{peer} did not {what} for {timeout:g} s, and {self.here} waited for it (HalosStrategy(timeout=...))."
            + (f" Last heard of: {told}." if told else "")
        )

    def told(self, news: Failure | Preempted) -> None:
        """A peer said that it, or a peer of its, failed or is preempted."""
        if isinstance(news, Preempted):
            self.preempt()
        else:
            self._ring(PeerFailedError(f"{news.origin} failed: {news.reason}"), news)

    def preempt(self, since: float | None = None) -> None:
        """The run is to save a checkpoint and end: all peers are told.

        Args:
            since: When the signal came, by ``time.monotonic``. Default: now.
        """
        with self._lock:
            if self._off or self._error is not None or self.preempted_since is not None:
                return
            self.preempted_since = time.monotonic() if since is None else since
        for link in self.links:
            link.post(Preempted())

    def raised(self, reason: str) -> None:
        """The main thread of this process failed: the peers are told."""
        self._ring(None, Failure(self.here, reason))

    def off(self) -> None:
        """Ignores failures from here on: the run is over."""
        with self._lock:
            self._off = True

    @property
    def is_over(self) -> bool:
        """Whether the run is over, or cannot go on."""
        return self._off or self._error is not None

    @property
    def has_failed(self) -> bool:
        """Whether the run cannot go on."""
        return self._failed

    def check(self, wait: bool = False) -> None:
        """Raises the failure, if there is one.

        Args:
            wait: Whether to give the peer that failed its time here, since this process must not go on.

        Raises:
            PeerLostError: A peer disappeared or fell silent.
            PeerFailedError: A peer failed. It gets a few seconds to say so itself before this is raised.
            Exception: A server of this process failed.
            SystemExit: A peer has ended because the run is preempted.
        """
        if self._error is None or self._off:
            return
        if self.preempted_since is not None and isinstance(self._error, (PeerFailedError, PeerLostError)):
            self.off()
            raise SystemExit(EXIT_CODE)
        remaining = self._since + _GRACE - time.monotonic()
        if isinstance(self._error, PeerFailedError) and remaining > 0:
            if not wait:
                return
            time.sleep(remaining)
        self.off()
        raise self._error

    def close(self, timeout: float) -> None:
        """Says goodbye on all links and waits for the peers to say it too.

        Args:
            timeout: Seconds to wait for all of them.
        """
        for link in self.links:
            link.close()
        deadline = time.monotonic() + timeout
        for link in self.links:
            link.join(max(0.0, deadline - time.monotonic()))

    def _watch(self, timeout: float) -> None:
        while not self._off and self._error is None:
            time.sleep(min(1.0, timeout / 10))
            now = time.monotonic()
            for link in self.links:
                seconds, what = link.silence(now)
                if seconds > timeout:
                    self.fail(self.lost(link.peer, what, timeout))

    def _ring(self, error: Exception | None, failure: Failure) -> None:
        with self._lock:
            if self._off or self._error is not None:
                return
            self._error, self._since = error, time.monotonic()
            self._failed = True
            self._off = error is None
        for link in self.links:
            link.post(failure)
            link.close()
        if error is not None:
            watchdog = threading.Timer(_LIMIT, self._end_process)
            watchdog.daemon = True
            watchdog.start()

    def _end_process(self) -> None:
        if self._off or hasattr(sys, "ps1"):
            return
        print(f"{self.here} ends, because it did not react for {_LIMIT:g} s to: {self._error}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1 if self.preempted_since is None else EXIT_CODE)


def describe(error: BaseException) -> str:
    """What a peer is told of an error: its traceback, or its name if it is an interruption."""
    if isinstance(error, Exception):
        return "".join(traceback.format_exception(error))
    return repr(error)
