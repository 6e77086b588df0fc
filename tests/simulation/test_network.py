"""The nodes under the virtual clock: who works when, on which data, and that a run that goes on goes on exactly."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_halos import SimulatedCluster
from lightning_halos.core.algorithms import Diloco, Halos
from lightning_halos.core.global_server import GlobalServer, SynchronousServer
from lightning_halos.core.local_server import LocalServer
from lightning_halos.core.messages import GlobalModel, Pull, Push
from lightning_halos.core.schedule import StepBudget
from lightning_halos.core.topology import Topology
from lightning_halos.simulation.history import Event
from lightning_halos.simulation.network import Network, Round, Work
from lightning_halos.simulation.overlap import OverlappingNetwork
from lightning_halos.simulation.region_network import RegionNetwork
from lightning_halos.simulation.synchronous_network import SynchronousNetwork
from lightning_halos.simulation.timing import Timing

CLUSTER = SimulatedCluster(
    [[10.0, 0.1], [0.2, 10.0]], [[1.0, 0.5], [0.8, 0.25, 0.9]], step_ms=100.0, record_parameters=True
)
WORKERS = 5
TIMING = Timing(CLUSTER, 1_000_000)
STEPS = TIMING.local_steps(8, dynamic=True)
DYNAMIC = Diloco(local_steps=8, dynamic_local_steps=True)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.3, momentum=0.9)


def regions(work: Work, timing: Timing = TIMING) -> Network:
    groups = Topology.build(timing.cluster.regions, 1).groups
    locals_ = [LocalServer(g.index, torch.ones(3), sgd, 3, 0.25, workers=len(g.ranks)) for g in groups]
    return RegionNetwork(
        timing, work, Halos(local_steps=8), groups, locals_, GlobalServer(torch.ones(3), sgd, servers=len(groups))
    )


def overlapping(work: Work, timing: Timing = TIMING) -> Network:
    groups = Topology.build(timing.cluster.regions, 1).groups
    locals_ = [LocalServer(g.index, torch.ones(3), sgd, 3, 0.25, workers=len(g.ranks)) for g in groups]
    above, algorithm = GlobalServer(torch.ones(3), sgd, servers=len(groups)), Halos(local_steps=8, overlap=True)
    return OverlappingNetwork(timing, work, algorithm, groups, locals_, above)


def one_server(work: Work, timing: Timing = TIMING) -> Network:
    groups = Topology.build([range(timing.cluster.num_workers)], 1).groups
    server = LocalServer(0, torch.ones(3), sgd, None, 0.25, workers=timing.cluster.num_workers)
    return RegionNetwork(timing, work, Halos(local_steps=8), groups, [server], None)


def synchronous(work: Work, timing: Timing = TIMING) -> Network:
    return SynchronousNetwork(timing, work, DYNAMIC, SynchronousServer(torch.ones(3), sgd))


Make = Callable[..., Network]
every_network = pytest.mark.parametrize("make", [regions, overlapping, one_server, synchronous])


def work(steps: int, done: int = 0, **fields: int) -> Work:
    """Work of a number of local steps, ordered as global steps if they are whole ones, else by the end of the data."""
    whole = None if (done + steps) % WORKERS else (done + steps) // WORKERS
    return Work(StepBudget(WORKERS, whole, done), done + steps, **fields)


def push_of(ending: Round, model: Tensor | None) -> Push:
    """What a worker pushes that got a model: a pseudo-gradient that depends on both."""
    if not ending.steps:
        return Push(ending.worker, 0, 0, 0, 0.0, final=True)
    assert model is not None
    vector = 0.1 * ending.steps * (model - torch.tensor([0.3, -0.2, 0.1]) * ending.worker)
    return Push(ending.worker, 0, ending.steps, ending.steps, 0.0, vector=vector)


class Driver:
    """Workers that compute, and what they were told."""

    def __init__(self, network: Network, models: dict[int, Tensor] | None = None) -> None:
        self.network = network
        self.models = models or {worker: torch.ones(3) for worker in range(WORKERS)}
        self.pulls: list[Pull] = []
        self.finals: dict[int, GlobalModel] = {}

    def run(self, before: Callable[[list[Round]], None] = lambda due: None) -> Driver:
        self.network.start()
        while due := self.network.due():
            self.take()
            before(due)
            self.network.finish([push_of(ending, self.models[ending.worker]) for ending in due])
            self.take()
        self.take()
        return self

    def take(self) -> None:
        """Takes what is for the workers."""
        for rank, message in self.network.outbox:
            if isinstance(message, Pull):
                self.pulls.append(message)
                if message.vector is not None:
                    self.models[rank] = message.vector.clone()
            elif isinstance(message, GlobalModel):
                self.finals[rank] = message
        self.network.outbox = []


def counted(network: Network) -> list[dict[str, Any]]:
    """The counters, without traffic: of the bytes of a last update there may be a report after it or not."""
    return [{name: value for name, value in s.items() if "bytes" not in name} for s in network.statistics()]


def described(history: list[Event]) -> list[dict[str, Any]]:
    return [{**vars(e), "parameters": None if e.parameters is None else e.parameters.tolist()} for e in history]


@every_network
@pytest.mark.parametrize("budget", [1, 4, 5, 31, 100, 1003])
def test_exactly_the_ordered_steps_are_handed_out_in_contiguous_ranges(make: Make, budget: int) -> None:
    rounds = list(make(work(budget, done=7)).replay())
    assert rounds[0].first == 7
    for earlier, later in itertools.pairwise(rounds):
        assert later.first == earlier.first + earlier.steps
    assert sum(r.steps for r in rounds) == budget
    assert all(0 < r.steps <= STEPS[r.worker] for r in rounds)


@every_network
@pytest.mark.parametrize("budget", [31, 100])
def test_the_rounds_are_the_same_with_and_without_vectors(make: Make, budget: int) -> None:
    seen: dict[tuple[int, int], Round] = {}
    driver = Driver(make(work(budget))).run(lambda due: seen.update({(r.first, r.worker): r for r in due if r.steps}))
    assert sorted(seen.values(), key=lambda r: r.first) == list(make(work(budget)).replay())
    assert driver.network.finished
    assert driver.network.steps == budget
    assert driver.finals.keys() == set(range(WORKERS))
    assert driver.network.history[-1].kind == "end"


@every_network
def test_pulls_say_what_the_rounds_are(make: Make) -> None:
    network = make(work(100))
    driver = Driver(network)

    def look(due: list[Round]) -> None:
        for pull, ending in itertools.product(driver.pulls[-1:], due[-1:]):
            if not pull.stop and len(network.rounds) == 1:
                assert (pull.local_steps, pull.position) == (ending.steps, ending.position)

    driver.run(look)
    assert sum(pull.stop for pull in driver.pulls) == WORKERS


def test_a_round_takes_its_messages_and_its_steps() -> None:
    network = regions(work(math.inf))  # type: ignore[arg-type]
    network.start()
    assert network.rounds[3].end == pytest.approx(2 * 0.8 + 100 * 2 / 0.25, abs=1e-4)


def test_the_next_round_of_a_worker_begins_when_its_last_one_ends() -> None:
    last: dict[int, float] = {}
    for r in regions(work(500)).replay():
        assert r.begin == last.get(r.worker, 0.0)
        last[r.worker] = r.end


def test_rounds_end_in_the_order_of_time_and_those_at_the_same_moment_by_rank() -> None:
    even = Timing(SimulatedCluster([[10.0]], [[1.0] * 5], step_ms=100.0), 1000)
    network = one_server(work(400), even)
    network.start()
    ended = []
    for _ in range(5):
        (due,) = network.due()
        ended.append(due.worker)
        network.finish([push_of(due, torch.ones(3))])
    assert ended == [0, 1, 2, 3, 4]


def test_synchronous_rounds_wait_for_the_slowest_and_for_the_exchange() -> None:
    cluster = SimulatedCluster(CLUSTER.bandwidths, [[1.0, 0.5], [0.8, 0.25, 0.9]], step_ms=100.0)
    timing = Timing(cluster, 1_000_000)
    network = SynchronousNetwork(timing, work(10_000), Diloco(local_steps=8), SynchronousServer(torch.ones(3), sgd))
    network.start()
    due = network.due()
    assert [r.end for r in due] == [pytest.approx(100 * 8 / 0.25 + timing.all_reduce())] * WORKERS
    assert {r.position for r in due} == {0}
    network.finish([push_of(ending, torch.ones(3)) for ending in due])
    assert {r.position for r in network.rounds.values()} == {8}


@every_network
def test_positions_follow_what_was_handed_out(make: Make) -> None:
    assert all(r.position == r.first // WORKERS for r in make(work(300)).replay() if r.first < 200)


def test_durations_of_a_push_are_virtual_ones() -> None:
    driver = Driver(regions(work(300))).run()
    shares = {rank: s for server in driver.network.statistics() for rank, s in server["compute_share"].items()}
    for rank, region in enumerate(CLUSTER.region_of):
        computing, complete = TIMING.compute(rank, STEPS[rank]), TIMING.round(rank, region, STEPS[rank])
        assert shares[rank] == pytest.approx(computing / complete, rel=0.01)


def test_bytes_are_counted_where_they_travel() -> None:
    driver = Driver(regions(work(300))).run()
    one, other = driver.network.statistics()
    pushes = [e.server for e in driver.network.history if e.kind == "push"]
    assert one["bytes_between_regions"] == 0
    assert other["bytes_within_regions"] == 2_000_000 * pushes.count(1)
    sent = [e for e in driver.network.history if e.kind == "update" and e.server == 1]
    assert other["bytes_between_regions"] == pytest.approx(2_000_000 * len(sent), abs=4_000_000)


def test_an_update_that_is_not_applied_has_no_staleness() -> None:
    """A last update may be empty, because everything was sent before."""
    updates = [
        e for n in range(50, 350, 3) for e in Driver(regions(work(n))).run().network.history if e.kind == "update"
    ]
    same_version = [(a, b) for a, b in itertools.pairwise(updates) if a.version == b.version]
    assert any(applied.staleness for applied, _ in same_version)
    assert {empty.staleness for _, empty in same_version} == {0}


def test_what_rank_0_publishes_is_in_the_next_pulls() -> None:
    driver = Driver(regions(work(100)))
    told: set[int] = set()

    def publish(due: list[Round]) -> None:
        if due[0].worker == 0 and not told:
            told.add(len(driver.pulls))
            driver.network.publish([(0, 0.5)], {"loss": 2.0})

    driver.run(publish)
    (before,) = told
    assert not any(pull.plateau_steps or pull.metrics for pull in driver.pulls[:before])
    assert sum(len(pull.plateau_steps) for pull in driver.pulls[before:]) == WORKERS
    assert all(pull.metrics == {"loss": 2.0} for pull in driver.pulls[before:])


@every_network
def test_a_worker_that_stops_ends_the_run(make: Make) -> None:
    driver = Driver(make(work(10_000)))
    driver.network.start()
    for number in itertools.count():
        if not (due := driver.network.due()):
            break
        driver.take()
        pushes = [push_of(ending, driver.models[ending.worker]) for ending in due]
        if number == 7:
            pushes[0].stop = pushes[0].final = True
        driver.network.finish(pushes)
        driver.take()
    assert driver.network.finished
    assert all(final.stopped for final in driver.finals.values())
    assert driver.network.steps < 500


@every_network
@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_goes_on_from_any_moment_of_rank_0_ends_as_if_it_had_not_stopped(make: Make, seed: int) -> None:
    dice = random.Random(seed)
    speeds = [[dice.uniform(0.2, 1) for _ in region] for region in CLUSTER.regions]
    timing = Timing(dataclasses.replace(CLUSTER, worker_speeds=speeds), dice.choice([1_000_000, 30_000_000]))
    ordered = work(dice.choice([200, 223]), steps_per_epoch=31, offset=0)
    moments: list[tuple[Any, Any, dict[int, Tensor], int]] = []
    whole = Driver(make(ordered, timing))

    def keep(due: list[Round]) -> None:
        if due[0].worker == 0:
            network = whole.network
            models = {rank: model.clone() for rank, model in whole.models.items()}
            moments.append((network.state_dict(), network.schedule(), models, len(network.history)))

    whole.run(keep)
    expected = described(whole.network.history)
    assert len(moments) > 5
    for state, schedule, models, seen in moments:
        network = make(ordered, timing)
        network.load_state_dict(state)
        network.load_schedule(schedule)
        driver = Driver(network, models).run()
        assert described(network.history) == expected[seen:]
        assert driver.finals.keys() == set(range(WORKERS))
        assert driver.finals[0].position == whole.finals[0].position
        assert counted(network) == counted(whole.network)
        replayed = make(ordered, timing)
        replayed.load_schedule(schedule)
        handed = [r for r in replayed.replay() if r.first >= schedule["next"]]
        assert sum(r.steps for r in handed) == ordered.end - schedule["next"]
