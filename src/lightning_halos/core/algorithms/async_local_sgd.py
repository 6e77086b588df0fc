"""Async-Local-SGD: asynchronous local SGD with one server for all workers (arXiv 2401.09135)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from lightning_halos.core.algorithms.base import ServerAlgorithm
from lightning_halos.core.algorithms.halos import default_single_optimizer
from lightning_halos.core.optim import DelayedNesterov
from lightning_halos.core.servers import OptimizerFactory
from lightning_halos.core.topology import ServerGroup, Topology


@dataclass(frozen=True, kw_only=True)
class AsyncLocalSGD(ServerAlgorithm):
    """One local server for the workers of all regions.

    Attributes:
        optimizer: Makes the server's optimizer. Default: :func:`default_optimizer`.
    """

    name: ClassVar[str] = "async_local_sgd"
    title: ClassVar[str] = "Async-Local-SGD"

    local_steps: int = 32
    dynamic_local_steps: bool = True
    optimizer: OptimizerFactory | None = None

    def arrange(self, regions: Sequence[Sequence[int]], names: Sequence[str] = (), home: int = 0) -> Topology:
        everybody = tuple(sorted(rank for ranks in regions for rank in ranks))
        return dataclasses.replace(super().arrange(regions, names), groups=(ServerGroup(0, home, everybody),))

    def make_local_optimizer(self, workers: int, servers: int) -> OptimizerFactory:
        return self.optimizer or (default_optimizer if self.has_momentum else default_single_optimizer)(workers)


def default_optimizer(workers: int) -> OptimizerFactory:
    """Returns the server's optimizer for a number of workers (HALoS, section 5.1: 0.05, 0.9, 32 for 16 workers)."""
    return partial(DelayedNesterov, lr=0.8 / workers, momentum=0.9, delay=2 * workers)
