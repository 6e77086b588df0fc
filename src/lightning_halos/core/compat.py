"""The private names of torch that the package uses, each behind a public name.

No other file may use private names of torch (``tests/test_layers.py``), so that a new version of torch needs changes in
one place. Tested with torch 2.13.0, the process group also with 2.4.1.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]  # missing in torch's stubs
from torch.distributed import ProcessGroup, ProcessGroupGloo, Store, Work
from torch.futures import Future
from torch.utils._pytree import tree_map_only

COMPILED = "_orig_mod."
"""What ``torch.compile`` adds to the names in a module."""

_AT_ONCE = 32 * 2**20  # bytes

# Operations on each tensor of a list, in place and with few kernels.
add_each_ = torch._foreach_add_
subtract_each_ = torch._foreach_sub_
multiply_each_ = torch._foreach_mul_
copy_each_ = torch._foreach_copy_
zero_each_ = torch._foreach_zero_


def map_tensors(function: Callable[[Tensor], Any], state: Any) -> Any:
    """Returns nested containers with ``function`` applied to each tensor in them."""
    return tree_map_only(Tensor, function, state)


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """Returns the dense tensors that a tensor consists of: itself, or the indices and values of a sparse one.

    Of a distributed tensor, it is the part that this process has.
    """
    tensor = tensor.detach()
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    by_row = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    indices = (tensor.crow_indices(), tensor.col_indices()) if by_row else (tensor.ccol_indices(), tensor.row_indices())
    return [*indices, tensor.values()]


def bytes_of(tensor: Tensor) -> Tensor:
    """Returns the values of a dense tensor as bytes on the host."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg()
    return plain.contiguous().view(-1).view(torch.uint8)


def gloo_group(store: Store, rank: int, size: int, timeout: timedelta, host: str) -> ProcessGroup:
    """Returns a process group of gloo that listens on one address of this machine only."""
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # missing in torch's stubs
    options._timeout = timeout
    options._threads = 1  # they run collectives
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    # torch's stubs do not know that it has a process group's methods
    return cast(ProcessGroup, ProcessGroupGloo(store, rank, size, options))


def finished_work(result: list[Tensor]) -> Work:
    """Returns the handle of a collective that is over."""
    future: Future[list[Tensor]] = Future()
    future.set_result(result)
    return cast(Work, _create_work_from_future(future))


def reshard(model: nn.Module) -> None:
    """Frees the complete parameters that a forward has left, so that a divided model has its shards as parameters.

    Otherwise the next forward would use them again, whatever is written into the shards.
    """
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):  # torch's class is public since 2.6
            cast(Any, module).reshard()
            continue
        handle = _flat_handle(module)
        had_forward = handle is not None and hasattr(handle.flat_param, "_full_param_padded")
        if had_forward and not handle.needs_unshard():
            handle.reshard(free_unsharded_flat_param=True)
            handle.post_reshard()
            handle._prefetched = False


def flat_shards(model: nn.Module) -> dict[int, tuple[torch.Size, list[int]]]:
    """Returns how ``FullyShardedDataParallel`` divides the parameters of a model among processes, by their ``id``.

    It is the shape of the complete parameter, and the elements of each process's part of its flattened values.
    """
    shards: dict[int, tuple[torch.Size, list[int]]] = {}
    for module in model.modules():
        handle = _flat_handle(module)
        if handle is None:
            continue
        flat, length = handle.flat_param, handle.flat_param._sharded_size.numel()
        ends = [length * process for process in range(handle.world_size + 1)]
        offsets = zip(handle._get_flat_param_offsets(), flat._is_padding_mask, strict=True)
        places = [place for place, is_padding in offsets if not is_padding]
        for parameter, shape, (first, last) in zip(flat._params, flat._shapes, places, strict=True):
            inside = [min(max(end - first, 0), last + 1 - first) for end in ends]
            shards[id(parameter)] = shape, [stop - start for start, stop in pairwise(inside)]
    return shards


def is_flattened(parameter: Tensor) -> bool:
    """Returns whether a parameter is a piece of a module that ``FullyShardedDataParallel`` divides."""
    return getattr(parameter, "_fsdp_flattened", False)


def broadcast_each_(group: ProcessGroup, tensors: list[Tensor], source: int) -> None:
    """Overwrites tensors with those of one member of a group, by its number there, a few at a time."""
    if tensors:
        dist._broadcast_coalesced(group, tensors, _AT_ONCE, source)


def _flat_handle(module: nn.Module) -> Any:
    """Returns what ``FullyShardedDataParallel`` knows of its parameters; ``None`` if it does not divide any here."""
    if type(module).__name__ != "FullyShardedDataParallel":  # not isinstance, for which servers would wait a second
        return None
    handle: Any = getattr(module, "_handle", None)
    return handle if handle is not None and handle.uses_sharded_strategy else None
