"""A short soak; ``python -m tests.faults.soak`` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.soak import IN_FLIGHT, LAST_WORDS, LIVENESS, REGIONS, SERVER, WORKERS, losses, soak, task_for
from tests.star.hand import CUT, KILL, KINDS, NEEDS_NETWORK, TERMINATE, Fault, plan
from tests.star.network import missing
from tests.star.roles import Task

HAND = [kind for kind in KINDS if kind not in NEEDS_NETWORK or not missing()]


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))])
def test_a_run_under_the_hand_does_what_was_ordered(tmp_path: Path, seed: int) -> None:
    seconds = 12.0
    task = Task(epochs=2, samples=round(seconds * len(REGIONS) * WORKERS / 0.04) * 2, batch=4, pause=0.04)
    faults = plan(seed, seconds, [SERVER, *REGIONS], (1.0, 2.5), HAND, (0.3, 2.0))
    report = soak(tmp_path, task, faults, limit=90, as_scripts=False)
    assert len(report.faults) >= 4
    assert report.loss < 0.2  # 0.6 before training


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_minute_of_real_scripts(tmp_path: Path) -> None:
    faults = plan(7, 60, [SERVER, *REGIONS], kinds=HAND)
    assert len(soak(tmp_path, task_for(60), faults, limit=400).faults) >= 4


def test_whose_work_may_be_lost() -> None:
    """What was in flight, and what a region did while nobody could hear of it."""
    kill = Fault(20.0, KILL, "one", 0, 1.0)
    harmless = [Fault(0.0, TERMINATE, "one", 0, 1.0), Fault(0.0, KILL, SERVER, 0, 1.0), Fault(0.0, CUT, "one", 0, 1.0)]
    assert losses(harmless, {}) == []
    assert losses([*harmless, kill], {}) == [("one", 20 - IN_FLIGHT, 20 + LAST_WORDS)]
    assert losses([Fault(18.0, KILL, SERVER, 0, 1.0), kill], {}) == [("one", 18 - IN_FLIGHT, 20 + LAST_WORDS)]
    terminate = Fault(20.0, TERMINATE, "one", 0, 1.0)
    assert losses([Fault(18.0, KILL, SERVER, 0, 1.0), terminate], {}) == [("one", 18 - IN_FLIGHT, 20 + LAST_WORDS)]
    before = [Fault(5.0, KILL, SERVER, 0, 1.0), kill]
    assert losses(before, {"one": [0.0, 15.0]}) == [("one", 20 - IN_FLIGHT, 20 + LAST_WORDS)]
    assert losses(before, {"one": [0.0, 25.0]}) == [("one", 5 - IN_FLIGHT, 20 + LAST_WORDS)]
    assert [victim for victim, *_ in losses([Fault(0.0, CUT, SERVER, 0, LIVENESS)], {})] == list(REGIONS)
