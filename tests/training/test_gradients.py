"""The mean of all workers' gradients. That it is DDP's is checked in ``simulation/test_world``."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lightning_halos.training.gradients import average_gradients


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(4, 2, sparse=True)
        self.wave = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        self.unused = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)


def averaged_with(module: nn.Module, other: nn.Module) -> None:
    """Averages the gradients of two workers, in the first."""
    sent: list[Tensor] = []

    def keep(flat: Tensor) -> Tensor:
        sent.append(flat.clone())
        return flat

    average_gradients(other, keep)
    average_gradients(module, lambda flat: (flat + sent[0]) / 2)


def test_a_parameter_that_one_worker_does_not_use_gets_half_of_the_others_gradient_in_its_form() -> None:
    module = Module()
    other = copy.deepcopy(module)
    (other.rows(torch.tensor([1, 1])).sum() + (other.wave.conj() * (1 + 2j)).real.sum()).backward()
    dense, wave = other.rows.weight.grad.to_dense(), other.wave.grad.clone()
    averaged_with(module, other)
    assert module.rows.weight.grad.is_sparse, "SparseAdam takes no others"
    assert torch.equal(module.rows.weight.grad.to_dense(), dense / 2)
    assert torch.equal(module.wave.grad, wave / 2)
    assert module.unused.grad is None
    assert module.frozen.grad is None
    torch.optim.SparseAdam(module.rows.parameters(), lr=0.1).step()


def test_a_worker_with_a_gradient_keeps_its_form() -> None:
    module = Module()
    other = copy.deepcopy(module)
    (module.rows(torch.tensor([1])).sum() + (module.wave.conj() * (1 + 2j)).real.sum()).backward()
    wave = module.wave.grad.clone()
    averaged_with(module, other)
    assert module.rows.weight.grad.is_sparse
    assert module.rows.weight.grad.to_dense().tolist() == [[0, 0], [0.5, 0.5], [0, 0], [0, 0]]
    assert torch.equal(module.wave.grad, wave / 2)
