"""DiLoCo: synchronous rounds of local steps, and an outer optimizer on their mean (arXiv 2311.08105)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_halos.core.algorithms.base import SynchronousAlgorithm
from lightning_halos.core.servers import OptimizerFactory, SynchronousServer


@dataclass(frozen=True, kw_only=True)
class Diloco(SynchronousAlgorithm):
    """One server that applies the mean of all workers' pushes.

    Attributes:
        outer_optimizer: Makes the server's optimizer. Default: :func:`default_outer_optimizer`.
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
        default = default_outer_optimizer if self.has_momentum else partial(torch.optim.SGD, lr=1.0)
        return self.outer_optimizer or default


def default_outer_optimizer(params: Iterable[nn.Parameter]) -> Optimizer:
    """Returns the outer optimizer: SGD with rate 0.7 and Nesterov momentum 0.9 (arXiv 2311.08105, section 3)."""
    return torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True)
