"""Compares what the check of stability says with what happens in simulations, for random clusters and settings.

The simulations have the nodes of a run, and workers that make noisy steps on quadratics. The workers' speeds differ by
a few percent from those that the check is told::

    python -m tests.planning.quadratics --settings 100
"""

from __future__ import annotations

import argparse
import dataclasses
import random
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from lightning_halos.core.algorithms import AsyncLocalSGD, Halos, ServerAlgorithm
from lightning_halos.core.delayed_nesterov import DelayedNesterov
from lightning_halos.core.messages import Pull, Push
from lightning_halos.core.schedule import StepBudget
from lightning_halos.planning.planner import make_timing
from lightning_halos.planning.stability import TOLERANCE, events_of, growth, servers_of
from lightning_halos.simulation.cluster import SimulatedCluster
from lightning_halos.simulation.network import Work
from lightning_halos.simulation.networks import make_network

RATES = np.array([0.05, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 1.95])
ROUNDS = 160
START, NOISE = 1e-100, 1e-103  # of the errors, so small that what diverges stays finite
NEAR = 0.02  # difference of a growth per round from 1 that the noise and the other speeds may hide


def nesterov(lr: float, momentum: float = 0.0, delay: int = 1, activation: float = 0.0) -> Any:
    return partial(DelayedNesterov, lr=lr, momentum=momentum, delay=delay, activation=activation)


class Outcome(NamedTuple):
    factors: Any  # growth per round that the check computes, by rate
    grown: Any  # whether errors grew in the simulation

    @property
    def is_unstable(self) -> Any:
        """What the check says."""
        return self.factors > 1 + TOLERANCE

    @property
    def is_near(self) -> Any:
        """Whether it is close to the limit."""
        return abs(self.factors - 1) < NEAR


def draw(seed: int) -> tuple[ServerAlgorithm, SimulatedCluster]:
    """A random cluster and random settings, of which about half are stable."""
    rng = random.Random(seed)
    regions = rng.randint(1, 3)
    cluster = SimulatedCluster(
        [[10 ** rng.uniform(-0.5, 1.5 if a == b else 0.5) for b in range(regions)] for a in range(regions)],
        [[rng.uniform(0.3, 1.0) for _ in range(rng.randint(1, 3))] for _ in range(regions)],
        step_ms=100,
        message_bytes=int(10 ** rng.uniform(6, 8)),
        global_region=rng.randrange(regions),
    )

    def optimizer(senders: float) -> Any:
        delay = rng.choice([1, 1, 2, 4, 8])
        activation = rng.choice([0, 0, rng.uniform(0, 1 / delay)])
        return nesterov(rng.uniform(0.2, 2.0) / senders, rng.choice([0, rng.uniform(0, 0.95)]), delay, activation)

    common: dict[str, Any] = {
        "local_steps": rng.randint(1, 6),
        "dynamic_local_steps": rng.random() < 0.7,
        "overlap": rng.random() < 0.3,
    }
    if rng.random() < 0.15:
        return AsyncLocalSGD(**common, optimizer=optimizer(cluster.num_workers)), cluster
    return (
        Halos(
            **common,
            accumulate_updates=rng.randint(1, 12),
            merge_weight=rng.uniform(0.05, 1.0),
            local_optimizer=optimizer(cluster.num_workers / regions),
            global_optimizer=optimizer(regions),
        ),
        cluster,
    )


def simulate(algorithm: ServerAlgorithm, cluster: SimulatedCluster, seed: int) -> Any:
    """Whether errors grow, by rate, with the nodes of a run and workers that make noisy steps on quadratics."""
    timing, number = make_timing(cluster), len(RATES)
    topology = algorithm.arrange(cluster.regions, cluster.names, cluster.global_region)
    made = torch.Generator().manual_seed(seed)
    rates = torch.from_numpy(RATES)
    start = torch.full((number,), START, dtype=torch.float64)
    network = make_network(
        algorithm, topology, timing, Work(StepBudget(cluster.num_workers)), [torch.Size([number])], start
    )
    network.start()
    pulled = [start.clone() for _ in range(cluster.num_workers)]
    version = [0] * cluster.num_workers
    model: list[torch.Tensor | None] = [None] * cluster.num_workers  # with overlap: that of the unanswered push

    def step(w: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(number, generator=made, dtype=torch.float64)
        return w - rates * (w + NOISE * noise)

    squares, pushes = [], ROUNDS * cluster.num_workers
    for _ in range(pushes):
        (r,) = network.due()
        region = topology.groups[topology.group_of(r.worker).index].region
        base, pushed = pulled[r.worker], model[r.worker]
        w = base if pushed is None else pushed
        answered = 2 * timing.way(r.worker, region)
        for batch in range(1, r.steps + 1):
            w = step(w)
            ends = batch * timing.compute(r.worker, 1) >= answered or batch == r.steps
            if pushed is not None and ends:
                w, pushed = w + base - pushed, None
        if algorithm.overlap:
            model[r.worker] = w
        network.finish([Push(r.worker, version[r.worker], r.steps, r.steps, 1.0, vector=base - w)])
        for worker, message in network.outbox:
            if isinstance(message, Pull):
                assert message.vector is not None
                pulled[worker], version[worker] = message.vector.clone(), message.version
        network.outbox.clear()
        squares.append(pulled[r.worker].numpy() ** 2)
    second, last = (np.mean(squares[start * pushes // 4 : (start + 1) * pushes // 4], axis=0) for start in (1, 3))
    return (last > 2 * second) & (last > (100 * NOISE) ** 2)


def compare(seed: int) -> Outcome:
    """The check's word on a cluster, and what happens on one whose workers' speeds are a few percent different."""
    algorithm, cluster = draw(seed)
    timing = make_timing(cluster)
    factors = growth(events_of(algorithm, timing), servers_of(algorithm, timing), RATES)
    return Outcome(factors, simulate(algorithm, resembling(algorithm, cluster, random.Random(seed)), seed))


def resembling(algorithm: ServerAlgorithm, cluster: SimulatedCluster, rng: random.Random) -> SimulatedCluster:
    """Returns a cluster with slightly different speeds, but the same local steps per round."""

    def steps(one: SimulatedCluster) -> list[int]:
        return make_timing(one).local_steps(algorithm.local_steps, algorithm.dynamic_local_steps)

    while True:
        speeds = [[speed * rng.uniform(0.97, 1.03) for speed in own] for own in cluster.worker_speeds]
        other = dataclasses.replace(cluster, worker_speeds=speeds)
        if steps(other) == steps(cluster):
            return other


def summary(outcomes: list[Outcome]) -> dict[str, int]:
    """Counts pairs of settings and a rate."""
    unstable = np.concatenate([outcome.is_unstable for outcome in outcomes])
    near = np.concatenate([outcome.is_near for outcome in outcomes])
    wrong = unstable != np.concatenate([outcome.grown for outcome in outcomes])
    return {
        "in all": len(wrong),
        "called unstable": int(unstable.sum()),
        "called stable, but diverging": int((wrong & ~unstable).sum()),
        "called unstable, but not diverging": int((wrong & unstable).sum()),
        f"wrong although the growth per round is more than {NEAR} from 1": int((wrong & ~near).sum()),
        "settings with both": sum(0 < outcome.is_unstable.sum() < len(RATES) for outcome in outcomes),
    }


def main() -> None:
    """Prints the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=int, default=100)
    settings = parser.parse_args().settings
    torch.set_num_threads(1)
    print(f"{settings} random settings, each with {len(RATES)} inner rates from {RATES[0]:g} to {RATES[-1]:g}:")
    for name, count in summary([compare(seed) for seed in range(settings)]).items():
        print(f"{count:6}  {name}")


if __name__ == "__main__":
    main()
