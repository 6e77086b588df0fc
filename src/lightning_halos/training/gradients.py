"""Averages the gradients of all workers, as synchronous SGD does before each step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_halos.core.sharding import local


def average_gradients(module: nn.Module, mean: Callable[[Tensor], Tensor]) -> None:
    """Replaces the gradient of each parameter with the mean over all workers.

    A worker may have no gradients for some parameters, as in a mixture of experts: they count as zeros. A parameter for
    which no worker has one keeps none.

    Args:
        module: The module.
        mean: Returns the mean over all workers of a one-dimensional tensor.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        return
    gradients = [_dense(parameter) for parameter in parameters]
    sizes, number = [gradient.numel() for gradient in gradients], len(parameters)
    flags = [[p.grad is not None, p.grad is not None and _is_sparse(p.grad)] for p in parameters]
    known = torch.tensor(flags, dtype=gradients[0].dtype, device=gradients[0].device).T.reshape(-1)
    *means, present, sparse = torch.split(mean(torch.cat([*gradients, known])), [*sizes, number, number])
    for parameter, averaged, has, is_sparse in zip(parameters, means, present.tolist(), sparse.tolist(), strict=True):
        if has:
            _set(parameter, averaged, is_sparse > 0)


def _dense(parameter: nn.Parameter) -> Tensor:
    """Returns this process's part of a gradient as real numbers in one dimension; zeros if there is none."""
    gradient = torch.zeros_like(local(parameter)) if parameter.grad is None else local(parameter.grad)
    gradient = gradient.to_dense() if _is_sparse(gradient) else gradient
    return _as_real(gradient).reshape(-1)


def _set(parameter: nn.Parameter, averaged: Tensor, is_sparse: bool) -> None:
    if is_sparse:  # an optimizer for sparse gradients takes no others
        rows = 1 if parameter.grad is None or not _is_sparse(parameter.grad) else parameter.grad.sparse_dim()
        parameter.grad = averaged.view(parameter.shape).to(parameter.dtype).to_sparse(rows)
        return
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    elif parameter.grad.is_conj():
        parameter.grad = parameter.grad.resolve_conj()
    real = _as_real(local(parameter.grad))
    real.copy_(averaged.view_as(real))


def _is_sparse(tensor: Tensor) -> bool:
    return tensor.layout is not torch.strided


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
