"""The server of all regions, which applies their updates, and that of synchronous rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_halos.core.delayed_nesterov import OptimizerFactory
from lightning_halos.core.finding import Finding
from lightning_halos.core.messages import GlobalModel, RegionUpdate
from lightning_halos.core.parameter_server import ParameterServer


class GlobalServer(ParameterServer):
    """The server of all regions: applies each region's accumulated update as a pseudo-gradient on arrival.

    Attributes:
        steps: Local steps of all updates, including rejected ones.
    """

    def __init__(
        self,
        model: Tensor,
        optimizer: OptimizerFactory,
        shapes: Sequence[torch.Size] | None = None,
        servers: int = 1,
    ) -> None:
        super().__init__(model, optimizer, shapes, senders=servers)
        self.steps = 0

    def receive(self, update: RegionUpdate, finding: Finding | None = None, name: str | None = None) -> GlobalModel:
        """Applies a region's accumulated update, unless it has no local steps and is final. Returns the answer.

        Args:
            update: The update. Its vector's memory is reused for the answer.
            finding: The result of :meth:`inspect` for its vector. Default: inspect it now.
            name: The sender's name in warnings. Default: the local server with its index.
        """
        assert update.vector is not None
        self.steps += update.steps
        is_accepted = False
        if update.steps or not update.final:
            finding = self.find(update.vector) if finding is None else finding
            name = f"the local server {update.server}" if name is None else name
            is_accepted = self._judge(finding, update.version, update.server, name)
        return self.answer(update, is_accepted)

    def answer(self, update: RegionUpdate, is_accepted: bool = False) -> GlobalModel:
        """Applies an update if it is accepted, and returns the answer."""
        assert update.vector is not None
        answer = self.memory_for(update.vector)
        self.apply(update.vector, is_accepted, answer)
        return GlobalModel(self.version, vector=answer, number=update.number)

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.steps = state["steps"]


class SynchronousServer(ParameterServer):
    """The server of synchronous rounds (DiLoCo, arXiv 2311.08105): applies the mean of all workers' rounds."""

    def receive(self, mean: Tensor) -> None:
        """Applies the mean of the workers' vectors, and overwrites it with the new model."""
        is_accepted = self._judge(self.find(mean), self.version, 0, "all workers together")
        self.apply(mean, is_accepted, mean)
