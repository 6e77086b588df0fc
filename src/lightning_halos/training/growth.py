"""Chooses servers without momentum where it would let the model grow without bound, and notices it where it does.

Momentum adds up the progress of rounds. It is for inner optimizers that make a small part of the possible progress in a
round, not for those that come close to a minimum.
"""

from __future__ import annotations

import dataclasses
import math

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_halos.core.algorithms import Algorithm
from lightning_halos.core.topology import Topology
from lightning_halos.training.trainer_adapter import optimizers_of

_SAMPLE = 2**16  # parameters that are looked at, so that a look costs little
_FACTOR = 1000.0  # times that the parameters are larger than at the start, or than 1
_JUMP = 100.0  # times that the parameters are larger than at the last pull
_IN_A_ROW = 4  # pulls with growth of at least 10 % each


def without_momentum_for_lbfgs(algorithm: Algorithm, trainer: pl.Trainer) -> Algorithm:
    """Returns an algorithm whose default optimizers suit the module's: without momentum if it trains with LBFGS."""
    if not any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers_of(trainer)):
        return algorithm
    rank_zero_info("The module trains with LBFGS, so the default optimizers of the servers have no momentum.")
    return dataclasses.replace(algorithm, has_momentum=False)


class GrowthWatch:
    """Warns once if the models that a worker pulls grow without bound."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._first: float | None = None
        self._last = math.inf
        self._in_a_row = 0
        self._is_silent = False

    def look(self, parameters: Tensor) -> None:
        """Compares the parameters of a pulled model with those of earlier ones."""
        if self._is_silent:
            return
        size = float(parameters[:: max(1, parameters.numel() // _SAMPLE)].square().mean().sqrt())
        self._first = size if self._first is None else self._first
        # 1 stands for smaller sizes, because a model may start from zeros.
        has_jumped = size > _JUMP * max(self._last, 1.0)
        self._in_a_row = self._in_a_row + 1 if size > 1.1 * self._last or math.isinf(size) else 0
        self._last = size
        if has_jumped or (self._in_a_row >= _IN_A_ROW and size > _FACTOR * max(self._first, 1.0)):
            self._is_silent = True
            groups = self._topology.groups
            workers = max(len(group.ranks) for group in groups)
            rank_zero_warn(
                f"The model grows without bound: its parameters were about {self._first:.1g}, now {size:.1g}. If the"
                " module trains well under DDP, the momentum of the servers is too much for its optimizers: a round"
                " comes close to a minimum, and momentum carries the model beyond it. Give HalosStrategy"
                f" local_optimizer=lambda p: torch.optim.SGD(p, lr={1 / workers:.3g}) and"
                f" global_optimizer=lambda p: torch.optim.SGD(p, lr={1 / len(groups):.3g}), or other strategies such an"
                " optimizer, or lower the learning rate or local_steps."
            )
