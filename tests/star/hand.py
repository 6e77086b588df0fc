"""A seeded hand that strikes the processes of a star of jobs: it kills, stops, terminates, cuts off, and starts again.

The same seed strikes at the same moments the same victims in the same way. What the victims are does not matter here,
so that other software can be put under the same hand.
"""

from __future__ import annotations

import math
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tests.star.processes import Party, signal_all

KILL, STOP, TERMINATE, CUT, UNPLUG, RESTART = KINDS = ("kill", "stop", "terminate", "cut", "unplug", "restart")
"""A restart is a kill after which the victim is started again at once."""

EXCEPTION = "exception"
"""A mistake in the user's code, in a process that makes it when SIGUSR2 comes."""

NEEDS_NETWORK = (CUT, UNPLUG)

LAUNCHER = 15.0
"""Seconds after which the rest of a job is told to end by SIGTERM; torchrun does that at once."""


@dataclass(frozen=True)
class Fault:
    """A blow of the hand.

    Attributes:
        at: Seconds from the beginning.
        kind: One of :data:`KINDS`.
        victim: Name of a party.
        process: Which process of the party is struck by a kill or a stop; taken modulo their number.
        lasts: Seconds until it is made good: the party is started again, goes on, or is connected again.
    """

    at: float
    kind: str
    victim: str
    process: int
    lasts: float

    def __str__(self) -> str:
        return f"{self.at:7.1f} s: {self.kind} {self.victim} (process {self.process}) for {self.lasts:.1f} s"


def plan(
    seed: int,
    seconds: float,
    victims: Sequence[str],
    every: tuple[float, float] = (5.0, 15.0),
    kinds: Sequence[str] = KINDS,
    lasts: tuple[float, float] = (0.5, 8.0),
) -> list[Fault]:
    """The faults of a seed.

    Args:
        seed: Decides everything.
        seconds: No fault begins later than this.
        victims: Whom it may strike.
        every: Least and largest number of seconds between two faults.
        kinds: What it may do.
        lasts: Least and largest number of seconds that a fault lasts.
    """
    draw = random.Random(seed)
    faults = []
    # Each combination once before one comes twice, so that short plans are varied, too.
    combinations: list[tuple[str, str]] = []
    at = draw.uniform(*every)
    while at <= seconds:
        if not combinations:
            combinations = [(kind, victim) for kind in kinds for victim in victims]
            draw.shuffle(combinations)
        kind, victim = combinations.pop()
        duration = 0.0 if kind == RESTART else draw.uniform(*lasts)
        faults.append(Fault(at, kind, victim, draw.randrange(6), duration))
        at += draw.uniform(*every)
    return faults


class Hand:
    """Carries out a plan.

    Attributes:
        struck: The faults so far.
        complaints: What must not happen, and did.
        ended: For each fault that ended a party: the seconds until all its processes had ended, and their exit codes.
        began: When it began, by ``time.time``.

    Args:
        faults: The plan, in order of time.
        parties: Whom it strikes, by name.
        patience: Seconds that the others of a party have to end when one of its processes was killed.
        log: Is told what it does.
    """

    def __init__(
        self, faults: Sequence[Fault], parties: Mapping[str, Party], patience: float, log: Callable[[str], None]
    ) -> None:
        self.struck: list[Fault] = []
        self.complaints: list[str] = []
        self.ended: dict[Fault, tuple[float, list[int | None]]] = {}
        self._faults = list(faults)
        self._parties = parties
        self._patience = patience
        self._log = log
        self._repairs: list[tuple[float, str, Fault]] = []  # when, whom, after which fault
        self._waiting: dict[str, tuple[float, Fault]] = {}  # parties that are to end: until when, after which fault
        self._told: set[str] = set()  # those of them that a launcher has told to end
        self._stopped: dict[str, int] = {}
        self.began = time.time()
        self._begin = time.monotonic()
        self._is_over = False

    @property
    def is_busy(self) -> bool:
        """Whether it will do more."""
        return bool(self._faults or self._repairs or self._waiting)

    def act(self) -> None:
        """Does what is due. To be called about ten times a second."""
        now = time.monotonic() - self._begin
        for name, (deadline, fault) in list(self._waiting.items()):
            if self._parties[name].has_ended():
                self.ended[fault] = now - fault.at, self._parties[name].codes()
                self._told.discard(name)
                del self._waiting[name]
                self._repairs.append((max(now, fault.at + fault.lasts), name, fault))
            elif now > fault.at + LAUNCHER and name not in self._told:
                self._log(f"({name} has not ended by itself after {LAUNCHER:g} s, as [{fault}])")
                self._told.add(name)
                self._parties[name].terminate()
            elif now > deadline:
                left = self._parties[name].pids()
                self._waiting[name] = math.inf, fault  # one complaint is enough
                self.complaints.append(f"{name}: processes {left} still run {self._patience:g} s after [{fault}]")
                signal_all(left, signal.SIGKILL)
        for name, party in self._parties.items():
            if not self._is_over and not self._is_down(name) and party.has_ended() and not party.is_done():
                self.complaints.append(f"{name} ended by itself, last struck by [{self._last(name)}]")
                party.start()
        for repair in sorted(self._repairs, key=lambda repair: repair[0]):
            due, name, fault = repair
            if due <= now:
                self._repairs.remove(repair)
                self._repair(name, fault)
        while self._faults and self._faults[0].at <= now:
            self._strike(self._faults.pop(0), now)

    def finish(self) -> None:
        """Strikes no more and starts nobody again, because the run is over; sets free who is stopped or cut off."""
        self._faults.clear()
        self._is_over = True

    def is_absent(self, name: str, since: float) -> bool:
        """Whether a party may miss the end of the run: it was struck in the last so many seconds."""
        now = time.monotonic() - self._begin
        return any(fault.victim == name and now - fault.at - fault.lasts < since for fault in self.struck)

    def _is_down(self, name: str) -> bool:
        return name in self._waiting or any(name == other for _, other, _ in self._repairs)

    def _last(self, name: str) -> str:
        return str(next((fault for fault in reversed(self.struck) if fault.victim == name), "nothing"))

    def _strike(self, fault: Fault, now: float) -> None:
        party = self._parties[fault.victim]
        pids = party.pids()
        if self._is_down(fault.victim) or party.is_done() or not pids:
            self._log(f"(passes over [{fault}]: it is struck already, or has ended)")
            return
        self._log(str(fault))
        self.struck.append(fault)
        pid = pids[fault.process % len(pids)]
        if fault.kind in (KILL, RESTART, EXCEPTION):
            signal_all([pid], signal.SIGUSR2 if fault.kind == EXCEPTION else signal.SIGKILL)
            self._waiting[fault.victim] = now + self._patience, fault
        elif fault.kind == TERMINATE:
            party.terminate()
            self._waiting[fault.victim] = now + self._patience, fault
        else:
            if fault.kind == STOP:
                self._stopped[fault.victim] = pid
                signal_all([pid], signal.SIGSTOP)
            elif fault.kind == CUT:
                party.cut()
            else:
                party.unplug()
            self._repairs.append((fault.at + fault.lasts, fault.victim, fault))

    def _repair(self, name: str, fault: Fault) -> None:
        party = self._parties[name]
        if fault.kind in NEEDS_NETWORK:
            party.mend()
        elif fault.kind == STOP:
            signal_all([self._stopped.pop(name)], signal.SIGCONT)
        elif not (self._is_over or party.is_done()):
            party.start()


def described(faults: Sequence[Fault]) -> str:
    """How many of which kind."""
    return ", ".join(f"{number} {kind}" for kind, number in sorted(Counter(fault.kind for fault in faults).items()))


def gaps(faults: Sequence[Fault]) -> Iterator[float]:
    """Seconds between faults."""
    return (later.at - earlier.at for earlier, later in pairwise(faults))
