"""Async-Local-SGD: asynchronous local SGD with one server for all workers (arXiv 2401.09135)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lightning_halos.core.algorithms import defaults
from lightning_halos.core.algorithms.base import ServerAlgorithm
from lightning_halos.core.delayed_nesterov import OptimizerFactory
from lightning_halos.core.topology import ServerGroup, Topology


@dataclass(frozen=True, kw_only=True)
class AsyncLocalSGD(ServerAlgorithm):
    """One local server for the workers of all regions.

    Attributes:
        optimizer: Makes the server's optimizer. Default: :func:`.defaults.local_optimizer`, whose values for
            16 workers in a run of the HALoS paper's length are 0.05, 0.9 and 32 (section 5.1 there).
    """

    name: ClassVar[str] = "async_local_sgd"
    title: ClassVar[str] = "Async-Local-SGD"
    optimizer_argument: ClassVar[str] = "optimizer"

    local_steps: int = 32
    dynamic_local_steps: bool = True
    optimizer: OptimizerFactory | None = None

    def arrange(self, regions: Sequence[Sequence[int]], names: Sequence[str] = (), home: int = 0) -> Topology:
        everybody = tuple(sorted(rank for ranks in regions for rank in ranks))
        return dataclasses.replace(super().arrange(regions, names), groups=(ServerGroup(0, home, everybody),))

    def make_local_optimizer(self, workers: int, servers: int) -> OptimizerFactory:
        if self.optimizer is not None:
            return self.optimizer
        if not self.has_momentum:
            return defaults.averaging_optimizer(workers)
        return defaults.local_optimizer(workers, defaults.length_of(self.rounds, published_local_steps=32), windows=2)
