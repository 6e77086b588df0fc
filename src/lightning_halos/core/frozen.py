"""Parameters that a module freezes during training stay where they are on its worker.

Servers leave a parameter alone whose pseudo-gradient is zero. This file finds the parameters that must not follow the
servers' models meanwhile, because not all workers freeze them at the same moment.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FrozenParameters:
    """Finds the parameters that a module has frozen with ``requires_grad_(False)`` after training started.

    It counts as frozen from the batch in or before which it is frozen, unless the next complete batch trains it.
    A GAN may freeze a part of itself within every batch, or in every second one. When such a part has been trained
    again, it counts as frozen only if it did not change for a complete round. A frozen parameter gets back the value
    with which it was frozen.

    Args:
        parameters: All parameters that are sent.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._flags = self._requires_grad()
        self._trained = {index for index, is_trained in enumerate(self._flags) if is_trained}
        self._toggled: set[int] = set()  # those that the module freezes for less than a complete round
        self._candidates: dict[int, Tensor] = {}  # values with which they were frozen, before the end of a batch
        self._last: dict[int, Tensor] = {}  # values at the end of the last round
        self._frozen: dict[int, Tensor] = {}
        self._rounds: dict[int, int] = {}  # ends of rounds since they count as frozen

    def begin_batch(self) -> None:
        """Notices what is frozen now, after all hooks at the start of a batch. It does not wait for the device."""
        flags = self._requires_grad()
        if flags == self._flags:
            return
        for index, (before, now) in enumerate(zip(self._flags, flags, strict=True)):
            if now:
                if self._rounds.get(index, 2) < 2:
                    self._toggled.add(index)
                self._thaw(index)
            elif before and index not in self._toggled:
                self._candidates[index] = self._parameters[index].detach().clone()
        self._flags = flags

    def end_batch(self) -> None:
        """Decides about what was frozen at the start of the batch. It waits for the device only if that is new."""
        flags = self._requires_grad()
        changed = [] if flags == self._flags else [i for i, flag in enumerate(flags) if flag != self._flags[i]]
        self._flags = flags
        for index in changed:
            if flags[index]:
                self._toggled.add(index)
                self._thaw(index)
        for index, value in self._candidates.items():
            if index not in self._toggled and torch.equal(self._parameters[index].detach(), value):
                self._frozen[index], self._rounds[index] = value, 0
            else:
                self._toggled.add(index)
        frozen_within = [index for index in changed if not flags[index] and index not in self._toggled]
        self._candidates = {index: self._parameters[index].detach().clone() for index in frozen_within}

    def end_round(self, start: Sequence[Tensor]) -> None:
        """Compares the parameters with their values at the start of a round.

        Args:
            start: The values by parameter, on the host.
        """
        # All comparisons are queued before the first result is awaited.
        differ = {i: (self._parameters[i].detach() != value).any() for i, value in self._frozen.items()}
        for index in [index for index, differs in differ.items() if differs]:  # trained within batches
            self._toggled.add(index)
            self._thaw(index)
        for index, (parameter, before) in enumerate(zip(self._parameters, start, strict=True)):
            if parameter.requires_grad:
                self._thaw(index)
            elif index in self._frozen:
                self._rounds[index] += 1
            elif index in self._trained:
                now = parameter.detach()
                flat = torch.view_as_real(now) if now.is_complex() else now
                if index in self._last and torch.equal(flat.to(before.device, before.dtype), before):
                    self._frozen[index], self._rounds[index] = self._last.pop(index), 2
                else:
                    self._last[index] = now.clone()

    def put_back(self, vector: Sequence[Tensor]) -> None:
        """Restores the values of frozen parameters in the module and in its vector, after the module was overwritten.

        Args:
            vector: The parts of the vector by parameter, on the host.
        """
        for index, value in self._now_frozen().items():
            self._parameters[index].detach().copy_(value)
            vector[index].copy_(torch.view_as_real(value) if value.is_complex() else value)

    @property
    def tensors(self) -> dict[int, Tensor]:
        """The values of the frozen parameters, by the ``id`` of the parameter."""
        return {id(self._parameters[index]): value for index, value in self._now_frozen().items()}

    def _now_frozen(self) -> dict[int, Tensor]:
        """The frozen parameters, without those that are trained again since the last batch or round began."""
        values = {**self._candidates, **self._frozen}
        return {index: value for index, value in values.items() if not self._parameters[index].requires_grad}

    def _thaw(self, index: int) -> None:
        self._trained.add(index)
        for values in (self._candidates, self._last, self._frozen, self._rounds):
            values.pop(index, None)

    def _requires_grad(self) -> list[bool]:
        return [parameter.requires_grad for parameter in self._parameters]
