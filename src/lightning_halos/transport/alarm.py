"""Passes failures and preemption on to all processes, so that one failure ends the run everywhere, with its reason.

Links and hosts report failures from any thread; the main thread calls :meth:`Alarm.check` wherever it works or waits.
The first failure counts. It is sent to all peers and closes all links, so that no thread waits when the process ends. A
preemption is sent to all peers, too, but closes no link.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from dataclasses import replace

from lightning_halos.core.messages import Failure, Preempted
from lightning_halos.transport.errors import PeerFailedError, PeerLostError
from lightning_halos.transport.link import Link, since

EXIT_CODE = 128 + signal.SIGTERM
"""Exit code of a preempted process. It is not 0, so that torchrun and SLURM start the run again."""

_GRACE = 3.0  # seconds in which the failed peer can print its own traceback first
_LIMIT = 20.0  # seconds after which a process whose main thread does not react is ended
_MOST = 8  # largest number of peers in an error message
_MOST_CHARACTERS = 100_000  # largest length of a reason for the peers; its end is kept, where a traceback has the error


class Alarm:
    """Records the first failure of a process and its links, and passes it on.

    Attributes:
        here: Name of this process, for the peers' error messages.
        links: All links of this process; see :meth:`add`.
        preempted_since: Time at which this process, or a peer, was preempted, by ``time.monotonic``.
    """

    def __init__(self, here: str) -> None:
        self.here = here
        self.links: list[Link] = []
        self.preempted_since: float | None = None
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self._failure: Failure | None = None
        self._told = threading.Event()  # all peers have been told of the failure
        self._since = 0.0
        self._off = False
        self._watchdog = threading.Timer(_LIMIT, self._end_process)
        self._watchdog.daemon = True

    def add(self, *links: Link) -> None:
        """Adds links. If the run has failed already, their peers are told."""
        with self._lock:
            self.links += links
            failure = self._failure
        if failure is not None:
            self._tell_failure(failure, links)

    def watch(self, timeout: float) -> None:
        """Starts a thread that notices peers which are silent for ``timeout`` seconds, with their connection open."""
        threading.Thread(target=self._watch, args=(timeout,), name="halos watch", daemon=True).start()

    def fail(self, error: Exception) -> None:
        """Records that a link lost its peer, or that a server of this process failed."""
        reason = str(error) if isinstance(error, PeerLostError) else describe(error)
        self._ring(error, Failure(self.here, reason))

    def peer_lost(self, peer: str, what: str, timeout: float) -> PeerLostError:
        """Returns the error that a peer "did not ``what``" within the timeout, with each peer's last sign of life."""
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

    def receive(self, news: Failure | Preempted) -> None:
        """Handles a failure or preemption that a peer reported or passed on."""
        if isinstance(news, Preempted):
            self.preempt()
        else:
            self._ring(PeerFailedError(f"{news.origin} failed: {news.reason}"), news)

    def preempt(self, since: float | None = None) -> None:
        """Records a preemption ``since`` a time (default: now), and tells all peers to save a checkpoint and end."""
        with self._lock:
            if self.is_over or self.preempted_since is not None:
                return
            self.preempted_since = time.monotonic() if since is None else since
            links = list(self.links)
        for link in links:
            link.post(Preempted())

    def report(self, reason: str) -> None:
        """Tells the peers that the main thread of this process failed, unless another failure came first."""
        self._ring(None, Failure(self.here, reason))
        if self.has_failed:
            self._told.wait(_GRACE)  # another thread may be telling them just now
        self.disarm()

    def disarm(self) -> None:
        """Ignores failures from now on, because the run is over, or the main thread reacts."""
        self._off = True
        self._watchdog.cancel()

    @property
    def is_over(self) -> bool:
        """Whether the run has ended or failed."""
        return self._off or self._failure is not None

    @property
    def has_failed(self) -> bool:
        """Whether the run has failed."""
        return self._failure is not None

    def check(self, wait: bool = False) -> None:
        """Raises the recorded failure, if any; ``SystemExit`` if a peer has ended because the run is preempted.

        A peer's failure is raised a few seconds later, so that the peer prints its error first.

        Args:
            wait: Whether to wait here for that time. Otherwise the method returns, and a later call raises.
        """
        if wait and self.has_failed:
            self._told.wait(_GRACE)  # the error is there afterwards
        if self._error is None or self._off:
            return
        if self.preempted_since is not None and isinstance(self._error, (PeerFailedError, PeerLostError)):
            self.disarm()
            raise SystemExit(EXIT_CODE)
        remaining = self._since + _GRACE - time.monotonic()
        if isinstance(self._error, PeerFailedError) and remaining > 0:
            if not wait:
                return
            time.sleep(remaining)
        self.disarm()
        raise self._error

    def close(self, timeout: float) -> None:
        """Says goodbye on all links, and waits at most ``timeout`` seconds for the goodbyes of all peers."""
        self.disarm()
        for link in self.links:
            link.close()
        deadline = time.monotonic() + timeout
        for link in self.links:
            link.join(max(0.0, deadline - time.monotonic()))

    def _watch(self, timeout: float) -> None:
        try:
            while not self.is_over:
                time.sleep(min(1.0, timeout / 10))
                now = time.monotonic()
                for link in list(self.links):
                    if link.silence(now) > timeout:
                        self.fail(self.peer_lost(link.peer, "say anything", timeout))
        except Exception as error:
            self.fail(error)

    def _ring(self, error: Exception | None, failure: Failure) -> None:
        with self._lock:
            if self.is_over:
                return
            self._failure, self._off = replace(failure, reason=failure.reason[-_MOST_CHARACTERS:]), error is None
            links = list(self.links)
        try:
            self._tell_failure(self._failure, links)
        finally:  # from here on the main thread may end, and with it the links
            self._since, self._error = time.monotonic(), error
            self._told.set()
        if error is not None:
            self._watchdog.start()

    def _tell_failure(self, failure: Failure, links: Iterable[Link]) -> None:
        for link in links:
            link.post(failure)
            link.close()

    def _end_process(self) -> None:
        if self._off or hasattr(sys, "ps1"):
            return
        try:
            sys.stderr.write(  # with its end of line, so that the texts of several processes do not mix
                f"{self.here} is ended, because its main thread did not react within {_LIMIT:g} s to this error:"
                f" {self._error}\n"
            )
            sys.stderr.flush()
        finally:
            os._exit(1 if self.preempted_since is None else EXIT_CODE)


def describe(error: BaseException) -> str:
    """Returns the text about an error for the peers: its traceback, or its name if it is an interruption."""
    if isinstance(error, Exception):
        return "".join(traceback.format_exception(error))
    return repr(error)
