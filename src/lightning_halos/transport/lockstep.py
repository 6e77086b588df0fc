"""Synchronous rounds in real processes: collectives over all workers instead of servers and links.

Rules of this room: every worker computes the same from what the collectives bring, so that there is nothing to decide
and nobody to ask. It offers what :class:`~lightning_halos.transport.process.Process` offers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_halos.core.cursor import Lease, split
from lightning_halos.core.messages import GlobalModel, Pull, Push
from lightning_halos.core.schedule import RoundPlanner, StepBudget
from lightning_halos.core.servers import SynchronousServer
from lightning_halos.core.vector import Reach, nobody
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.collectives import Collectives
from lightning_halos.transport.link import Filled


class LockstepClient:
    """The worker's end of synchronous rounds. Every process has the server, and all of them stay equal.

    Args:
        rank: Global rank of the worker.
        collectives: Collectives over all workers.
        server: The server of the rounds.
        budget: The step budget.
        planner: Decides the workers' local steps.
        timeout: Seconds to wait for the store that counts the data.
    """

    def __init__(
        self,
        rank: int,
        collectives: Collectives,
        server: SynchronousServer,
        budget: StepBudget,
        planner: RoundPlanner,
        timeout: float,
    ) -> None:
        self.server = server
        self.budget = budget
        self.published: tuple[list[tuple[int, float]], dict[str, float]] = ([], {})
        self._rank = rank
        self._collectives = collectives
        self._planner = planner
        self._timeout = timeout
        self._stopped = False

    def exchange(self, push: Push, fill: Callable[[Reach], object]) -> tuple[Pull, Filled]:
        """Takes part in a round; see :meth:`WorkerClient.exchange`.

        Raises:
            PeerLostError: If a worker has ended, or did not arrive in time.
        """
        assert push.vector is not None
        fill(nobody)
        vector = push.vector
        self._take_part(push, vector)
        vector.copy_(self.server.model)
        plateaus, metrics = self._collectives.broadcast_object(list(self.published))
        self.published = ([], metrics)
        steps = self._planner.local_steps(self._rank, self.budget.total)
        stop = self._stopped or self.budget.exhausted
        pull = Pull(self.server.version, steps, self.budget.position, stop, plateaus, metrics, vector)
        return pull, [vector.numel()]

    def finish(self, push: Push, fill: Callable[[Reach], object]) -> tuple[GlobalModel, Filled]:
        """Takes part in rounds until all workers have finished; see :meth:`WorkerClient.finish`.

        Raises:
            PeerLostError: If a worker has ended, or did not arrive in time.
        """
        if push.vector is not None:
            fill(nobody)
        while not self._take_part(push, push.vector):
            self._collectives.broadcast_object(list(self.published))
            push = Push(self._rank, push.version, 0, 0, 0.0, final=True)
        final = GlobalModel(self.server.version, True, self._stopped, self.budget.position, self.server.model)
        return final, [self.server.model.numel()]

    def leases(self, steps_per_epoch: int, first: int, end: float) -> Iterator[Lease]:
        """Yields the data to train on.

        Args:
            steps_per_epoch: Local steps' worth of data in an epoch.
            first: Local steps' worth of data before this run, from the first epoch's beginning.
            end: Local steps' worth of data at which to end, from the first epoch's beginning; may be infinite.

        Raises:
            PeerLostError: If the store does not answer in time.
        """
        while True:
            wanted = self._planner.known_steps(self._rank)
            start = first + self._collectives.count("leased", wanted, self._timeout) - wanted
            if start >= end:
                return
            yield from split(start, int(min(wanted, end - start)), steps_per_epoch)

    def _take_part(self, push: Push, vector: Tensor | None) -> bool:
        """One round of all workers. Returns whether all have finished."""
        mine = [push.steps, push.batches, push.seconds, push.stop, push.final, vector is not None]
        table = self._collectives.all_gather(torch.tensor([float(entry) for entry in mine], dtype=torch.float64))
        for rank, (_, batches, seconds, *_) in enumerate(table.tolist()):
            self._planner.measure(rank, int(batches), seconds)
        steps, _, _, stops, finished, takers = table.sum(0).tolist()
        self.budget.total += int(steps)
        self._stopped = self._stopped or stops > 0
        if takers:
            gift = torch.zeros_like(self.server.model) if vector is None else vector
            self.server.receive(self._collectives.sum_(gift) / takers)
        return int(finished) == len(table)


class LockstepProcess:
    """What one process runs besides its training, during one fit with synchronous rounds.

    Args:
        here: Who this process is, for error messages.
        client: The worker's end.
        has_global_model: Whether this process is the one that validates the global model.

    Attributes:
        alarm: Where failures go.
        client: The worker's end.
        has_global_model: Whether this process is the one that validates the global model.
    """

    def __init__(self, here: str, client: LockstepClient, has_global_model: bool) -> None:
        self.alarm = Alarm(here)
        self.client = client
        self.has_global_model = has_global_model

    @property
    def version(self) -> int:
        """Updates that are in the global model."""
        return self.client.server.version

    @property
    def steps(self) -> int:
        """Local steps that all workers have finished."""
        return self.client.budget.total

    def read(self, out: Tensor) -> None:
        """Copies the global model into the vector ``out``."""
        out.copy_(self.client.server.model)

    def publish(self, plateaus: Sequence[tuple[int, float]], metrics: dict[str, float]) -> None:
        """Tells everybody, in the next round, what the plateau schedulers were stepped with, and the metrics."""
        self.client.published = ([*self.client.published[0], *plateaus], metrics)

    def statistics(self) -> list[dict[str, Any]]:
        """No counters: there are no local servers."""
        return []

    def close(self, timeout: float) -> None:
        """Nothing to do: there are no links."""
