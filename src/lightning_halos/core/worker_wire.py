"""The worker's end of the wire: its pushes are rounded to the format of its link, and the models that come restored.

It is an :class:`ErrorFeedback` and a :class:`Shadow`; on a link in ``float32`` it does nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lightning_halos.core.error_feedback import ErrorFeedback
from lightning_halos.core.messages import Pull, Push
from lightning_halos.core.quantization import Format
from lightning_halos.core.shadow import SHADOW, Shadow
from lightning_halos.core.vector import Fill


class WorkerWire:
    """Rounds a worker's pushes, and makes the models that arrive complete.

    Args:
        form: The format of the worker's link.
        parameters: Elements of the vector that are parameters.
        dtype: The dtype of the vector.
    """

    def __init__(self, form: Format, parameters: int, dtype: torch.dtype) -> None:
        self._feedback = None if form == "float32" else ErrorFeedback(form, parameters, dtype)
        self._shadow = None if form == "float32" else Shadow(parameters)

    def filling(self, push: Push, fill: Fill) -> Fill:
        """Returns a function that fills a push with its rounded vector, given one that fills it with the vector."""
        if self._feedback is None or push.vector is None:
            return fill
        return self._feedback.rounding(fill, push.vector, push.final)

    def arriving(self, pull: Pull, progress: Iterable[int]) -> Iterable[int]:
        """Makes the vector of a pull the model, in place, while it arrives.

        Args:
            pull: The pull.
            progress: Yields the number of elements that have arrived.

        Returns:
            What yields the number of elements that are the model's.
        """
        if self._shadow is None or pull.vector is None:
            return progress
        return self._shadow.receiving(pull.vector, pull.is_difference, progress)

    def state_dict(self, has_shadow: bool) -> dict[str, Any]:
        """Returns a copy of the state: tensors, by names for a worker's state; nothing on a link in ``float32``.

        Args:
            has_shadow: Whether the server's state has the shadow, too, so that both can go on with it.
        """
        state = {}
        if self._feedback is not None:
            state["residual"] = self._feedback.residual.clone()
        if has_shadow and self._shadow is not None and self._shadow.values is not None:
            state[SHADOW] = self._shadow.values.clone()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what a worker's state has of :meth:`state_dict`. What this link has no use for is dropped."""
        if self._feedback is not None and (residual := state.get("residual")) is not None:
            self._feedback.residual.copy_(residual)
        if self._shadow is not None and (shadow := state.get(SHADOW)) is not None:
            self._shadow.values = shadow.clone()
