"""The pace is that of a long plan, at a cost that does not depend on how fast the cluster is."""

from __future__ import annotations

import random
import time
import tracemalloc

import pytest

from lightning_halos.core.algorithms import Algorithm, AsyncLocalSGD, Diloco, Halos, SyncSGD
from lightning_halos.planning.pace import pace_of
from lightning_halos.planning.planner import make_timing, plan
from lightning_halos.simulation.cluster import SimulatedCluster


def draw(seed: int, server_gigabytes_per_second: float | None) -> tuple[Algorithm, SimulatedCluster]:
    """A random cluster, and an algorithm for it."""
    rng = random.Random(seed)
    regions = rng.randint(1, 3)
    cluster = SimulatedCluster(
        [[10 ** rng.uniform(0, 1.5 if a == b else 0.5) for b in range(regions)] for a in range(regions)],
        [[rng.uniform(0.1, 1.0) for _ in range(rng.randint(1, 4))] for _ in range(regions)],
        step_ms=rng.uniform(20, 200),
        message_bytes=int(10 ** rng.uniform(6, 8)),
        server_gigabytes_per_second=server_gigabytes_per_second,
    )
    common = {"local_steps": rng.randint(1, 8), "dynamic_local_steps": rng.random() < 0.5}
    servers = {**common, "overlap": rng.random() < 0.5, "wire": rng.choice(["float32", "int4"])}
    return rng.choice([Halos(**servers), AsyncLocalSGD(**servers), Diloco(**common), SyncSGD()]), cluster


@pytest.mark.parametrize(("speed", "tolerance"), [(None, 1e-9), (2.0, 0.01), (0.1, 0.01)])
def test_it_is_that_of_a_plan_of_some_hours(speed: float | None, tolerance: float) -> None:
    """With servers that take time, too, up to those that are slower than their workers."""
    for seed in range(40):
        algorithm, cluster = draw(seed, speed)
        timing = make_timing(cluster)
        planned = plan(algorithm, timing, 2)
        duration = planned.round_ms.sum(axis=1)
        seconds = 1 / float((planned.local_steps / duration).mean()) / 1e3
        pace = pace_of(algorithm, timing)
        whole = pace.step + pace.round_end / pace.round_steps  # both, for synchronous rounds
        assert whole == pytest.approx(seconds, rel=tolerance), (seed, algorithm)


@pytest.mark.parametrize("speed", [None, 100.0])
def test_it_takes_no_longer_for_a_fast_cluster(speed: float | None) -> None:
    cluster = SimulatedCluster(
        [[100.0, 1.0], [1.0, 100.0]],
        [[1.0] * 32] * 2,
        step_ms=1,
        message_bytes=100_000,
        server_gigabytes_per_second=speed,
    )
    timing = make_timing(cluster)
    tracemalloc.start()
    try:
        begin = time.process_time()
        pace_of(Halos(local_steps=1), timing)
        assert time.process_time() - begin < 5
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


def test_it_is_there_for_rounds_that_take_days() -> None:
    cluster = SimulatedCluster([[1.0]], [[1.0, 0.5]], step_ms=1e9, message_bytes=1000)
    assert pace_of(Halos(local_steps=2), make_timing(cluster)).step == pytest.approx(1e6 * 2 / 1.5, rel=1e-3)
