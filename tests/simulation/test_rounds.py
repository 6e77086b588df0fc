"""The virtual schedule: the budget, the order of rounds, and the data of each worker."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from lightning_halos import SimulatedCluster
from lightning_halos.core.cursor import Lease
from lightning_halos.simulation.rounds import AsynchronousRounds, Rounds, SynchronousRounds
from lightning_halos.simulation.timing import Timing

CLUSTER = SimulatedCluster([[10.0, 0.1], [0.2, 10.0]], [[1.0, 0.5], [0.8, 0.25, 0.9]], step_ms=100.0)
TIMING = Timing(CLUSTER, 1_000_000)
STEPS = TIMING.local_steps(8, dynamic=True)


def asynchronous(**kwargs: float) -> Rounds:
    return AsynchronousRounds(TIMING, STEPS, CLUSTER.region_of, **kwargs)  # type: ignore[arg-type]


def synchronous(**kwargs: float) -> Rounds:
    return SynchronousRounds(TIMING, STEPS, **kwargs)  # type: ignore[arg-type]


both = pytest.mark.parametrize("make", [asynchronous, synchronous])


@both
@pytest.mark.parametrize("budget", [1, 4, 5, 31, 100, 1003])
def test_exactly_the_budget_is_handed_out_in_contiguous_ranges(make, budget) -> None:
    rounds = list(make(first=7, budget=budget).all())
    assert rounds[0].first == 7
    for earlier, later in itertools.pairwise(rounds):
        assert later.first == earlier.first + earlier.steps
    assert sum(r.steps for r in rounds) == budget
    assert all(0 < r.steps <= STEPS[r.worker] for r in rounds)


@both
@pytest.mark.parametrize("budget", [5, 31, 100])
def test_every_worker_has_a_first_round_if_there_is_a_step_for_each(make, budget) -> None:
    assert {r.worker for r in list(make(budget=budget).all())[:5]} == set(range(5))


def test_a_round_takes_its_messages_and_its_steps() -> None:
    first, *_ = asynchronous().begin([3], 1000.0)
    assert first.end == pytest.approx(1000 + 2 * 0.8 + 100 * 2 / 0.25, abs=1e-4)


def test_the_next_round_of_a_worker_begins_when_its_last_one_ends() -> None:
    last = {}
    for r in asynchronous(budget=500).all():
        assert r.begin == last.get(r.worker, 0.0)
        last[r.worker] = r.end


def test_rounds_end_in_the_order_of_time_and_those_at_the_same_moment_by_rank() -> None:
    even = SimulatedCluster([[10.0]], [[1.0, 1.0, 1.0]], step_ms=100.0)
    rounds = AsynchronousRounds(Timing(even, 1000), [4, 4, 4], [0, 0, 0])
    begun = rounds.begin([2, 0, 1], 0.0)
    assert [r.worker for r in begun] == [2, 0, 1]  # as dispatched
    assert [rounds.end()[0].worker for _ in range(3)] == [0, 1, 2]
    assert rounds.next_end() == math.inf


def test_synchronous_rounds_wait_for_the_slowest_and_for_the_exchange() -> None:
    rounds = SynchronousRounds(TIMING, [8] * 5)
    begun = rounds.begin(range(5), 0.0)
    assert [r.end for r in begun] == [pytest.approx(100 * 8 / 0.25 + TIMING.all_reduce())] * 5
    assert {r.position for r in begun} == {0}
    assert {r.position for r in rounds.begin(range(5), 1.0)} == {8}


def test_positions_follow_what_was_handed_out() -> None:
    for r in asynchronous(budget=300).all():
        assert r.position == r.first // 5


@both
@pytest.mark.parametrize("size", [1, 10, 37])
def test_the_leases_of_all_workers_are_all_the_data(make, size) -> None:
    budget = 3 * size
    leases = [lease for rank in range(5) for lease in make(budget=budget).leases(rank, size, 0, is_endless=False)]
    parts = sorted((lease.epoch, lease.first + step) for lease in leases for step in range(lease.steps))
    assert parts == [(epoch, step) for epoch in range(3) for step in range(size)]


def test_leases_may_be_looked_at_beyond_the_end() -> None:
    leases = asynchronous(budget=40).leases(0, 1000, 0, is_endless=True)
    own = [r for r in asynchronous(budget=40).all() if r.worker == 0]
    seen = [next(leases) for _ in range(len(own) + 5)]
    assert [lease.first for lease in seen[: len(own)]] == [r.first for r in own]
    assert set(seen[len(own) :]) == {seen[len(own) - 1]}


def test_leases_of_a_later_fit_go_on_where_the_data_was() -> None:
    leases = asynchronous(first=200, budget=40).leases(0, 50, -100, is_endless=False)
    assert next(leases) == Lease(2, 0, 8)


def test_workers_that_leave_get_no_more() -> None:
    dice, rounds, left = random.Random(0), asynchronous(), set()
    rounds.begin(range(5), 0.0)
    while rounds.next_end() < math.inf:
        (ended,) = rounds.end()
        assert ended.worker not in left
        if dice.random() < 0.05:
            left.add(ended.worker)
        else:
            rounds.begin([ended.worker], ended.end)
    assert left == set(range(5))
