"""Parameters that a module freezes during training stay where they are, on the worker and on the servers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_halos.core.optim import DelayedNesterov
from lightning_halos.core.servers import LocalServer
from lightning_halos.core.vector import ModelVector


class Worker:
    """A worker that moves what it trains by 1 per round, while others move the server's model by 10."""

    def __init__(self) -> None:
        self.module = nn.ParameterList([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))])
        self.vector = ModelVector(self.module)
        self.memory = self.vector.read(self.vector.new())
        self.server = self.memory.clone()

    def train(self) -> None:
        with torch.no_grad():
            for parameter in self.module:
                if parameter.requires_grad:
                    parameter.add_(1.0)

    def end_round(self) -> Tensor:
        """Returns the pseudo-gradient, and pulls."""
        pushed = self.vector.pseudo_gradient_(self.memory).clone()
        self.server += 10
        self.memory = self.server.clone()
        self.vector.write(self.memory)
        return pushed


def test_a_frozen_parameter_goes_back_to_where_it_was_frozen_and_stays_until_it_is_trained_again() -> None:
    worker = Worker()
    first, second = worker.module
    worker.train()
    first.requires_grad_(False)
    worker.train()
    assert worker.end_round().tolist() == [-1, -1, -2, -2, -2]
    for _ in range(3):
        worker.train()
        assert worker.end_round()[:2].tolist() == [0, 0]
        assert first.tolist() == [1, 1]
        assert second.tolist() == worker.server[2:].tolist()
        assert worker.vector.frozen_names(worker.module) == {"0"}
        assert worker.vector.named_parts(worker.module, worker.server)["0"].tolist() == [1, 1]
    first.requires_grad_(True)
    worker.train()
    assert worker.end_round().tolist() == [-1] * 5
    assert first.tolist() == worker.server[:2].tolist()


def test_a_part_that_a_gan_only_freezes_for_the_other_parts_step_follows_the_server() -> None:
    worker = Worker()
    for _ in range(4):
        worker.train()
        worker.module[0].requires_grad_(False)
        assert worker.end_round().tolist() == [-1] * 5
        assert worker.module[0].tolist() == worker.server[:2].tolist()
        worker.module[0].requires_grad_(True)


def test_momentum_does_not_move_a_parameter_that_no_worker_trains() -> None:
    server = LocalServer(
        0,
        torch.zeros(5),
        lambda parameters: DelayedNesterov(parameters, lr=1.0, momentum=0.9, delay=1),
        None,
        0.25,
        [torch.Size([2]), torch.Size([3])],
    )
    server.apply(torch.ones(5), True, torch.empty(5))
    before = server.model.clone()
    for _ in range(5):
        server.apply(torch.tensor([0.0, 0, 1, 1, 1]), True, torch.empty(5))
    assert server.model[:2].tolist() == before[:2].tolist()
    assert (server.model[2:] < before[2:]).all()
