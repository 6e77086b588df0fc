"""The simulated world: a link to rank 0, where the servers run under a virtual clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from lightning_halos.core.cursor import Lease
from lightning_halos.core.messages import Marker, Push, ShardWritten
from lightning_halos.simulation.algorithms import simulated
from lightning_halos.simulation.cluster import SimulatedCluster
from lightning_halos.simulation.history import Event
from lightning_halos.simulation.process import SimulatedProcess
from lightning_halos.simulation.timing import Timing
from lightning_halos.training.start import Start
from lightning_halos.training.worlds.protocol import Keeper


class SimulatedWorld(SimulatedProcess):
    """This process's link to the world, and on rank 0 the world.

    Args:
        start: What the fit starts from.
        cluster: The cluster.
    """

    repeats_rounds = True

    def __init__(self, start: Start, cluster: SimulatedCluster) -> None:
        site, data, resume, vector, budget = start.site, start.data, start.resume, start.vector, start.budget
        running, offset, used = None, 0 if data is None else data.first - budget.total, 0
        if resume is not None:
            world = resume.manifest.world
            assert world is not None
            running = world["rounds"]
            if start.goes_on_in_data:
                offset = world["offset"]
            if running is not None:
                budget.total = world["base"]
                used = resume.worker.get("used", _planned(running, site.rank))
            if "model" in resume.worker:
                vector.write(resume.worker["model"])
        super().__init__(
            site.rank,
            site.topology.describe,
            site.groups,
            simulated(start.algorithm, site.topology),
            Timing(cluster, cluster.message_bytes or vector.num_elements * vector.dtype.itemsize),
            start.memory,
            vector.shapes,
            budget,
            math.inf if data is None else data.end - budget.total - offset,
            site.timeout,
            site.interrupted,
            start.saves,
            offset,
            running,
            None if resume is None else resume.globals,
        )
        self._averages_gradients = start.algorithm.averages_gradients
        self.first_round = self.make_first_round()
        self.leases: Iterator[Lease] = iter(()) if data is None else self.make_leases(data.steps_per_epoch, used)

    @property
    def keeper(self) -> Keeper | None:
        return None if self._averages_gradients else self

    @property
    def clock(self) -> Callable[[], float] | None:
        return None if self.world is None else lambda: self.virtual_seconds

    @property
    def history(self) -> list[Event]:
        """All that had happened when rank 0's present round began; after training, all. On rank 0."""
        return [] if self.world is None else self.world.seen()

    @property
    def virtual_seconds(self) -> float:
        """Virtual time at which rank 0's present round ends; after training, at which it ended."""
        return 0.0 if self.world is None else self.world.virtual_ms / 1e3

    def on_marker(self, keep: Callable[[Marker, Push], None]) -> None:
        self.client.keep = keep

    def tell(self, message: ShardWritten) -> None:
        self.client.tell(message)


def _planned(rounds: dict[str, Any], rank: int) -> int:
    """Local steps of a worker's round in a checkpoint: it has computed all of it."""
    return sum(steps for worker, _, _, _, steps, _ in rounds["running"] if worker == rank)
