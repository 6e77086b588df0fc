"""Synchronous rounds in real processes: collectives over all workers instead of servers and links.

Nothing is decided here: each process has a replica of :class:`~lightning_halos.core.synchronous_node.SynchronousNode`,
and the collectives give all replicas the same pushes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from lightning_halos.core.cursor import Lease, split
from lightning_halos.core.messages import GlobalModel, Pull, Push
from lightning_halos.core.schedule import RoundPlanner
from lightning_halos.core.synchronous_node import SynchronousNode
from lightning_halos.core.vector import Advance, ignore_progress
from lightning_halos.transport.collectives import Collectives


class LockstepClient:
    """The worker's end of synchronous rounds.

    Args:
        rank: Global rank of the worker.
        collectives: Collectives over all workers.
        node: This process's replica of the server.
        planner: Decides the workers' local steps.
        timeout: Seconds to wait for the store that counts leases.

    Attributes:
        node: The replica.
        published: On rank 0: plateau steps and metrics to send to the other workers in the next round.
    """

    def __init__(
        self, rank: int, collectives: Collectives, node: SynchronousNode, planner: RoundPlanner, timeout: float
    ) -> None:
        self.node = node
        self.published: tuple[list[tuple[int, float]], dict[str, float]] = ([], {})
        self._rank = rank
        self._collectives = collectives
        self._planner = planner
        self._timeout = timeout

    @property
    def model(self) -> Tensor:
        """The global model."""
        assert self.node.model is not None
        return self.node.model

    def exchange(self, push: Push, fill: Callable[[Advance], object]) -> tuple[Pull, Iterable[int]]:
        """Takes part in a round; see :meth:`WorkerClient.exchange`.

        Raises:
            PeerLostError: If a worker has ended, or did not arrive in time.
        """
        assert push.vector is not None
        fill(ignore_progress)
        pull = self._take_part(push)
        assert isinstance(pull, Pull)
        pull.vector = push.vector.copy_(self.model)
        return pull, [self.model.numel()]

    def finish(self, push: Push, fill: Callable[[Advance], object]) -> tuple[GlobalModel, Iterable[int]]:
        """Takes part in rounds until all workers have finished; see :meth:`WorkerClient.finish`.

        Raises:
            PeerLostError: If a worker has ended, or did not arrive in time.
        """
        if push.vector is not None:
            fill(ignore_progress)
        while not isinstance(final := self._take_part(push), GlobalModel):
            push = Push(self._rank, push.version, 0, 0, 0.0, final=True)
        return final, [self.model.numel()]

    def leases(self, steps_per_epoch: int, first: int, end: float) -> Iterator[Lease]:
        """Yields the data to train on.

        Args:
            steps_per_epoch: Data of an epoch, in local steps.
            first: Start of this run's data, in local steps from the start of the first epoch.
            end: End of this run's data, in local steps from the start of the first epoch; may be infinite.

        Raises:
            PeerLostError: If the store does not answer in time.
        """
        while True:
            wanted = self._planner.known_steps(self._rank)
            start = first + self._collectives.count("leased", wanted, self._timeout) - wanted
            if start >= end:
                return
            yield from split(start, int(min(wanted, end - start)), steps_per_epoch)

    def _take_part(self, push: Push) -> Pull | GlobalModel | None:
        """Takes part in a round. Returns this worker's answer, ``None`` if it has finished and others have not."""
        mine = [push.steps, push.batches, push.seconds, push.stop, push.final, push.vector is not None]
        table = self._collectives.all_gather(torch.tensor([float(entry) for entry in mine], dtype=torch.float64))
        pushes = [
            Push(rank, push.version, int(steps), int(batches), seconds, stop=stop > 0, final=final > 0)
            for rank, (steps, batches, seconds, stop, final, _) in enumerate(table.tolist())
        ]
        mean, vectors = None, float(table[:, -1].sum())
        if vectors:
            gift = torch.zeros_like(self.model) if push.vector is None else push.vector
            mean = self._collectives.sum_(gift) / vectors
        plateau_steps, metrics = self._collectives.broadcast_object(list(self.published))
        self.published = ([], metrics)
        self.node.publish(plateau_steps, metrics)
        return self.node.finish_round(pushes, mean).get(self._rank)
