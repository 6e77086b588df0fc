"""The real world of synchronous algorithms: collectives over all workers, and no links.

Every process has a replica of the server. Checkpoints only contain the model, and no state of the server.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from lightning_halos.core.algorithms import SynchronousAlgorithm
from lightning_halos.core.cursor import Lease
from lightning_halos.core.synchronous_node import SynchronousNode
from lightning_halos.core.worker import WorkerRound
from lightning_halos.training.start import Start
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.lockstep import LockstepClient


class LockstepWorld:
    """This process's replica of the server, and its collectives.

    Args:
        start: The state from which the fit starts.
    """

    checkpointed = None
    is_simulated = False
    clock = None

    def __init__(self, start: Start) -> None:
        site, algorithm, data, budget = start.site, start.algorithm, start.data, start.budget
        assert isinstance(algorithm, SynchronousAlgorithm)
        assert start.memory is not None
        planner = algorithm.planner(site.size, budget.max_steps)
        node = SynchronousNode(algorithm.server(start.memory.clone(), start.vector.shapes), planner, budget)
        self.alarm = Alarm(site.here)
        self._steps_before = budget.total
        self.client = LockstepClient(site.rank, site.collectives_of_a_fit(), node, planner, site.timeout)
        self.has_global_model = site.rank == 0
        local_steps = planner.local_steps(site.rank, budget.total)
        self.first_round = WorkerRound(site.rank, local_steps, start.trainer.global_step)
        self.leases: Iterator[Lease] = iter(())
        if data is not None:
            self.leases = self.client.leases(data.steps_per_epoch, data.first, data.end)

    @property
    def version(self) -> int:
        return self.client.node.version

    @property
    def steps(self) -> int:
        return self.client.node.budget.total - self._steps_before

    def read(self, out: Tensor) -> None:
        out.copy_(self.client.model)

    def publish(self, plateau_steps: Sequence[tuple[int, float]], metrics: dict[str, float]) -> None:
        self.client.published = ([*self.client.published[0], *plateau_steps], metrics)

    def statistics(self) -> list[dict[str, Any]]:
        return []

    def close(self, timeout: float) -> None:
        pass
