"""Schedulers that a module steps itself: which of them follow the run, and which are left alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    SequentialLR,
)

from lightning_halos.training.hand_stepped import HandStepped

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")


class Module(pl.LightningModule):
    def __init__(self, is_automatic: bool) -> None:
        super().__init__()
        self.automatic_optimization = is_automatic
        self.layer = nn.Linear(1, 1)


class WarmUp(LRScheduler):
    """Steps another scheduler, as the well-known packages' warm-ups do."""

    def __init__(self, optimizer: torch.optim.Optimizer, after: LRScheduler) -> None:
        self.after = after
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        return self.after.get_last_lr()

    def step(self, epoch: int | None = None) -> None:
        if hasattr(self, "last_epoch"):
            self.after.step()
        super().step()


class Worker:
    """A worker in a run that is ahead of it or behind it. Its batches have one step each, those without a call none."""

    def __init__(self, module: Module, *configured: LRScheduler) -> None:
        self.counter: Any = SimpleNamespace(batches=0, steps=0, in_batch=1)
        self.progress = SimpleNamespace(is_last_batch=False)
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=self.progress))
        trainer: Any = SimpleNamespace(
            lightning_module=module,
            lr_scheduler_configs=[LRSchedulerConfig(scheduler) for scheduler in configured],
            fit_loop=loop,
        )
        self.hand_stepped = HandStepped(trainer, self.counter, 0)

    def train(self, scheduler: LRScheduler | None, *args: Any, progress: float, ends_epoch: bool = False) -> None:
        self.hand_stepped.begin_batch(progress)
        self.progress.is_last_batch = ends_epoch
        if scheduler is not None:
            scheduler.step(*args)
            self.counter.steps += 1
        self.counter.batches += 1
        if ends_epoch:
            self.hand_stepped.end_epoch()


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


@pytest.mark.parametrize("kind", [SequentialLR, ChainedScheduler, WarmUp, "nested"])
def test_the_parts_of_a_scheduler_that_lightning_steps_belong_to_it(kind: Any) -> None:
    if kind == "nested" and not hasattr(ChainedScheduler([ExponentialLR(sgd(), 0.9)]), "last_epoch"):
        pytest.skip("torch 2.4 has no ChainedScheduler in a SequentialLR")

    def make() -> tuple[LRScheduler, list[LRScheduler]]:
        optimizer = sgd()
        parts: list[Any] = [LinearLR(optimizer, 0.1, 1.0, total_iters=8), ExponentialLR(optimizer, 0.95)]
        if kind is SequentialLR:
            return SequentialLR(optimizer, parts, [8]), parts
        if kind is ChainedScheduler:
            return ChainedScheduler(parts, optimizer), parts
        if kind is WarmUp:
            return WarmUp(optimizer, parts[1]), parts[1:]
        return SequentialLR(optimizer, [ChainedScheduler(parts, optimizer), ExponentialLR(optimizer, 0.9)], [8]), parts

    (scheduler, parts), (alone, _) = make(), make()
    module = Module(is_automatic=True)
    module.parts = parts
    worker = Worker(module, scheduler)
    for _ in range(12):  # this worker is ahead of the run
        worker.train(scheduler, progress=0.5)
        alone.step()
        assert scheduler.get_last_lr() == alone.get_last_lr()
    worker.hand_stepped.pull(30)
    assert scheduler.optimizer.param_groups[0]["lr"] == alone.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("argument", [lambda position: (position,), lambda position: ()])
def test_a_scheduler_that_is_told_its_position_is_left_where_the_module_puts_it(argument: Any) -> None:
    scheduler, alone = CosineAnnealingWarmRestarts(sgd(), T_0=3), CosineAnnealingWarmRestarts(sgd(), T_0=3)
    module = Module(is_automatic=False)
    worker = Worker(module, scheduler)
    for batch in range(8):
        position = () if batch == 0 else (batch / 4,) if batch < 4 else argument(batch / 4)
        worker.train(scheduler, *position, progress=0.5)
        alone.step(*position)
        worker.hand_stepped.pull(5 * batch if batch else 0)
        assert scheduler.get_last_lr() == alone.get_last_lr()


def test_a_scheduler_that_is_told_its_position_is_known_after_a_resume() -> None:
    scheduler = CosineAnnealingWarmRestarts(sgd(), T_0=3)
    worker = Worker(Module(is_automatic=False), scheduler)
    worker.train(scheduler, 0.5, progress=1)
    resumed = Worker(Module(is_automatic=False), scheduler)
    resumed.hand_stepped.load_state_dict(worker.hand_stepped.state_dict())
    before = scheduler.get_last_lr()
    resumed.hand_stepped.pull(9)
    assert scheduler.get_last_lr() == before
    resumed.train(scheduler, progress=1)
    resumed.train(scheduler, progress=1)
    assert scheduler.last_epoch == 2


def test_a_scheduler_that_a_submodule_keeps_follows_the_run() -> None:
    module = Module(is_automatic=False)
    module.layer.schedules = {"layer": CosineAnnealingWarmRestarts(sgd(), T_0=30)}
    scheduler = module.layer.schedules["layer"]
    worker = Worker(module)
    worker.train(scheduler, progress=1)
    worker.hand_stepped.pull(7)
    assert scheduler.last_epoch == 7


@pytest.mark.parametrize("position", [(), (None,)])
def test_a_scheduler_that_counts_its_steps_follows_the_run(position: tuple[Any, ...]) -> None:
    scheduler = CosineAnnealingWarmRestarts(sgd(), T_0=30)
    worker = Worker(Module(is_automatic=False), scheduler)
    for _ in range(3):
        worker.train(scheduler, *position, progress=1)
    assert scheduler.last_epoch == 1
    worker.hand_stepped.pull(9)
    assert scheduler.last_epoch == 9


def test_a_scheduler_that_counts_accumulated_steps_follows_the_run_also_at_the_ends_of_epochs() -> None:
    scheduler = CosineAnnealingWarmRestarts(sgd(), T_0=30)
    worker = Worker(Module(is_automatic=False), scheduler)
    for batch in range(8):
        worker.train(scheduler if batch % 2 else None, progress=1 + batch / 2, ends_epoch=batch % 4 == 3)
    worker.hand_stepped.pull(16)
    assert scheduler.last_epoch == 16


@pytest.mark.parametrize("length", [2, 3])
def test_a_scheduler_that_steps_in_the_last_batch_of_each_epoch_follows_the_worker(length: int) -> None:
    scheduler = CosineAnnealingWarmRestarts(sgd(), T_0=30)
    worker = Worker(Module(is_automatic=False), scheduler)
    for batch in range(4 * length):
        ends_epoch = batch % length == length - 1
        worker.train(scheduler if ends_epoch else None, progress=1, ends_epoch=ends_epoch)
    worker.hand_stepped.pull(16)
    assert scheduler.last_epoch == 4


@pytest.mark.parametrize("owner", ["module", "layer"])
def test_a_scheduler_of_another_phase_begins_where_the_run_is(owner: str) -> None:
    module = Module(is_automatic=False)
    where = module if owner == "module" else module.layer
    where.scheduler = first = CosineAnnealingWarmRestarts(sgd(), T_0=30)
    worker = Worker(module)
    for batch in range(6):  # twice as fast as the run
        worker.train(first, progress=(batch + 1) / 2, ends_epoch=batch == 5)
    before = first.last_epoch
    where.scheduler = anew = CosineAnnealingWarmRestarts(sgd(), T_0=30)
    for step in range(1, 7):
        worker.train(anew, progress=3 + step / 2)
    assert anew.last_epoch == 3
    worker.hand_stepped.pull(10)
    assert (anew.last_epoch, first.last_epoch) == (7, before)
