"""Parameters that a module freezes during training stay where they are on its worker.

Servers leave a parameter alone whose pseudo-gradient is zero. This file finds the parameters that must not follow the
servers' models meanwhile, because not all workers freeze them at the same moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_halos.core.sharding import local


class FrozenParameters:
    """Finds the parameters that a module has frozen with ``requires_grad_(False)`` after training started.

    It counts as frozen from the batch in or before which it is frozen, unless the next complete batch trains it.
    A GAN may freeze a part of itself within every batch, or in every second one. When such a part has been trained
    again, it counts as frozen only if it did not change for a complete round. A frozen parameter gets back the value
    with which it was frozen.

    Args:
        parameters: All parameters that are sent.
        sent_part: Returns the part of the parameter of an index that is in the vector, as real numbers, from the
            values that this process has of it.
        any_of: Returns for each flag whether any process of this worker has set it. A process compares only its values.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        sent_part: Callable[[int, Tensor], Tensor],
        any_of: Callable[[Sequence[bool]], list[bool]],
    ) -> None:
        self._parameters = parameters
        self._sent_part = sent_part
        self._any_of = any_of
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
                self._candidates[index] = self._value(index).clone()
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
        values = {index: value for index, value in self._candidates.items() if index not in self._toggled}
        differ = self._agreed({index: not torch.equal(self._value(index), value) for index, value in values.items()})
        for index, value in self._candidates.items():
            if differ.get(index, True):
                self._toggled.add(index)
            else:
                self._frozen[index], self._rounds[index] = value, 0
        frozen_within = [index for index in changed if not flags[index] and index not in self._toggled]
        self._candidates = {index: self._value(index).clone() for index in frozen_within}

    def end_round(self, start: Sequence[Tensor]) -> None:
        """Compares the parameters with their values at the start of a round.

        Args:
            start: The sent parts of their values by parameter, on the host.
        """
        # All comparisons are queued before the first result is awaited.
        queued = {i: (self._value(i) != value).any() for i, value in self._frozen.items()}
        differ = self._agreed({index: bool(differs) for index, differs in queued.items()})
        for index in [index for index, differs in differ.items() if differs]:  # trained within batches
            self._toggled.add(index)
            self._thaw(index)
        waiting = []
        for index, parameter in enumerate(self._parameters):
            if parameter.requires_grad:
                self._thaw(index)
            elif index in self._frozen:
                self._rounds[index] += 1
            elif index in self._trained:
                waiting.append(index)
        differ = self._agreed({i: self._differs_from(i, start[i]) for i in waiting if i in self._last})
        for index in waiting:
            if differ.get(index, True):
                self._last[index] = self._value(index).clone()
            else:
                self._frozen[index], self._rounds[index] = self._last.pop(index), 2

    def put_back(self, vector: Sequence[Tensor]) -> None:
        """Restores the values of frozen parameters in the module and in its vector, after the module was overwritten.

        Args:
            vector: The parts of the vector by parameter, on the host.
        """
        for index, value in self._now_frozen().items():
            self._value(index).copy_(value)
            vector[index].copy_(self._sent_part(index, value))

    @property
    def tensors(self) -> dict[int, Tensor]:
        """This process's values of the frozen parameters, by the ``id`` of the parameter."""
        return {id(self._parameters[index]): value for index, value in self._now_frozen().items()}

    def _now_frozen(self) -> dict[int, Tensor]:
        """The frozen parameters, without those that are trained again since the last batch or round began."""
        values = {**self._candidates, **self._frozen}
        return {index: value for index, value in values.items() if not self._parameters[index].requires_grad}

    def _thaw(self, index: int) -> None:
        self._trained.add(index)
        for values in (self._candidates, self._last, self._frozen, self._rounds):
            values.pop(index, None)

    def _value(self, index: int) -> Tensor:
        return local(self._parameters[index])

    def _differs_from(self, index: int, before: Tensor) -> bool:
        now = self._sent_part(index, self._value(index))
        return not torch.equal(now.to(before.device, before.dtype), before)

    def _agreed(self, differ: dict[int, bool]) -> dict[int, bool]:
        """Returns what differs on any process of the worker. All of them have the same flags, and ask the same."""
        return dict(zip(differ, self._any_of([*differ.values()]), strict=True)) if differ else {}

    def _requires_grad(self) -> list[bool]:
        return [parameter.requires_grad for parameter in self._parameters]
