"""HALoS: hierarchical asynchronous local SGD (arXiv 2506.04531)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lightning_halos.core.algorithms import defaults
from lightning_halos.core.algorithms.base import ServerAlgorithm
from lightning_halos.core.checks import check_count, check_counts
from lightning_halos.core.delayed_nesterov import OptimizerFactory
from lightning_halos.core.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Halos(ServerAlgorithm):
    """Local servers in every region, and a global server that they exchange with; see ``HalosStrategy``.

    Attributes:
        accumulate_updates: Pushes between two exchanges (``K``).
        updates_per_worker: Pushes between two exchanges, per worker of the server. Default: by the length of the run.
        servers_per_region: Number of local servers in every region, or a list with one number per region.
        local_optimizer: Makes a local server's optimizer. Default: :func:`.defaults.local_optimizer`, or
            :func:`.defaults.averaging_optimizer` without momentum or if there is one local server in the run.
        global_optimizer: Makes the global server's optimizer. Default: :func:`.defaults.global_optimizer`, or
            :func:`.defaults.averaging_optimizer` without momentum.
    """

    name: ClassVar[str] = "halos"
    title: ClassVar[str] = "HALoS"

    local_steps: int = 8
    dynamic_local_steps: bool = True
    accumulate_updates: int | None = None
    updates_per_worker: int | None = None
    servers_per_region: int | Sequence[int] = 1
    local_optimizer: OptimizerFactory | None = None
    global_optimizer: OptimizerFactory | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts("servers_per_region", self.servers_per_region)
        for name in ("updates_per_worker", "accumulate_updates"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))

    def arrange(self, regions: Sequence[Sequence[int]], names: Sequence[str] = (), home: int = 0) -> Topology:
        return Topology.build(regions, self.servers_per_region, names)

    def period(self, workers: int) -> int:
        if self.accumulate_updates is not None:
            return self.accumulate_updates
        return super().period(workers) if self.updates_per_worker is None else self.updates_per_worker * workers

    def global_weight(self) -> float:
        return defaults.merge_weight(self._length) if self.merge_weight is None else self.merge_weight

    def make_local_optimizer(self, workers: int, servers: int) -> OptimizerFactory:
        if self.local_optimizer is not None:
            return self.local_optimizer
        if servers == 1 or not self.has_momentum:
            return defaults.averaging_optimizer(workers)
        return defaults.local_optimizer(workers, self._length, windows=4)

    def make_global_optimizer(self, servers: int) -> OptimizerFactory:
        if self.global_optimizer is not None:
            return self.global_optimizer
        if not self.has_momentum:
            return defaults.averaging_optimizer(servers)
        return defaults.global_optimizer(servers, self._length)

    @property
    def _length(self) -> float:
        return defaults.length_of(self.rounds, published_local_steps=8)
