"""The real world of synchronous algorithms: collectives over all workers instead of servers and links.

Nothing is decided here: each process has a replica of :class:`~lightning_halos.core.synchronous_node.SynchronousNode`,
and the collectives give all replicas the same pushes. Checkpoints only contain the model, and no state of the server.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from lightning_halos.core.algorithms import SynchronousAlgorithm
from lightning_halos.core.cursor import Lease, split
from lightning_halos.core.messages import GlobalModel, Pull, Push
from lightning_halos.core.synchronous_node import SynchronousNode
from lightning_halos.core.vector import Fill, ignore_progress
from lightning_halos.core.worker import WorkerRound
from lightning_halos.training.lane_findings import slice_of
from lightning_halos.training.shared_data import SharedData
from lightning_halos.training.start import Start
from lightning_halos.training.worlds.protocol import World
from lightning_halos.transport.alarm import Alarm

T = TypeVar("T")


class LockstepWorld(World):
    """This process's replica of the server, and its collectives. It is its worker's client, too.

    Args:
        start: The state from which the fit starts.
    """

    answer: Pull | None = None

    def __init__(self, start: Start) -> None:
        site, algorithm, budget = start.site, start.algorithm, start.budget
        assert isinstance(algorithm, SynchronousAlgorithm)
        assert start.memory is not None
        self._site = site
        self._steps_before = budget.total
        self._planner = algorithm.planner(site.size, budget.max_steps)
        server = algorithm.server(start.memory.clone(), start.vector.shapes)
        if server is not None:
            server.num_teachers = start.vector.num_teachers
            slice_of(site)(server)
        self._node = SynchronousNode(server, self._planner, budget)
        self._collectives = site.collectives_of_a_fit()
        lanes = site.worker_processes[: site.lanes]
        self._lanes = site.collectives_among(lanes) if len(lanes) > 1 else None
        self._published: tuple[list[tuple[int, float]], dict[str, float]] = ([], {})  # on rank 0, for the next round
        self.alarm = Alarm(site.here)
        local_steps = self._planner.local_steps(site.rank, budget.total)
        self.first_round = WorkerRound(site.rank, local_steps, start.trainer.global_step)
        self.leases = iter(()) if start.data is None else self._leases(start.data)
        self.client = self

    @property
    def has_global_model(self) -> bool:
        return self._site.rank == 0

    @property
    def version(self) -> int:
        return self._node.version

    @property
    def steps(self) -> int:
        return self._node.budget.total - self._steps_before

    def read(self, out: Tensor) -> None:
        out.copy_(self._model)

    def publish(self, plateau_steps: Sequence[tuple[int, float]], metrics: dict[str, float], callbacks: str) -> None:
        self._published = ([*self._published[0], *plateau_steps], metrics)

    @property
    def rejected(self) -> int:
        server = self._node.server
        return 0 if server is None else server.rejected

    def close(self, timeout: float) -> None:
        pass

    def exchange(self, push: Push, fill: Fill) -> tuple[Pull, Iterable[int]]:
        assert push.vector is not None
        fill(ignore_progress)
        pull = self._take_part(push)
        assert isinstance(pull, Pull)
        pull.vector = push.vector.copy_(self._model)
        return pull, [self._model.numel()]

    def send(self, push: Push, fill: Fill) -> None:
        raise NotImplementedError("Synchronous rounds end together, so no worker trains on meanwhile.")

    def has_answer(self, batches: int) -> bool:
        return False

    def take(self) -> Pull:
        raise NotImplementedError("A synchronous round has no answer that is still missing.")

    def finish(self, push: Push, fill: Fill) -> tuple[GlobalModel, Iterable[int]]:
        if push.vector is not None:
            fill(ignore_progress)
        while not isinstance(final := self._take_part(push), GlobalModel):
            push = Push(self._site.rank, push.version, 0, 0, 0.0, final=True)
        return final, [self._model.numel()]

    @property
    def _model(self) -> Tensor:
        assert self._node.model is not None
        return self._node.model

    def _leases(self, data: SharedData) -> Iterator[Lease]:
        """Yields the data to train on, of which the workers' store counts what is leased."""
        while True:
            wanted = self._planner.known_steps(self._site.rank)
            start = data.first + self._count(wanted) - wanted
            if start >= data.end:
                return
            yield from split(start, int(min(wanted, data.end - start)), data.steps_per_epoch)

    def _count(self, steps: int) -> int:
        """Adds to the data that is leased, and returns the sum. The lanes of a worker count together."""
        leased = self._collectives.count("leased", steps) if self._site.lane == 0 else 0
        return self._of_lane_0(leased)

    def _of_lane_0(self, value: T) -> T:
        """Returns lane 0's value in all lanes of this worker, whose replicas of the server stay equal by that."""
        return value if self._lanes is None else cast(T, self._lanes.broadcast_object(value))

    def _take_part(self, push: Push) -> Pull | GlobalModel | None:
        """Takes part in a round. Returns this worker's answer, ``None`` if it has finished and others have not."""
        mine = self._of_lane_0([push.steps, push.batches, push.seconds, push.stop, push.final, push.vector is not None])
        table = self._collectives.all_gather(torch.tensor([float(entry) for entry in mine], dtype=torch.float64))
        pushes = [
            Push(rank, push.version, int(steps), int(batches), seconds, stop=stop > 0, final=final > 0)
            for rank, (steps, batches, seconds, stop, final, _) in enumerate(table.tolist())
        ]
        mean, vectors = None, float(table[:, -1].sum())
        if vectors:
            gift = torch.zeros_like(self._model) if push.vector is None else push.vector
            mean = self._collectives.sum_(gift) / vectors
        plateau_steps, metrics = self._of_lane_0(self._collectives.broadcast_object(list(self._published)))
        self._published = ([], metrics)
        self._node.publish(plateau_steps, metrics)
        return self._node.finish_round(pushes, mean).get(self._site.rank)
