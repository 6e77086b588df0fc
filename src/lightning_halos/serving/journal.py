"""The events of a run: their lines in the log, and the latest ones for the status.

Nothing that a peer does again and again may fill the log, or push what concerns others out of the status.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from typing import NamedTuple

from lightning_halos.serving.report import printable

log = logging.getLogger(__name__)

_MOST = 50  # latest events
_MOST_OF_ONE = 10  # of them about one peer
_MOST_CHARACTERS = 2000  # of an event
_LINES, _MINUTE = 20, 60.0  # lines about a peer in the log, in so many seconds


class _Event(NamedTuple):
    at: float  # by `time.time`
    sentence: str
    about: str  # name of a peer; empty if it is about the run
    kind: str  # the sentence without the peer's address
    times: int


class Journal:
    """The events. An event that happens again takes the place of the earlier one, and says how often it happened."""

    def __init__(self) -> None:
        self._events: list[_Event] = []
        self._lock = threading.Lock()
        self._lines_since = 0.0  # by `time.monotonic`
        self._lines: Counter[str] = Counter()  # about each peer since then, with those that were left out

    @property
    def latest(self) -> list[tuple[float, str]]:
        """The latest events, as pairs of their time (by ``time.time``) and a sentence. The newest is the last."""
        with self._lock:
            return [
                (event.at, event.sentence if event.times == 1 else f"{event.sentence} ({event.times} times)")
                for event in self._events
            ]

    def note(self, sentence: str, level: int, about: str = "", address: str = "") -> None:
        """Logs a sentence, which may have a member's words, and keeps it.

        Args:
            sentence: The sentence.
            level: The level of its line.
            about: Name of the peer that it is about, if any.
            address: That peer's address, which each of its connections changes.
        """
        sentence = printable(sentence[:_MOST_CHARACTERS])
        kind = sentence.replace(address, "") if address else sentence
        with self._lock:
            same = [event for event in self._events if (event.about, event.kind) == (about, kind)]
            kept = [event for event in self._events if event not in same]
            if about and sum(event.about == about for event in kept) >= _MOST_OF_ONE:
                kept.remove(next(event for event in kept if event.about == about))
            times = 1 + sum(event.times for event in same)
            self._events = [*kept, _Event(time.time(), sentence, about, kind, times)][-_MOST:]
            is_logged = self._has_room(about, time.monotonic())
        if is_logged:
            log.log(level, "%s", sentence)

    def _has_room(self, about: str, now: float) -> bool:
        """Counts a line. Returns whether it may be written."""
        if now - self._lines_since > _MINUTE:
            for name, count in self._lines.items():
                if count > _LINES:
                    log.warning("%d more lines about %s were left out.", count - _LINES, name)
            self._lines_since = now
            self._lines.clear()
        if not about:
            return True
        self._lines[about] += 1
        return self._lines[about] <= _LINES
