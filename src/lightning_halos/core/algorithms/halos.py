"""HALoS: hierarchical asynchronous local SGD (arXiv 2506.04531)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from lightning_halos.core.algorithms.base import ServerAlgorithm
from lightning_halos.core.checks import check_count, check_counts
from lightning_halos.core.optim import DelayedNesterov
from lightning_halos.core.servers import OptimizerFactory
from lightning_halos.core.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Halos(ServerAlgorithm):
    """Local servers in every region, and a global server that they exchange with; see ``HalosStrategy``.

    Attributes:
        accumulate_updates: Pushes between two exchanges (``K``). Default: ``updates_per_worker`` per worker.
        updates_per_worker: Pushes between two exchanges, per worker of the server.
        servers_per_region: Number of local servers in every region, or a list with one number per region.
        local_optimizer: Makes a local server's optimizer. Default: :func:`default_local_optimizer`, or
            :func:`default_single_optimizer` without momentum or if there is one local server in the run.
        global_optimizer: Makes the global server's optimizer. Default: :func:`default_global_optimizer`, or
            :func:`default_single_optimizer` without momentum.
    """

    name: ClassVar[str] = "halos"
    title: ClassVar[str] = "HALoS"

    local_steps: int = 8
    dynamic_local_steps: bool = True
    accumulate_updates: int | None = None
    updates_per_worker: int = 8
    servers_per_region: int | Sequence[int] = 1
    local_optimizer: OptimizerFactory | None = None
    global_optimizer: OptimizerFactory | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts("servers_per_region", self.servers_per_region)
        check_count("updates_per_worker", self.updates_per_worker)
        if self.accumulate_updates is not None:
            check_count("accumulate_updates", self.accumulate_updates)

    def arrange(self, regions: Sequence[Sequence[int]], names: Sequence[str] = (), home: int = 0) -> Topology:
        return Topology.build(regions, self.servers_per_region, names)

    def period(self, workers: int) -> int:
        return self.accumulate_updates or self.updates_per_worker * workers

    def make_local_optimizer(self, workers: int, servers: int) -> OptimizerFactory:
        default = default_local_optimizer if servers > 1 and self.has_momentum else default_single_optimizer
        return self.local_optimizer or default(workers)

    def make_global_optimizer(self, servers: int) -> OptimizerFactory:
        default = default_global_optimizer if self.has_momentum else default_single_optimizer
        return self.global_optimizer or default(servers)


def default_local_optimizer(workers: int) -> OptimizerFactory:
    """Returns the local server's optimizer for a number of workers (section 5.1: 0.2, 0.9, 16 for 4 workers).

    The sum of the rates over one round of all workers, and the number of rounds in a momentum window, are the paper's.
    """
    return partial(DelayedNesterov, lr=0.8 / workers, momentum=0.9, delay=4 * workers)


def default_single_optimizer(workers: int) -> OptimizerFactory:
    """Returns the optimizer of the only local server, for a number of workers: rate 1 / workers, no momentum.

    A round of all workers then moves the model to about the mean of theirs, and one worker trains as it would alone.
    The paper's momentum suits long runs in several regions: a run of some hundred steps in one region loses most of its
    progress to it, whatever the number of workers, and momentum is no clear gain in some thousand steps
    (``benchmarks/defaults.py``, ``docs/parameters.md``).
    """
    return partial(DelayedNesterov, lr=1 / workers, momentum=0.0, delay=1)


def default_global_optimizer(servers: int) -> OptimizerFactory:
    """Returns the global server's optimizer for a number of local servers (section 5.1: 0.15, 0.5, 2 for 4 regions).

    The sum of the rates over one exchange of all local servers, and the number of exchanges in a window, are the
    paper's.
    """
    return partial(DelayedNesterov, lr=0.6 / servers, momentum=0.5, delay=max(1, servers // 2))
