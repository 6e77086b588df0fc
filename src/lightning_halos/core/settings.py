"""What a user can set about the algorithm, and what follows from the topology where nothing is set.

Rules of this room: a wrong value is refused here, with an error that names the argument, the value and what would be
right. Nothing here knows processes or Lightning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_halos.core.optim import DelayedNesterov
from lightning_halos.core.schedule import RoundPlanner
from lightning_halos.core.servers import GlobalServer, LocalServer, OptimizerFactory, SynchronousServer


@dataclass(frozen=True)
class Settings:
    """The settings of an algorithm; see :class:`~lightning_halos.HalosStrategy` for what each means.

    Raises:
        TypeError: If an optimizer is not a function, or a switch is not a bool.
        ValueError: If a value is wrong.
    """

    local_steps: int = 8
    dynamic_local_steps: bool = True
    accumulate_updates: int | None = None
    merge_weight: float = 0.25
    local_optimizer: OptimizerFactory | None = None
    global_optimizer: OptimizerFactory | None = None
    max_norm_ratio: float | None = None

    def __post_init__(self) -> None:
        check_count("local_steps", self.local_steps)
        if not isinstance(self.dynamic_local_steps, bool):
            raise TypeError(f"dynamic_local_steps={self.dynamic_local_steps!r} must be True or False.")
        if self.accumulate_updates is not None:
            check_count("accumulate_updates", self.accumulate_updates)
        if not _is_number(self.merge_weight) or not 0 <= self.merge_weight <= 1:
            raise ValueError(
                f"merge_weight={self.merge_weight!r} must be a number from 0 (ignore the global model) to 1 (take it)."
            )
        if self.max_norm_ratio is not None and not (
            _is_number(self.max_norm_ratio) and 1 < self.max_norm_ratio < math.inf
        ):
            raise ValueError(
                f"max_norm_ratio={self.max_norm_ratio!r} must be None (no limit) or a number above 1, such as 10: how"
                " many times the median norm an update may have."
            )
        for name in ("local_optimizer", "global_optimizer"):
            factory = getattr(self, name)
            if factory is not None and (isinstance(factory, Optimizer) or not callable(factory)):
                raise TypeError(
                    f"{name}=<{type(factory).__name__}> must be a function from parameters to an optimizer, such as"
                    " `lambda params: DelayedNesterov(params, lr=0.2)`."
                )

    def local_server(
        self,
        index: int,
        servers: int,
        workers: int,
        model: Tensor,
        shapes: Sequence[torch.Size],
        describe: Callable[[int], str],
    ) -> LocalServer:
        """Makes a local server.

        Args:
            index: Its index among all local servers.
            servers: Number of local servers. A single one exchanges nothing.
            workers: Number of its workers. ``accumulate_updates`` is 8 times that by default.
            model: The initial model, which the server owns from here on.
            shapes: Shapes of the parameters in it.
            describe: Names a worker of a global rank in warnings.
        """
        optimizer = self.local_optimizer or default_local_optimizer(workers)
        accumulate = None if servers == 1 else self.accumulate_updates or 8 * workers
        return LocalServer(
            index,
            model,
            optimizer,
            accumulate,
            self.merge_weight,
            shapes,
            workers,
            self.max_norm_ratio,
            describe,
        )

    def global_server(self, servers: int, model: Tensor, shapes: Sequence[torch.Size]) -> GlobalServer | None:
        """Makes the global server; ``None`` for a single local server, whose model is the global model.

        Args:
            servers: Number of local servers.
            model: The initial model, which the server owns from here on.
            shapes: Shapes of the parameters in it.
        """
        if servers == 1:
            return None
        return GlobalServer(model, self.global_optimizer or default_global_optimizer(servers), shapes, servers)

    def outer_server(self, model: Tensor, shapes: Sequence[torch.Size]) -> SynchronousServer:
        """Makes the server of synchronous rounds.

        Args:
            model: The initial model, which the server owns from here on.
            shapes: Shapes of the parameters in it.
        """
        return SynchronousServer(model, self.global_optimizer or default_outer_optimizer, shapes)

    def planner(self, workers: int, max_steps: int | None) -> RoundPlanner:
        """Makes the planner of rounds for a run of so many workers and global steps."""
        return RoundPlanner(self.local_steps, self.dynamic_local_steps, workers, max_steps)


def default_local_optimizer(workers: int) -> OptimizerFactory:
    """The local server's optimizer for so many workers (HALoS, section 5.1: 0.2, 0.9 and 16 for 4 workers).

    The sum of the rates over one round of all workers, and the rounds in a momentum window, are the paper's.
    """
    return partial(DelayedNesterov, lr=0.8 / workers, momentum=0.9, delay=4 * workers)


def default_global_optimizer(servers: int) -> OptimizerFactory:
    """The global server's optimizer for so many local servers (HALoS, section 5.1: 0.15, 0.5 and 2 for 4 regions).

    The sum of the rates over one exchange of all local servers, and the exchanges in a window, are the paper's.
    """
    return partial(DelayedNesterov, lr=0.6 / servers, momentum=0.5, delay=max(1, servers // 2))


def default_one_server_optimizer(workers: int) -> OptimizerFactory:
    """The optimizer of Async-Local-SGD for so many workers (HALoS, section 5.1: 0.05, 0.9 and 32 for 16 workers)."""
    return partial(DelayedNesterov, lr=0.8 / workers, momentum=0.9, delay=2 * workers)


def default_outer_optimizer(params: Iterable[nn.Parameter]) -> Optimizer:
    """DiLoCo's outer optimizer: SGD with a rate of 0.7 and Nesterov momentum of 0.9 (arXiv 2311.08105, section 3)."""
    return torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True)


def check_count(name: str, value: Any) -> None:
    """Refuses what is not a whole number of at least 1.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
