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

    A GAN may freeze a part of itself in every batch, and train it in the next one. So a parameter counts as frozen if
    it did not change for a complete round. Then it gets back the value with which it was frozen.

    Args:
        parameters: All parameters that are sent.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._trained = {index for index, parameter in enumerate(parameters) if parameter.requires_grad}
        self._last: dict[int, Tensor] = {}
        self._frozen: set[int] = set()

    def end_round(self, start: Sequence[Tensor]) -> None:
        """Compares the parameters with their values at the start of a round.

        Args:
            start: The values by parameter, on the host.
        """
        for index, (parameter, before) in enumerate(zip(self._parameters, start, strict=True)):
            if parameter.requires_grad:
                self._trained.add(index)
                self._last.pop(index, None)
                self._frozen.discard(index)
            elif index in self._trained and index not in self._frozen:
                now = parameter.detach()
                flat = torch.view_as_real(now) if now.is_complex() else now
                if index in self._last and torch.equal(flat.to(before.device, before.dtype), before):
                    self._frozen.add(index)
                else:
                    self._last[index] = now.clone()

    def put_back(self, vector: Sequence[Tensor]) -> None:
        """Restores the values of frozen parameters in the module and in its vector, after the module was overwritten.

        Args:
            vector: The parts of the vector by parameter, on the host.
        """
        for index in self._frozen:
            value = self._last[index]
            self._parameters[index].detach().copy_(value)
            vector[index].copy_(torch.view_as_real(value) if value.is_complex() else value)

    @property
    def tensors(self) -> dict[int, Tensor]:
        """The values of the frozen parameters, by the ``id`` of the parameter."""
        return {id(self._parameters[index]): self._last[index] for index in self._frozen}
