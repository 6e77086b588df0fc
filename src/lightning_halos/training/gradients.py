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
    present = torch.tensor([float(p.grad is not None) for p in parameters], device=gradients[0].device)
    sizes = [gradient.numel() for gradient in gradients]
    *means, shares = torch.split(mean(torch.cat([*gradients, present])), [*sizes, len(parameters)])
    for parameter, averaged, share in zip(parameters, means, shares.tolist(), strict=True):
        if share:
            _set(parameter, averaged)


def _dense(parameter: nn.Parameter) -> Tensor:
    """Returns this process's part of a gradient as real numbers in one dimension; zeros if there is none."""
    gradient = torch.zeros_like(local(parameter)) if parameter.grad is None else local(parameter.grad)
    gradient = gradient.to_dense() if gradient.layout != torch.strided else gradient
    return _as_real(gradient).reshape(-1)


def _set(parameter: nn.Parameter, averaged: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    gradient = local(parameter.grad)
    if gradient.layout != torch.strided:  # an optimizer for sparse gradients takes no others
        shaped = averaged.view(gradient.shape).to(gradient.dtype)
        parameter.grad = shaped.to_sparse(gradient.sparse_dim())
        return
    real = _as_real(gradient)
    real.copy_(averaged.view_as(real))


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
