"""Parameters that a module freezes during training stay where they are, on the worker and on the servers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_halos.core.delayed_nesterov import DelayedNesterov
from lightning_halos.core.local_server import LocalServer
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

    def batch(self, *frozen: int, trains: bool = True) -> None:
        """Trains in a batch that starts with some of its parameters frozen."""
        for index, parameter in enumerate(self.module):
            parameter.requires_grad_(index not in frozen)
        self.vector.begin_batch()
        if trains:
            self.train()
        self.vector.end_batch()

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


def test_a_parameter_that_is_frozen_before_a_batch_stays_even_if_the_round_ends_with_this_batch() -> None:
    worker = Worker()
    worker.batch()
    for _ in range(3):
        worker.batch(0)
        worker.end_round()
        assert worker.module[0].tolist() == [1, 1]
        assert worker.module[1].tolist() == worker.server[2:].tolist()
        assert worker.vector.frozen_names(worker.module) == {"0"}


def test_a_parameter_that_is_frozen_within_a_batch_stays_even_if_the_round_ends_with_this_batch() -> None:
    worker = Worker()
    worker.batch()
    first = worker.module[0]
    for _ in range(3):
        worker.vector.begin_batch()
        if first.requires_grad:
            worker.train()
        first.requires_grad_(False)
        worker.vector.end_batch()
        worker.end_round()
        assert first.tolist() == [2, 2]
        assert worker.module[1].tolist() == worker.server[2:].tolist()
        assert worker.vector.frozen_names(worker.module) == {"0"}


def test_a_parameter_that_is_trained_again_keeps_its_value_when_a_validation_comes_in_that_round() -> None:
    worker = Worker()
    first = worker.module[0]
    worker.batch()
    for _ in range(3):
        worker.batch(0)
        worker.end_round()
    first.requires_grad_(True)
    worker.train()
    own = worker.vector.read(worker.vector.new())
    worker.vector.write(worker.server.clone())
    assert first.tolist() == worker.server[:2].tolist()
    worker.vector.write(own)
    assert first.tolist() == [2, 2]
    assert worker.vector.frozen_names(worker.module) == set()


def test_a_part_that_a_gan_freezes_in_every_second_batch_follows_the_server_after_the_first_ones() -> None:
    worker = Worker()
    for batch in range(12):
        worker.batch(batch % 2)
        if batch % 2 and batch > 2:  # always after the same part was frozen
            worker.end_round()
            assert worker.vector.read(worker.vector.new()).tolist() == worker.server.tolist()


def test_a_part_that_a_gan_leaves_frozen_at_the_end_of_batches_follows_the_server_after_the_first_ones() -> None:
    worker = Worker()
    first = worker.module[0]
    for batch in range(8):
        worker.vector.begin_batch()
        if batch % 2 == 0:  # it is not trained in every batch
            first.requires_grad_(True)
            worker.train()
        first.requires_grad_(False)
        worker.vector.end_batch()
        if batch % 2 and batch > 2:  # always after the same part was not trained
            worker.end_round()
            assert first.tolist() == worker.server[:2].tolist()


def test_a_part_that_is_only_trained_within_batches_follows_the_server_once_it_is_trained() -> None:
    worker = Worker()
    first = worker.module[0]
    for _ in range(3):
        worker.batch(0)
        worker.end_round()
    assert first.tolist() == [0, 0]
    for _ in range(3):
        worker.vector.begin_batch()
        first.requires_grad_(True)
        worker.train()
        first.requires_grad_(False)
        worker.vector.end_batch()
        assert worker.end_round()[:2].tolist() == [-1, -1]
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
