"""Faults in a star of jobs, one for each run: what happens to the party that is struck, and to the others.

The runs and their checks are those of ``soak``; here is what each fault is expected to do. ``table`` makes the second
table of ``docs/faults.md`` from it.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from tests.faults.soak import LIVENESS, REGIONS, SERVER, Report, all_train, soak
from tests.star.hand import CUT, EXCEPTION, KILL, STOP, TERMINATE, Fault
from tests.star.roles import MISTAKE, Task
from tests.star.star import Star

START, TRAINING, LAST = MOMENTS = ("while regions join", "during training", "at the end")
VICTIMS = {"a worker": ("one", 1), "a region's rank 0": ("one", 0), "the global server": (SERVER, 0)}
FAULTS = (
    "exception",
    "SIGKILL",
    "SIGTERM",
    "SIGSTOP for 1 s",
    "SIGSTOP for 8 s",
    "no network for 1 s",
    "no network for 8 s",
)
KINDS = (EXCEPTION, KILL, TERMINATE, STOP, STOP, CUT, CUT)
LASTS = (1.0, 1.0, 1.0, 1.0, LIVENESS + 3, 1.0, LIVENESS + 3)

TASK = Task(epochs=2, samples=4800, batch=4, pause=0.04)  # about 16 s
WAIT = 1.0  # seconds without a batch that are worth a word
ENDED = 10.0  # seconds until all processes of a party that is struck must have ended, once it trains


@dataclass(frozen=True)
class StarCase:
    """A fault, and where and when it strikes."""

    moment: str
    fault: str
    victim: str

    def __str__(self) -> str:
        return f"{self.fault} in {self.victim} {self.moment}"

    @property
    def needs_network(self) -> bool:
        return KINDS[FAULTS.index(self.fault)] == CUT


CASES = [
    StarCase(moment, fault, victim)
    for moment, fault, victim in product(MOMENTS, FAULTS, VICTIMS)
    if not (fault == "exception" and victim == "the global server")  # which has no user's code
    if not (fault.startswith("no network") and victim == "a worker")  # which is on its rank 0's machine
    if moment == TRAINING or fault in ("SIGKILL", "SIGTERM")
]


@dataclass(frozen=True)
class StarOutcome:
    """What a fault did.

    Attributes:
        ended: Seconds until the party that was struck had ended; ``None`` if it went on.
        pause: The longest time in which a worker of another region (of any region, if it was the server) waited for
            its next batch.
        repeated: Batches that were trained on again.
    """

    ended: float | None
    pause: float
    repeated: int

    def __str__(self) -> str:
        does = "goes on" if self.ended is None else f"ends in {self.ended:.1f} s"
        waits = f"; the others wait {self.pause:.1f} s" if self.pause > WAIT else ""
        again = f"; {self.repeated} batches again" if self.repeated else ""
        return does + waits + again


def observe(case: StarCase, folder: Path) -> StarOutcome:
    """Runs a case.

    Raises:
        AssertionError: If anything is not as documented.
    """
    number = FAULTS.index(case.fault)
    victim, process = VICTIMS[case.victim]
    fault = Fault(0.0 if case.moment == LAST else 2.0, KINDS[number], victim, process, LASTS[number])
    if case.moment == START:
        fault = Fault(0.7, *list(vars(fault).values())[1:])
    begins = {START: lambda star: True, TRAINING: all_train, LAST: _is_nearly_done}[case.moment]
    report = soak(folder, TASK, [fault], limit=150, as_scripts=False, begins=begins)
    assert report.hand.struck == [fault], "It ended before the fault."
    return _judged(case, fault, report, folder)


def _judged(case: StarCase, fault: Fault, report: Report, folder: Path) -> StarOutcome:
    ended, codes = report.hand.ended.get(fault, (None, []))
    assert (ended is not None) == (fault.kind in (EXCEPTION, KILL, TERMINATE))
    if case.moment == TRAINING and ended is not None:
        assert ended < ENDED
        if fault.kind == TERMINATE:
            assert set(codes) == {128 + signal.SIGTERM}
        elif fault.victim != SERVER:
            assert codes[fault.process] == (1 if fault.kind == EXCEPTION else -signal.SIGKILL)
            assert codes[1 - fault.process] == 1
        if fault.kind == EXCEPTION:
            assert MISTAKE in (folder / f"one-{fault.process}.log").read_text()
            assert MISTAKE in (folder / "server.log").read_text() or fault.process != 0
    if fault.kind == TERMINATE:
        assert report.repeated == 0
    others = REGIONS if fault.victim == SERVER else REGIONS[1:]
    return StarOutcome(ended, report.evidence.longest_pause(others, report.hand.began + fault.at, 8.0), report.repeated)


def _is_nearly_done(star: Star) -> bool:
    lines = sum(path.read_bytes().count(b"\n") for path in star.evidence.glob("*.batches"))
    return lines >= TASK.steps - 12
