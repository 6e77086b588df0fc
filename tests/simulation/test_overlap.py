"""When workers that train on while their pushes are answered begin, end, and load the answers."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_halos import SimulatedCluster
from lightning_halos.core.algorithms import Halos
from lightning_halos.core.messages import Pull, Push
from lightning_halos.core.schedule import StepBudget
from lightning_halos.core.topology import Topology
from lightning_halos.simulation.network import Network, Work
from lightning_halos.simulation.networks import make_network
from lightning_halos.simulation.timing import Timing

WAY = 80.0  # milliseconds of a model on the 10 Gbit/s between a worker and its server
CLUSTER = SimulatedCluster([[10.0]], [[1.0, 1.0]], step_ms=20.0, message_bytes=100_000_000)


def network(local_steps: int, steps: int = 1000) -> Network:
    topology = Topology.build(CLUSTER.regions, 1)
    work = Work(StepBudget(2, steps // 2), steps)
    algorithm = Halos(local_steps=local_steps, overlap=True)
    return make_network(algorithm, topology, Timing(CLUSTER, 100_000_000), work, [torch.Size([0])], torch.empty(0))


@pytest.mark.parametrize(
    ("local_steps", "duration", "batches"),
    [(20, 400.0, 8), (8, 160.0, 8), (3, 2 * WAY, 3)],
    ids=["computing takes longer", "both take equally long", "a push and its answer take longer"],
)
def test_a_round_lasts_as_long_as_what_takes_longer(local_steps: int, duration: float, batches: int) -> None:
    simulated, arrivals, answers = network(local_steps), list[float](), list[Pull]()
    simulated.start()
    while len(arrivals) < 10:
        (due,) = simulated.due()
        simulated.finish([Push(due.worker, 0, due.steps, due.steps, 0.0, vector=torch.empty(0))])
        if due.worker == 0:
            arrivals.append(due.end)
            answers += [pull for rank, pull in simulated.outbox if rank == 0 and isinstance(pull, Pull)]
        simulated.outbox.clear()
    first = local_steps * CLUSTER.step_ms + WAY  # which waits for no answer
    assert arrivals == pytest.approx([first + number * duration for number in range(10)])
    # The answer is there 160 ms after the push: after 8 batches of 20 ms, or at the end of the round that waits for it.
    assert [pull.batches for pull in answers] == [batches] * 10


def test_workers_that_wait_for_answers_say_so() -> None:
    simulated = network(local_steps=3, steps=60)
    for _ in simulated.replay():
        pass
    (server,) = simulated.statistics()
    # 60 of 160 ms, except in the first round.
    assert server["compute_share"][0] == pytest.approx(60 / 160, abs=0.1)


def test_a_worker_without_more_work_is_told_so_with_its_last_answer() -> None:
    simulated, stops = network(local_steps=4, steps=20), list[bool]()
    simulated.start()
    while due := simulated.due():
        (ending,) = due
        has_steps = ending.steps > 0
        vector = torch.empty(0) if has_steps else None
        push = Push(ending.worker, 0, ending.steps, ending.steps, 0.0, final=not has_steps, vector=vector)
        simulated.finish([push])
        stops += [pull.stop for _, pull in simulated.outbox if isinstance(pull, Pull)]
        simulated.outbox.clear()
    assert simulated.finished
    assert simulated.steps == 20
    assert (stops.count(True), stops[-1]) == (2, True)
    assert simulated.now < math.inf
