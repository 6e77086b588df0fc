"""Makes the state of one lane's servers of those of other lanes, for a run with other slices than the one before.

It knows which values in a state belong to elements of the model's vector; everything else is equal in all lanes. Where
the states come from, it does not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_halos.core.layout import Layout
from lightning_halos.core.shadow import SHADOW

_OF_PARAMETERS = ("residual", SHADOW)  # which have no averaged tensors
_SLICES = ("model", "base", "vector", "memory", "pushed", *_OF_PARAMETERS)
"""Names of slices of the vector in the states of servers, updates, pushes and workers."""


class Reslicing:
    """Takes the states of the old lanes, one after another, so that only one of them need be in memory.

    Args:
        old: The old layout.
        new: The new layout.
        lane: The lane in it.
        shapes: Shapes of the parameters, or of this lane's pieces of them, in the new servers.

    Attributes:
        lanes: The old lanes whose states are needed.
        state: The new state, when all of them were added.

    Raises:
        ValueError: If the layouts are of different models.
    """

    def __init__(self, old: Layout, new: Layout, lane: int, shapes: Sequence[torch.Size]) -> None:
        ends = [[bounds[-1] for bounds in layout.bounds] for layout in (old, new)]
        if ends[0] != ends[1] or old.num_tensors != new.num_tensors:
            raise ValueError(f"The tensors have {ends[0]} elements in the old slices, and {ends[1]} in the new ones.")
        self._old, self._new, self._lane, self._shapes = old, new, lane, shapes
        moves = [move for tensor in range(len(new.bounds)) for move in new.moves(tensor, old, lane)]
        self.lanes = sorted({move.lane for move in moves}) or [0]
        self.state: Any = None

    def add(self, lane: int, state: Any) -> None:
        """Takes what this lane needs of the state of an old lane. It keeps none of its tensors of slices."""
        if self.state is None:
            self.state = self._begun(state)
        self._fill(self.state, state, lane)

    def _begun(self, state: Any) -> Any:
        """Returns a state of this form, whose slices have the new sizes and no values yet."""
        if isinstance(state, Mapping):
            new = {key: self._begun(value) for key, value in state.items()}
            for key in _SLICES:
                if isinstance(value := state.get(key), Tensor):
                    new[key] = value.new_empty(sum(_sizes(self._new, self._lane, key)))
            if "optimizer" in state:
                for number, name, value in _of_elements(state["optimizer"]["state"]):
                    new["optimizer"]["state"][number][name] = value.new_empty(self._shapes[number])
                if "parameters" in state:
                    new["parameters"] = self._new.parameters_of(self._lane)
            return new
        if isinstance(state, (list, tuple)):
            return type(state)(self._begun(value) for value in state)
        return state

    def _fill(self, new: Any, state: Any, lane: int) -> None:
        """Copies what the state of an old lane has of the new slices."""
        if isinstance(state, Mapping):
            for key, value in state.items():
                if key in _SLICES and isinstance(value, Tensor):
                    self._move(key, new[key], value, lane)
                else:
                    self._fill(new[key], value, lane)
            if "optimizer" in state:
                for number, name, value in _of_elements(state["optimizer"]["state"]):
                    self._move_piece(number, new["optimizer"]["state"][number][name], value, lane)
        elif isinstance(state, (list, tuple)):
            for ours, theirs in zip(new, state, strict=True):
                self._fill(ours, theirs, lane)

    def _move(self, key: str, target: Tensor, source: Tensor, lane: int) -> None:
        targets = torch.split(target, _sizes(self._new, self._lane, key))
        sources = torch.split(source, _sizes(self._old, lane, key))
        for tensor, (ours, theirs) in enumerate(zip(targets, sources, strict=True)):
            self._move_piece(tensor, ours, theirs, lane)

    def _move_piece(self, tensor: int, target: Tensor, source: Tensor, lane: int) -> None:
        for move in self._new.moves(tensor, self._old, self._lane):
            if move.lane == lane:
                target.view(-1)[move.target] = source.reshape(-1)[move.source]


def _sizes(layout: Layout, lane: int, key: str) -> list[int]:
    """Returns the elements of the tensors that a slice of this name consists of."""
    return layout.sizes(lane)[: layout.num_tensors if key in _OF_PARAMETERS else None]


def _of_elements(states: Mapping[int, Mapping[str, Any]]) -> Iterator[tuple[int, str, Tensor]]:
    """Yields an optimizer's values that have one number for each element of a parameter.

    Others are one number for a complete parameter, such as ``mu_product`` of ``NAdam``: a tensor without dimensions,
    also where that parameter's other values have some.
    """
    tensors = [
        (number, {name: value for name, value in own.items() if isinstance(value, Tensor)})
        for number, own in states.items()
    ]
    whole = {"step"}
    for _, own in tensors:
        if any(value.dim() for value in own.values()):
            whole |= {name for name, value in own.items() if value.dim() == 0}
    for number, own in tensors:
        yield from ((number, name, value) for name, value in own.items() if name not in whole)
