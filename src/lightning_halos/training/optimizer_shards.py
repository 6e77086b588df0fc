"""The state of optimizers of a divided model, as plain tensors of which each process saves its own.

A worker with another number of processes puts it together again. Which files these tensors are in is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_halos.core.sharding import Sharded, complete, find_shards, local

PIECES = "pieces"
"""Key in an optimizer's state: by number of the parameter, its complete shape, its piece's start, and values' names."""


def optimizer_pieces(optimizer: Optimizer, model: nn.Module | None, lane: int) -> dict[str, Any]:
    """Returns an optimizer's state, with this process's part of what is divided among the worker's processes.

    Args:
        optimizer: The optimizer.
        model: The module, as the strategy inside the worker wraps it; ``None`` for a worker of one process.
        lane: Number of this process inside its worker.
    """
    state = optimizer.state_dict()
    shards = find_shards(model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    places = {number: shards[id(p)] for number, p in enumerate(parameters) if id(p) in shards}
    if not places:
        return state
    values, pieces = dict(state["state"]), {}
    for number in places.keys() & values.keys():
        own, parameter, shard = values[number], parameters[number], places[number]
        names = [name for name, value in own.items() if _is_like(value, parameter)]
        values[number] = {
            name: local(value).reshape(-1) if name in names else complete(value) for name, value in own.items()
        }
        pieces[number] = [list(shard.shape), _start(shard, lane), names]
    return {**state, "state": values, PIECES: pieces}


def is_divided(states: Sequence[Mapping[str, Any]]) -> bool:
    """Returns whether states of optimizers are pieces of those of a divided model."""
    return any(PIECES in state for state in states)


def join_pieces(states: Sequence[Mapping[str, Any]], wanted: Mapping[int, tuple[int, int]] | None = None) -> Any:
    """Returns an optimizer's state of the pieces of all lanes.

    Args:
        states: The states of :func:`optimizer_pieces`, by lane. What is not divided is that of the first one.
        wanted: By number of the parameter, which elements of its flattened values to return. Default: all, in the
            parameter's shape.
    """
    first = states[0]
    if PIECES not in first and wanted is None:
        return dict(first)
    joined: dict[str, Any] = {key: value for key, value in first.items() if key != PIECES}
    joined["state"] = {}
    for number in dict.fromkeys(number for state in states for number in state["state"]):
        # A process that has nothing of a parameter may have no state for it.
        having = [state for state in states if number in state["state"]]
        own = having[0]["state"][number]
        part = None if wanted is None else wanted.get(number)
        shape, _, names = having[0].get(PIECES, {}).get(number, [None, 0, ()])
        new = joined["state"][number] = dict(own)
        for name, value in own.items():
            if name in names:
                new[name] = _joined(having, number, name, torch.Size(shape), part)
            elif part is not None and shape is None and isinstance(value, Tensor) and value.dim():
                new[name] = value.reshape(-1)[part[0] : part[1]].clone()
    return joined


def wanted_pieces(optimizer: Optimizer, model: nn.Module | None, lane: int) -> dict[int, tuple[int, int]]:
    """Returns which elements of its parameters' flattened values an optimizer has here, by number of the parameter."""
    shards = find_shards(model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    places = {number: shards[id(p)] for number, p in enumerate(parameters) if id(p) in shards}
    return {number: (_start(shard, lane), _start(shard, lane) + shard.sizes[lane]) for number, shard in places.items()}


def load_pieces(optimizer: Optimizer, state: Mapping[str, Any], wanted: Mapping[int, tuple[int, int]]) -> None:
    """Loads a state of :func:`join_pieces` into the optimizer of a divided model."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    values = dict(state["state"])
    for number in wanted.keys() & values.keys():
        size = local(parameters[number]).numel()
        values[number] = {
            name: _distributed(value, parameters[number]) if _is_flat(value, size) else value
            for name, value in values[number].items()
        }
    optimizer.load_state_dict({**state, "state": values})


def _is_like(value: Any, parameter: Tensor) -> bool:
    """Returns whether an optimizer's value has a number for each element of a parameter."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape


def _is_flat(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1 and value.numel() == size


def _start(shard: Sharded, lane: int) -> int:
    return [*accumulate(shard.sizes, initial=0)][lane]


def _joined(
    states: Sequence[Mapping[str, Any]], number: int, name: str, shape: torch.Size, part: tuple[int, int] | None
) -> Tensor:
    """Returns some elements of a value that is divided among the states."""
    begin, end = (0, shape.numel()) if part is None else part
    joined: Tensor = states[0]["state"][number][name].new_empty(end - begin)
    for state in states:
        piece, start = state["state"][number][name], state[PIECES][number][1]
        first, last = max(begin, start), min(end, start + piece.numel())
        if first < last:
            joined[first - begin : last - begin] = piece[first - start : last - start]
    return joined.view(shape) if part is None else joined


def _distributed(flat: Tensor, parameter: Tensor) -> Tensor:
    """Returns flat values in the form of a parameter."""
    values = flat.view(local(parameter).shape)
    if not hasattr(parameter, "placements"):
        return values
    like = torch.empty_like(parameter, dtype=values.dtype)
    local(like).copy_(values)
    return like
