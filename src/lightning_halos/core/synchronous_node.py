"""The decisions of synchronous rounds: the new model, the next round of each worker, and the end of the run.

The node takes the pushes of a round and returns the answers. It has no collectives, threads or clock. In a real run
every process has a replica, and the replicas stay equal because they get the same rounds; a simulation has one node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_halos.core.global_server import SynchronousServer
from lightning_halos.core.messages import GlobalModel, Pull, Push
from lightning_halos.core.schedule import RoundPlanner, StepBudget


class SynchronousNode:
    """The server of synchronous rounds (DiLoCo, synchronous SGD).

    Args:
        server: The server; ``None`` if the workers average their gradients and all have the model.
        planner: Decides the workers' local steps.
        budget: The step budget, which the node updates.

    Attributes:
        server: The server.
        budget: The step budget.
        version: Number of rounds in the model.
        finished: Global ranks of the workers that have finished.
    """

    def __init__(self, server: SynchronousServer | None, planner: RoundPlanner, budget: StepBudget) -> None:
        self.server = server
        self.budget = budget
        self.finished: set[int] = set()
        self._planner = planner
        self._rounds = 0
        self._stop = self._asked_to_stop = False
        self._plateau_steps: list[tuple[int, float]] = []
        self._metrics: dict[str, float] = {}

    @property
    def version(self) -> int:
        return self._rounds if self.server is None else self.server.version

    @property
    def model(self) -> Tensor | None:
        """The model; ``None`` without a server."""
        return None if self.server is None else self.server.model

    def publish(self, plateau_steps: Sequence[tuple[int, float]], metrics: dict[str, float]) -> None:
        """Sets what the next answers tell all workers: steps of plateau schedulers, and the metrics of rank 0."""
        self._plateau_steps = [*self._plateau_steps, *plateau_steps]
        self._metrics = metrics

    def finish_round(self, pushes: Sequence[Push], mean: Tensor | None) -> dict[int, Pull | GlobalModel]:
        """Ends a round. Returns the answers by global rank.

        Workers that go on get a pull without a vector; the model is :attr:`model`. Finished workers get nothing until
        all workers have finished; then all get the final model.

        Args:
            pushes: The pushes of all workers that took part. Their vectors are ignored.
            mean: The mean of their vectors, which is overwritten with the new model; ``None`` if no worker pushed one.
        """
        for push in pushes:
            self._planner.measure(push.worker, push.batches, push.seconds)
            self.budget.total += push.steps
            self._asked_to_stop = self._asked_to_stop or push.stop
        self.finished |= {push.worker for push in pushes if push.final}
        if mean is not None:
            assert self.server is not None
            self.server.receive(mean)
        self._rounds += any(push.steps for push in pushes)
        self._stop = self._stop or self._asked_to_stop or self.budget.exhausted
        if len(self.finished) == self.budget.workers:
            final = GlobalModel(self.version, True, self._asked_to_stop, self.budget.position, self.model)
            return dict.fromkeys(range(self.budget.workers), final)
        plateau_steps, self._plateau_steps = self._plateau_steps, []
        return {push.worker: self._pull(push, plateau_steps) for push in pushes if not push.final}

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of the state from which a later run can continue."""
        return {"server": None if self.server is None else self.server.state_dict(), "rounds": self._rounds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state of :meth:`state_dict`."""
        self._rounds = state["rounds"]
        if self.server is not None:
            self.server.load_state_dict(state["server"])

    def _pull(self, push: Push, plateau_steps: list[tuple[int, float]]) -> Pull:
        return Pull(
            version=self.version,
            local_steps=self._planner.local_steps(push.worker, self.budget.total),
            position=self.budget.position,
            stop=self._stop,
            plateau_steps=plateau_steps,
            metrics=self._metrics,
        )
