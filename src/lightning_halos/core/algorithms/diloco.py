"""DiLoCo: synchronous rounds of local steps, and an outer optimizer on their mean (arXiv 2311.08105)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_halos.core.algorithms import defaults
from lightning_halos.core.algorithms.base import SynchronousAlgorithm
from lightning_halos.core.delayed_nesterov import OptimizerFactory
from lightning_halos.core.global_server import SynchronousServer


@dataclass(frozen=True, kw_only=True)
class Diloco(SynchronousAlgorithm):
    """One server that applies the mean of all workers' pushes.

    Attributes:
        outer_optimizer: Makes the server's optimizer. Default: :func:`.defaults.outer_optimizer`, or SGD with
            rate 1 without momentum.
    """

    local_steps: int = 32
    dynamic_local_steps: bool = False
    outer_optimizer: OptimizerFactory | None = None

    @property
    def name(self) -> str:
        return "diloco_dynamic" if self.dynamic_local_steps else "diloco"

    @property
    def title(self) -> str:
        return "DiLoCo + dynamic steps" if self.dynamic_local_steps else "DiLoCo"

    def server(self, model: Tensor, shapes: Sequence[torch.Size]) -> SynchronousServer:
        return SynchronousServer(model, self.make_outer_optimizer(), shapes)

    def make_outer_optimizer(self) -> OptimizerFactory:
        """Returns the function that makes the server's optimizer."""
        if self.outer_optimizer is not None:
            return self.outer_optimizer
        if not self.has_momentum:
            return partial(torch.optim.SGD, lr=1.0)
        return defaults.outer_optimizer(defaults.length_of(self.rounds, published_local_steps=32))
