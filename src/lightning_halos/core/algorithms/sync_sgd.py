"""Fully synchronous SGD: gradients are averaged in every step, as with Lightning's ``"ddp"``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_halos.core.algorithms.base import SynchronousAlgorithm


@dataclass(frozen=True, kw_only=True)
class SyncSGD(SynchronousAlgorithm):
    """The workers average their gradients, so that all of them have the same model, without a server."""

    name: ClassVar[str] = "sync_sgd"
    title: ClassVar[str] = "Synchronous SGD"
    shares_data: ClassVar[bool] = False  # as with DDP
    averages_gradients: ClassVar[bool] = True

    local_steps: int = 1
    dynamic_local_steps: bool = False

    def server(self, model: Tensor, shapes: Sequence[torch.Size]) -> None:
        return None
