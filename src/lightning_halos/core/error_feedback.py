"""Error feedback of a sender of updates: what one update loses by rounding is added to the next.

Seide et al., "1-bit stochastic gradient descent" (2014); Karimireddy et al., "Error feedback fixes SignSGD" (2019). How
numbers are rounded is in ``quantization``; models, which are no updates, have ``shadow`` instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_halos.core.quantization import Format, round_
from lightning_halos.core.vector import CHUNK, Fill, in_parts


class ErrorFeedback:
    """A sender's residual: what its updates lacked so far.

    An element that is 0, because it was not trained, stays 0. What its earlier updates lacked is kept until it is
    trained again, so that rounding never moves a parameter that nobody trains.

    Args:
        form: The format of the updates.
        parameters: Elements of an update that are parameters. They come first; what follows is left as it is.
        dtype: The dtype of updates.

    Attributes:
        format: The format.
        residual: The residual, of shape (parameters,).
    """

    def __init__(self, form: Format, parameters: int, dtype: torch.dtype) -> None:
        self.residual = torch.zeros(parameters, dtype=dtype)
        self.format = form

    def rounding(self, fill: Fill, vector: Tensor, is_last: bool) -> Fill:
        """Returns a function that fills the vector of an update, and rounds it part by part before it is sent.

        Args:
            fill: Fills it.
            vector: The vector.
            is_last: Whether it is the last update, which is not rounded, and takes the residual with it.
        """
        return in_parts(fill, vector.numel(), lambda start, stop: self.round_(vector, start, stop, is_last))

    def round_(self, vector: Tensor, start: int, stop: int, is_last: bool) -> None:
        """Adds the residual to a part of an update, and rounds it in place. Threads may do so with different parts.

        Args:
            vector: The update.
            start: First element of the part, a multiple of ``BLOCK``.
            stop: The element behind it; a multiple of ``BLOCK``, or the end of the vector.
            is_last: See :meth:`rounding`.
        """
        stop = min(stop, self.residual.numel())
        for begin in range(start, stop, CHUNK):
            part = slice(begin, min(begin + CHUNK, stop))
            self._round(vector[part], self.residual[part], is_last)

    def _round(self, update: Tensor, residual: Tensor, is_last: bool) -> None:
        added = add_residual_(update, residual)
        residual.sub_(added)
        if is_last:
            return
        added.copy_(update)
        round_(update, self.format)
        residual.add_(added.sub_(update))
        if not bool(torch.isfinite(residual.sum())):  # the receiver rejects the update, or it is beyond all reason
            residual.nan_to_num_(0.0, 0.0, 0.0)


def add_residual_(update: Tensor, residual: Tensor) -> Tensor:
    """Adds a residual to an update, in place, but nothing to an element that is 0, because it was not trained.

    Args:
        update: The parameters of the update.
        residual: What the updates before lacked, of the same shape.

    Returns:
        What was added, which the residual has to lose.
    """
    added = update.sign().abs_().mul_(residual)
    update.add_(added)
    return added
