"""Counts the optimizer steps of a batch. What counts as a step is decided here and nowhere else.

Lightning counts the steps of the optimizers that it wraps. Under manual optimization a module may also step another
optimizer, or change its parameters without one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

_FIRST_LOOK = 8  # batches without a step after which the parameters are compared; then after twice as many each time


class StepCounter:
    """Counts the steps of one fit.

    A batch has the steps that Lightning counts in it. If these are none, it has those of the other optimizers of the
    module's parameters; steps that an optimizer makes with another one, as SAM does, are one step. Steps in hooks after
    a batch, such as the module's ``on_train_batch_end``, are of the next batch, if there is one. If no optimizer steps
    but the parameters change, every batch is one step.

    Args:
        trainer: The Trainer, at the start of training.
        has_changed: Whether the module's parameters have changed without a step, since the last push or the last call.

    Attributes:
        batches: Batches of this fit so far.
        steps: Steps of this fit so far.
    """

    def __init__(self, trainer: pl.Trainer, has_changed: Callable[[], bool]) -> None:
        self.batches = self.steps = 0
        self._trainer = trainer
        self._has_changed = has_changed
        self._before = 0
        self._has_begun = False
        self._seen = self._depth = 0
        self._without_step = 0
        self._look_at = _FIRST_LOOK
        self._every_batch_is_a_step = False
        self._is_manual = not trainer.lightning_module.automatic_optimization
        self._handles = []
        if self._is_manual:
            self._parameters = {id(parameter) for parameter in trainer.lightning_module.parameters()}
            untraced: Any = torch.compiler.disable
            self._handles.append(register_optimizer_step_pre_hook(untraced(self._on_step_begin)))
            self._handles.append(register_optimizer_step_post_hook(untraced(self._on_step_end)))

    @property
    def in_batch(self) -> int:
        """Steps in the present batch so far."""
        return self._trainer.global_step - self._before or self._seen

    @property
    def per_batch(self) -> float:
        """Steps per batch so far; 1 before the first step."""
        return self.steps / self.batches if self.steps else 1.0

    def begin_batch(self) -> None:
        """Starts to count the steps of a batch."""
        self._before = self._trainer.global_step
        self._depth = 0  # it is wrong after a step that has failed
        self._has_begun = True

    def end_batch(self) -> int:
        """Returns the steps in the batch: none in one that is ``None``, which Lightning ends without beginning it."""
        if not self._has_begun:
            return 0
        self._has_begun = False
        steps = self.in_batch
        if self._is_manual and not steps:
            steps = self._steps_without_optimizer()
        self._seen = 0
        if steps:
            self._without_step = 0
        self.batches += 1
        self.steps += steps
        return steps

    def close(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()

    def _steps_without_optimizer(self) -> int:
        if self._every_batch_is_a_step:
            return 1
        self._without_step += 1
        if self._without_step < self._look_at:
            return 0
        self._look_at *= 2
        return self.look()

    def look(self) -> int:
        """Returns the number of batches in which the parameters changed although no optimizer stepped."""
        if not self._is_manual or not self._without_step or self._seen or not self._has_changed():
            return 0
        rank_zero_warn(
            "The module changes its parameters without an optimizer of torch, so every batch counts as one step: in"
            " global_step, in max_steps, and in local_steps."
        )
        self._every_batch_is_a_step = True
        steps, self._without_step = self._without_step, 0
        return steps

    def _on_step_begin(self, optimizer: Optimizer, *_: Any) -> None:
        if self._has_parameters_of_module(optimizer):  # nothing is written in other threads
            self._depth += 1

    def _on_step_end(self, optimizer: Optimizer, *_: Any) -> None:
        if self._has_parameters_of_module(optimizer):
            self._depth -= 1
            self._seen += self._depth == 0 and not self._trainer.validating  # of the global model, on rank 0 only

    def _has_parameters_of_module(self, optimizer: Optimizer) -> bool:
        """Servers in this process have optimizers, too, which step in other threads."""
        return any(id(p) in self._parameters for group in optimizer.param_groups for p in group["params"])
