"""What counts as a step of a batch where the module steps its optimizers itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_halos.training.step_counter import StepCounter


class Manual(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Linear(2, 1)


@pytest.fixture
def module() -> Manual:
    module = Manual()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    return module


@pytest.fixture
def counter(module: Manual) -> Iterator[StepCounter]:
    trainer: Any = type("OfModule", (), {"lightning_module": module, "global_step": 0, "validating": False})()
    counter = StepCounter(trainer, lambda: True)
    yield counter
    counter.close()


def test_steps_in_hooks_after_a_batch_are_of_the_next_one(
    module: Manual, counter: StepCounter, recwarn: pytest.WarningsRecorder
) -> None:
    optimizer, steps = torch.optim.SGD(module.parameters(), lr=0.1), []
    for batch in range(40):
        counter.begin_batch()
        steps.append(counter.end_batch())
        for _ in range(3 if batch % 10 == 9 else 1):  # in the last batch of an epoch, its hook steps, too
            optimizer.step()
    assert steps == [0, *[1] * 9, 3, *[1] * 9, 3, *[1] * 9, 3, *[1] * 9]
    assert not recwarn.list


def test_steps_in_a_validation_do_not_count(module: Manual, counter: StepCounter) -> None:
    optimizer, trainer = torch.optim.SGD(module.parameters(), lr=0.1), counter._trainer
    trainer.validating = True
    optimizer.step()
    trainer.validating = False
    counter.begin_batch()
    optimizer.step()
    assert counter.end_batch() == 1


def test_a_step_counts_once(module: Manual, counter: StepCounter) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        counter.begin_batch()
        optimizer.step()
        assert counter.in_batch == 1
        assert counter.end_batch() == 1
        assert counter.in_batch == 0


def test_a_step_counts_while_a_server_of_this_process_makes_one(
    module: Manual, counter: StepCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    server = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    looks, goes_on, find = threading.Event(), threading.Event(), counter._has_parameters_of_module

    def find_slowly(optimizer: torch.optim.Optimizer) -> bool:
        if optimizer is server:
            looks.set()
            assert goes_on.wait(10)
        return find(optimizer)

    monkeypatch.setattr(counter, "_has_parameters_of_module", find_slowly)
    thread = threading.Thread(target=server.step, daemon=True)
    thread.start()
    assert looks.wait(10)
    counter.begin_batch()
    counter._on_step_begin(optimizer)
    goes_on.set()
    thread.join(10)
    counter._on_step_end(optimizer)
    assert counter.end_batch() == 1


def test_a_batch_that_is_none_has_no_steps(counter: StepCounter) -> None:
    """Lightning ends it without having begun it, and the global step has moved since the batch before."""
    counter.begin_batch()
    counter._trainer.global_step = 1
    assert counter.end_batch() == 1
    counter._trainer.global_step = 5
    assert counter.end_batch() == 0
    assert (counter.batches, counter.steps) == (1, 1)
