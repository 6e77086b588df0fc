"""The names of all cases, as they appear in ``docs/faults.md``: which process fails, how and when.

``victim`` makes the fault happen; ``outcomes`` runs a case and checks the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

VICTIMS = {"a worker": 3, "a region's leader": 2, "rank 0": 0}
"""Ranks of 4 workers in 2 regions."""

FAULTS = ("exception", "SIGKILL", "SIGSTOP", "SIGTERM")

START, ROUND, EXCHANGE, VALIDATION, CHECKPOINT, END = MOMENTS = (
    "at start-up",
    "inside a round",
    "inside an exchange between regions",
    "while rank 0 validates",
    "while a checkpoint is written",
    "at the end",
)


@dataclass(frozen=True)
class Case:
    """A fault, and where and when it strikes."""

    moment: str
    fault: str
    victim: str

    @property
    def rank(self) -> int:
        return VICTIMS[self.victim]

    def __str__(self) -> str:
        return f"{self.fault} in {self.victim} {self.moment}"


CASES = [Case(*names) for names in product(MOMENTS, FAULTS, VICTIMS)]

# Every pair of fault and victim, and every moment twice.
COVERING = [
    Case(MOMENTS[(3 * row + column + row // 2) % len(MOMENTS)], fault, victim)
    for row, fault in enumerate(FAULTS)
    for column, victim in enumerate(VICTIMS)
]
