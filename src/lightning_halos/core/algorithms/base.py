"""The interface of an algorithm: its servers, and its workers' rounds.

An algorithm makes servers and planners. It decides nothing during a run, which the nodes in ``core`` do. Real runs,
simulations, plans and checkpoints use the same object, so a new algorithm is one new file in this folder.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from lightning_halos.core.algorithms.defaults import PUBLISHED_WEIGHT, Defaults, period
from lightning_halos.core.checks import check_count, check_optimizer, check_switch, is_number
from lightning_halos.core.delayed_nesterov import OptimizerFactory
from lightning_halos.core.global_server import GlobalServer, SynchronousServer
from lightning_halos.core.local_server import LocalServer
from lightning_halos.core.schedule import RoundPlanner
from lightning_halos.core.topology import Topology
from lightning_halos.core.wire_formats import PLAIN, WireFormats


@dataclass(frozen=True, kw_only=True)
class Algorithm(ABC):
    """An algorithm, and the workers' rounds.

    Attributes:
        shares_data: Whether the workers take samples from a common cursor. Otherwise each has a fixed shard.
        averages_gradients: Whether the workers average their gradients in every step, and exchange no models.
        local_steps: Local steps per round (``H``).
        dynamic_local_steps: Whether slower workers run fewer local steps per round:
            ``max(1, ceil(H * speed / fastest))``.
        has_momentum: Whether the servers' default optimizers have momentum. It is not for inner optimizers that come
            close to a minimum in one round, as LBFGS does: it would carry the model beyond it, ever further.
        defaults: ``"run"``: default settings depend on the length of the run. ``"published"``: they are the published
            ones.
        global_steps: Length of the run, on which defaults depend; ``None``: it is as long as the paper's. A resumed run
            keeps that with which it began.

    Raises:
        TypeError: If ``dynamic_local_steps`` is not a bool, or an optimizer is not a function.
        ValueError: If another value is invalid.
    """

    shares_data: ClassVar[bool] = True
    averages_gradients: ClassVar[bool] = False

    local_steps: int
    dynamic_local_steps: bool
    has_momentum: bool = True
    defaults: Defaults = "run"
    global_steps: int | None = None

    def __post_init__(self) -> None:
        check_count("local_steps", self.local_steps)
        check_switch("dynamic_local_steps", self.dynamic_local_steps)
        if self.defaults not in get_args(Defaults):
            raise ValueError(
                f"defaults={self.defaults!r} must be 'run' (for the length of the run) or 'published' (the paper's)."
            )
        for field in dataclasses.fields(self):
            if field.name.endswith("optimizer"):
                check_optimizer(field.name, getattr(self, field.name))

    @property
    @abstractmethod
    def name(self) -> str:
        """Name in commands."""

    @property
    @abstractmethod
    def title(self) -> str:
        """Name in messages, and in checkpoints, which only a run of the same algorithm resumes."""

    @property
    def rounds(self) -> float:
        """Rounds of a worker in the run, by which defaults go; infinite for the published ones."""
        if self.defaults == "published" or self.global_steps is None:
            return math.inf
        return self.global_steps / self.local_steps

    def arrange(self, regions: Sequence[Sequence[int]], names: Sequence[str] = (), home: int = 0) -> Topology:
        """Arranges the local servers. Default: one in each region.

        Args:
            regions: Global ranks of the workers in each region.
            names: Names of the regions. Default: their indices.
            home: Index of the global server's region.

        Raises:
            ValueError: If the regions do not suit the algorithm.
        """
        return Topology.build(regions, 1, names)

    def planner(
        self, workers: int, max_steps: int | None = None, speeds: Mapping[int, float] | None = None
    ) -> RoundPlanner:
        """Makes the planner of rounds for a number of workers; see :class:`RoundPlanner`."""
        return RoundPlanner(self.local_steps, self.dynamic_local_steps, workers, max_steps, speeds)


@dataclass(frozen=True, kw_only=True)
class ServerAlgorithm(Algorithm):
    """Asynchronous rounds: a local server applies each push at once and answers with its model.

    After ``period`` pushes a local server exchanges with the global server. A single local server exchanges nothing:
    its model is the global model.

    Attributes:
        optimizer_argument: Name of the argument that makes the local servers' optimizer.
        merge_weight: Weight of the global model when a local server merges it (``alpha``); see :meth:`global_weight`.
        max_norm_ratio: Reject a push if its Euclidean norm is more than this many times the median of the last 64
            pushes to its local server. The first 16 pushes are not checked. ``None``: no limit.
        overlap: Whether a worker trains on while its push is answered, and adds what it has learned meanwhile to the
            answer. It has at most one unanswered push.
        wire: The formats in which vectors travel; also a name or a mapping, as :meth:`WireFormats.of` takes them.
    """

    optimizer_argument: ClassVar[str] = "local_optimizer"

    merge_weight: float | None = None
    max_norm_ratio: float | None = None
    overlap: bool = False
    wire: WireFormats = PLAIN

    def __post_init__(self) -> None:
        super().__post_init__()
        check_switch("overlap", self.overlap)
        object.__setattr__(self, "wire", WireFormats.of(self.wire))
        weight = self.merge_weight
        if weight is not None and not (is_number(weight) and 0 <= weight <= 1):
            raise ValueError(
                f"merge_weight={self.merge_weight!r} must be a number from 0 (ignore the global model) to 1 (take it)."
            )
        ratio = self.max_norm_ratio
        if ratio is not None and not (is_number(ratio) and 1 < ratio < math.inf):
            raise ValueError(
                f"max_norm_ratio={ratio!r} must be None (no limit) or a number above 1, such as 10: how many times the"
                " median norm an update may have."
            )

    @property
    def has_global_server(self) -> bool:
        """Whether local servers can exchange with a global server."""
        return type(self).make_global_optimizer is not ServerAlgorithm.make_global_optimizer

    @abstractmethod
    def make_local_optimizer(self, workers: int, servers: int) -> OptimizerFactory:
        """Returns the function that makes the optimizer of one of ``servers`` local servers, which has ``workers``."""

    def make_global_optimizer(self, servers: int) -> OptimizerFactory:
        """Returns the function that makes the optimizer of the global server above ``servers`` local servers.

        Raises:
            NotImplementedError: If the algorithm never has more than one local server.
        """
        raise NotImplementedError(f"{self.title} has one local server, and no global server.")

    def period(self, workers: int) -> int:
        """Returns the pushes between two exchanges (``K``) of a local server with a number of workers."""
        return period(workers, self.rounds)

    def global_weight(self) -> float:
        """Returns the weight of the global model in a merge (``alpha``)."""
        return PUBLISHED_WEIGHT if self.merge_weight is None else self.merge_weight

    def local_server(
        self,
        index: int,
        servers: int,
        workers: int,
        model: Tensor,
        shapes: Sequence[torch.Size],
        describe: Callable[[int], str],
    ) -> LocalServer:
        """Makes one of ``servers`` local servers; see :class:`LocalServer`. A single one exchanges nothing."""
        return LocalServer(
            index,
            model,
            self.make_local_optimizer(workers, servers),
            None if servers == 1 else self.period(workers),
            self.global_weight(),
            shapes,
            workers,
            self.max_norm_ratio,
            describe,
        )

    def global_server(self, servers: int, model: Tensor, shapes: Sequence[torch.Size]) -> GlobalServer | None:
        """Makes the global server; ``None`` for a single local server, whose model is the global model."""
        return None if servers == 1 else GlobalServer(model, self.make_global_optimizer(servers), shapes, servers)


@dataclass(frozen=True, kw_only=True)
class SynchronousAlgorithm(Algorithm):
    """Rounds that start and end together for all workers."""

    @abstractmethod
    def server(self, model: Tensor, shapes: Sequence[torch.Size]) -> SynchronousServer | None:
        """Makes the server, which owns the model; ``None`` if the workers average their gradients."""
