"""Gives all workers rank 0's module before and after a fit, when they are in step, and names what differed.

During a fit, only checkpoints use this file, for their state dict. What happens then with buffers and frozen parameters
is decided in ``core/buffers``.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_halos.checkpoint.files import can_be_read
from lightning_halos.core.buffers import Entry, local_tensors, summary
from lightning_halos.core.compat import bytes_of, dense_parts, map_tensors
from lightning_halos.transport.collectives import Collectives


def check_initialized(module: nn.Module) -> None:
    """Refuses lazy parameters and buffers, which have no shape yet.

    Raises:
        RuntimeError: If there are any.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    if names := [name for name, tensor in tensors if is_lazy(tensor)]:
        raise RuntimeError(
            f"Lazy parameters are not initialized: {summary(names)}. Workers can only exchange tensors whose shapes are"
            " known: run a batch through the module before trainer.fit() or in configure_model(), as for DDP."
        )


def broadcast_module(collectives: Collectives, module: nn.Module, except_for: Collection[int] = ()) -> None:
    """Copies the parameters and buffers of rank 0's module to the modules of all workers, sparse ones too.

    Each worker keeps its local ones, which may have other shapes than rank 0's. ``except_for`` has the ``id`` of others
    to leave out.
    """
    local = {id(tensor) for tensor in local_tensors(module)}.union(except_for)
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if id(tensor) not in local]
    collectives.broadcast_([part for tensor in tensors for part in dense_parts(tensor)])


def log_rules(entries: Sequence[Entry]) -> None:
    """Logs on rank 0 what happens with each buffer and frozen parameter that a module may change."""
    texts = {
        "mean": "averaged with the model",
        "first": "each worker's own during training, and rank 0's afterwards",
        "local": "each worker's own",
    }
    for rule, text in texts.items():
        if names := [
            entry.path for entry in entries if entry.rule == rule and (rule == "mean" or not entry.is_parameter)
        ]:
            rank_zero_info(f"Buffers and frozen parameters, {text}: {summary(names)}.")


class FinalModel:
    """Makes the modules of all workers the same at the end of a fit: what differs becomes rank 0's.

    Args:
        collectives: Collectives over all processes.
        module: The module.
        entries: Its buffers and frozen parameters. Local ones stay each worker's own.
        shards: ``id`` of parameters that are divided among the processes of a worker.
        of_lane: Collectives over the processes that have the same parts of them.
    """

    def __init__(
        self,
        collectives: Collectives,
        module: nn.Module,
        entries: Sequence[Entry],
        shards: Collection[int] = (),
        of_lane: Collectives | None = None,
    ) -> None:
        self._collectives, self._module, self._shards, self._of_lane = collectives, module, shards, of_lane
        self._local = {entry.path for entry in entries if entry.rule == "local"}
        self._expected = {entry.path for entry in entries}

    def adopt_own(self, frozen: Collection[str]) -> None:
        """Adopts what each worker has for itself during training, before hooks see the end of training.

        Args:
            frozen: Parameters that this worker's module froze during training, each worker at its own moment, or never.
        """
        texts = self._collectives.gather_texts(json.dumps([*frozen]))
        self._expected |= {name for text in texts for name in json.loads(text)}
        self._adopt({path: place for path, place in self._places().items() if path in self._expected})

    def adopt(self, may_differ: bool) -> None:
        """Adopts what hooks changed at the end of training. A warning names it, except buffers and frozen parameters.

        Args:
            may_differ: Whether only rank 0 may have the final model, because a callback averages the weights there.
        """
        places = self._places()
        differing = self._adopt(places)
        if changed := [path for path in differing if path not in self._expected and not may_differ]:
            rank_zero_warn(
                f"These parameters differed between the workers after the final model was loaded: {summary(changed)}."
                " All workers have rank 0's now. A hook changes them on some ranks only, perhaps at the end of"
                " training: make it do the same on all ranks."
            )
        if self._shards:  # the state of a divided module would have to be collected
            return
        if others := _differing(self._collectives, _other_state(self._module, places.values(), self._local)):
            rank_zero_warn(
                f"These entries of the module's state_dict differ between the workers: {summary(others)}. They are no"
                " parameters or buffers, so each worker keeps its own, and checkpoints have rank 0's."
            )

    def _places(self) -> dict[str, _Place]:
        return {place.path: place for place in _places(self._module) if place.path not in self._local}

    def _adopt(self, places: Mapping[str, _Place]) -> list[str]:
        parts = {path: place for path, place in places.items() if id(place.tensor) in self._shards}
        differing = _adopt(self._collectives, {path: place for path, place in places.items() if path not in parts})
        return differing + ([] if self._of_lane is None else _adopt(self._of_lane, parts))


def _adopt(collectives: Collectives, places: Mapping[str, _Place]) -> list[str]:
    """Replaces what differs from rank 0's. Returns the names."""
    differing = _differing(collectives, {path: _checksum(place.tensor) for path, place in places.items()})
    _replace(collectives, [places.get(path) for path in differing])
    return differing


def names_in_state(module: nn.Module, state: Mapping[str, Any]) -> dict[str, str] | None:
    """Returns which parameter or buffer each entry of a module's state dict is, by its key.

    A module may override ``state_dict``, with other keys. ``None`` if it also has other tensors, which may be made from
    the module's.
    """
    paths = {_memory(place.tensor): place.path for place in _places(module)}
    found = {key: paths.get(_memory(value)) for key, value in state.items() if isinstance(value, Tensor)}
    return None if None in found.values() else {key: path for key, path in found.items() if path is not None}


def copy_from_module(module: nn.Module, contents: MutableMapping[str, Any]) -> None:
    """Replaces all tensors in the contents of a checkpoint that share memory with a module by copies on the host."""
    tensors = [*module.parameters(), *module.buffers()]
    owned = {part.untyped_storage().data_ptr() for tensor in tensors for part in dense_parts(tensor)}

    def copied(tensor: Tensor) -> Tensor:
        shares = any(part.untyped_storage().data_ptr() in owned for part in dense_parts(tensor))
        return tensor.detach().to("cpu", copy=True) if shares else tensor

    for key, value in contents.items():
        if key == "state_dict":  # it may have attributes besides its entries, so it stays the same object
            copy_from_module(module, value)
        else:
            contents[key] = map_tensors(copied, value)


class _Place(NamedTuple):
    path: str
    owner: nn.Module
    name: str
    tensor: Tensor

    def put(self, tensor: Tensor) -> None:
        if isinstance(self.tensor, nn.Parameter):
            self.tensor.data = tensor
        else:
            setattr(self.owner, self.name, tensor)


def _places(module: nn.Module) -> Iterable[_Place]:
    for prefix, owner in module.named_modules():
        for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            yield _Place(f"{prefix}.{name}" if prefix else name, owner, name, tensor)


def _form(tensor: Tensor) -> list[Any]:
    """Returns the layout and shape of a tensor, and dtype and shape of its dense parts, as plain values."""
    parts = [[str(part.dtype).removeprefix("torch."), list(part.shape)] for part in dense_parts(tensor)]
    return [str(tensor.layout).removeprefix("torch."), list(tensor.shape), parts]


def _checksum(tensor: Tensor) -> list[Any]:
    """Returns the form of a tensor, and checksums of its values."""
    flat = [bytes_of(part) for part in dense_parts(tensor) if part.numel()]
    return [_form(tensor), [zlib.crc32(part.numpy().data) for part in flat]]


def _other_state(module: nn.Module, places: Iterable[_Place], local: Collection[str]) -> dict[str, str]:
    """Returns checksums of those entries of a module's state dict that are none of its parameters and buffers."""
    known = {_memory(place.tensor) for place in places}
    return {
        name: repr(map_tensors(_checksum, value))
        for name, value in module.state_dict().items()
        if name not in local and not (isinstance(value, Tensor) and _memory(value) in known) and can_be_read(value)
    }


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """Identifies a tensor's values: its memory, and how it reads them there."""
    return tuple(
        (part.data_ptr(), part.shape, part.stride(), part.dtype, part.is_conj(), part.is_neg())
        for part in dense_parts(tensor)
    )


def _differing(collectives: Collectives, mine: Mapping[str, Any]) -> list[str]:
    """Returns the names under which some worker has another value than rank 0, or none."""
    rows = [json.loads(text) for text in collectives.gather_texts(json.dumps(mine))]
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if any(row.get(name) != rows[0].get(name) for row in rows)]


def _replace(collectives: Collectives, places: Sequence[_Place | None]) -> None:
    """Gives tensors rank 0's values, and its shapes if they differ. What only some ranks have stays there."""
    forms = collectives.broadcast_object([None if place is None else _form(place.tensor) for place in places])
    parts: list[list[Tensor]] = []
    for place, form in zip(places, forms, strict=True):
        if form is None:
            parts.append([])
        elif place is not None and _form(place.tensor) == form:
            parts.append(dense_parts(place.tensor))
        else:
            parts.append([torch.empty(shape, dtype=getattr(torch, dtype)) for dtype, shape in form[-1]])
    collectives.broadcast_([part for pieces in parts for part in pieces])
    for place, form, pieces in zip(places, forms, parts, strict=True):
        if form is not None and place is not None and _form(place.tensor) != form:
            place.put(_rebuilt(form[0], form[1], pieces).to(place.tensor.device))


def _rebuilt(layout: str, shape: list[int], parts: list[Tensor]) -> Tensor:
    if layout == "strided":
        return parts[0]
    if layout == "sparse_coo":
        return torch.sparse_coo_tensor(parts[0], parts[1], shape)
    return torch.sparse_compressed_tensor(parts[0], parts[1], parts[2], shape, layout=getattr(torch, layout))
