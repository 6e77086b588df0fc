"""The private names of torch that the package uses, each behind a function of its own.

No other file may use private names of torch (``tests/test_layers.py``), so that a new version of torch needs changes in
one place. Tested with torch 2.13.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

Tensors = list[Tensor] | tuple[Tensor, ...]


def map_tensors(function: Callable[[Tensor], Any], state: Any) -> Any:
    """Returns nested containers with ``function`` applied to each tensor in them."""
    return tree_map_only(Tensor, function, state)


def add_each_(tensors: Tensors, others: Tensors, alpha: float = 1.0) -> None:
    """Adds ``alpha`` times another tensor to each tensor, in place and with few kernels."""
    torch._foreach_add_(tensors, others, alpha=alpha)


def subtract_each_(tensors: Tensors, others: Tensors) -> None:
    """Subtracts another tensor from each tensor, in place and with few kernels."""
    torch._foreach_sub_(tensors, others)


def multiply_each_(tensors: Tensors, factor: float) -> None:
    """Multiplies each tensor by a number, in place and with few kernels."""
    torch._foreach_mul_(tensors, factor)


def copy_each_(tensors: Tensors, sources: Tensors) -> None:
    """Copies another tensor into each tensor, with few kernels."""
    torch._foreach_copy_(tensors, sources)


def zero_each_(tensors: Tensors) -> None:
    """Fills each tensor with zeros, with few kernels."""
    torch._foreach_zero_(tensors)


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """Returns the dense tensors that a tensor consists of: itself, or the indices and values of a sparse one."""
    tensor = tensor.detach()
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    by_row = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    indices = (tensor.crow_indices(), tensor.col_indices()) if by_row else (tensor.ccol_indices(), tensor.row_indices())
    return [*indices, tensor.values()]
