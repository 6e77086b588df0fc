"""A copy of a server's state that is made little by little, while the server goes on.

There are no threads and no locks here. The holder of the server's lock copies one portion at a time, and the server
copies a portion before it overwrites it (copy on write), so that the copy is the state at the moment when the snapshot
began. The nodes decide which snapshots make up a checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Portion(NamedTuple):
    """A part of a server's tensors that the server overwrites at once.

    Attributes:
        elements: Its elements of the model and of every other vector of that size.
        parameters: The numbers of its parameters in the optimizer's state.
    """

    elements: slice
    parameters: Sequence[int]


class ServerSnapshot:
    """The state of a server at one moment.

    Plain values are copied at once, tensors portion by portion.

    Args:
        state: The state itself, not a copy: vectors of the model's size, an optimizer's ``state_dict`` under
            ``"optimizer"``, and plain values that nobody changes.
        portions: The portions of its tensors. Together they are all of them.

    Attributes:
        state: The copy. Its tensors are valid when :meth:`advance` has returned ``True``.
    """

    def __init__(self, state: Mapping[str, Any], portions: Iterable[Portion]) -> None:
        optimizer = state["optimizer"]
        vectors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        copies = {name: torch.empty_like(vector) for name, vector in vectors.items()}
        buffers = {
            number: {name: _blank(value) for name, value in own.items()} for number, own in optimizer["state"].items()
        }
        groups = copy.deepcopy(optimizer["param_groups"])
        self.state = {**state, **copies, "optimizer": {"state": buffers, "param_groups": groups}}
        self._pending: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for index, portion in enumerate(portions):
            pairs = [(copies[name][portion.elements], vector[portion.elements]) for name, vector in vectors.items()]
            for number in portion.parameters:
                for name, value in optimizer["state"].get(number, {}).items():
                    if isinstance(value, Tensor):
                        pairs.append((buffers[number][name], value))
            self._pending[index] = pairs

    def take(self, index: int) -> None:
        """Copies a portion, before it is overwritten, if that is not done yet."""
        for target, source in self._pending.pop(index, ()):
            target.copy_(source)

    def advance(self) -> bool:
        """Copies the next portion. Returns whether the snapshot is complete."""
        if self._pending:
            self.take(next(iter(self._pending)))
        return not self._pending

    def complete(self) -> dict[str, Any]:
        """Copies all that is left. Returns the state."""
        while not self.advance():
            pass
        return self.state


def _blank(value: Any) -> Any:
    return torch.empty_like(value) if isinstance(value, Tensor) else copy.deepcopy(value)
