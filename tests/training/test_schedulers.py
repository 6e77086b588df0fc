import copy
import warnings
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)

from lightning_halos.training.schedulers import SchedulePosition


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)


def trainer_of(configs: list[LRSchedulerConfig], *optimizers: torch.optim.Optimizer) -> Any:
    """The part of a Trainer that has to do with schedulers."""
    return SimpleNamespace(
        lightning_module=Module(), lr_scheduler_configs=configs, optimizers=list(optimizers), global_step=0
    )


def adamw() -> torch.optim.Optimizer:
    return torch.optim.AdamW(Module().parameters(), lr=1.0, weight_decay=0.1)


def positioned(scheduler: Any, *, rank: int = 1, limit: int | None = 100, **config: Any) -> SchedulePosition:
    """The position of one scheduler, with a frequency and an interval as in Lightning."""
    configs = [LRSchedulerConfig(scheduler, **{"interval": "step", **config})]
    return SchedulePosition(trainer_of(configs, scheduler.optimizer), 0, limit, rank == 0, epoch_steps=10)


def scheduled(optimizer: torch.optim.Optimizer) -> list[float]:
    """What the schedulers here change."""
    return [optimizer.param_groups[0]["lr"], *optimizer.param_groups[0]["betas"]]


def test_a_schedule_moves_without_a_warning_before_the_workers_first_own_step() -> None:
    optimizer = adamw()
    position = positioned(LambdaLR(optimizer, lambda step: 1 / (1 + step)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        position.pull(3, [])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1 / 4)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("kind", [CosineAnnealingLR, OneCycleLR])
def test_after_a_pull_all_that_a_scheduler_changes_is_as_in_a_run_of_one_process(kind: Any) -> None:
    def make() -> LRScheduler:
        if kind is OneCycleLR:  # it changes the betas, too
            return OneCycleLR(adamw(), max_lr=1.0, total_steps=100)
        return CosineAnnealingLR(adamw(), 100)

    scheduler, alone = make(), make()
    position = positioned(scheduler)
    for pulled, own in ((3, 5), (9, 1), (20, 40)):
        for _ in range(own):
            scheduler.step()
        position.pull(pulled, [])
        while alone.last_epoch < pulled:
            alone.step()
        assert scheduler.last_epoch == pulled
        assert scheduled(scheduler.optimizer) == pytest.approx(scheduled(alone.optimizer))


def test_what_the_module_sets_itself_stays_beside_a_schedule() -> None:
    optimizer = adamw()
    position = positioned(OneCycleLR(optimizer, max_lr=1.0, total_steps=100))
    position.pull(2, [])
    optimizer.param_groups[0].update(weight_decay=0.5, amsgrad=True)
    for step in (4, 8):
        position.pull(step, [])
        assert (optimizer.param_groups[0]["weight_decay"], optimizer.param_groups[0]["amsgrad"]) == (0.5, True)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_rate_that_a_hook_sets_between_two_batches_is_the_one_from_which_the_schedule_goes_on() -> None:
    """As that of a backbone, which Lightning's BackboneFinetuning raises at the start of each epoch."""
    scheduler = ExponentialLR(adamw(), 0.5)
    group = scheduler.optimizer.param_groups[0]
    position = positioned(scheduler)
    for step in range(1, 4):
        position.before_batch(0)
        scheduler.step()
        position.pull(step, [])
        position.end_batch()
    assert group["lr"] == 1 / 8
    group["lr"] = 3.0
    for own in range(2):
        position.before_batch(own)
        scheduler.step()
        position.end_batch()
    position.before_batch(2)
    position.pull(5, [])
    assert group["lr"] == 3 / 4


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_rate_that_a_hook_sets_before_the_first_batch_is_kept() -> None:
    scheduler = ExponentialLR(adamw(), 0.5)
    group = scheduler.optimizer.param_groups[0]
    position = positioned(scheduler)
    position.end_batch()  # as a worker does before the first epoch
    group["lr"] = 3.0
    position.before_batch(0)
    scheduler.step()
    group["lr"] *= 2  # by a callback at the end of the batch, before the worker counts it
    position.pull(1, [])
    assert group["lr"] == 3 / 2
    group["lr"] = 5.0
    position.before_batch(0)
    position.pull(2, [])
    assert group["lr"] == 5 / 2


def test_settings_of_several_numbers_are_left_alone() -> None:
    optimizer = adamw()
    optimizer.param_groups[0]["scales"] = torch.ones(2)
    position = positioned(ExponentialLR(optimizer, 0.5))
    position.pull(2, [])
    optimizer.param_groups[0]["scales"] = torch.zeros(2)
    position.pull(3, [])
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["scales"].tolist()) == (1 / 8, [0, 0])


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_schedulers_that_a_hook_sets_up_anew_begin_where_the_run_is() -> None:
    first = OneCycleLR(adamw(), max_lr=1.0, total_steps=100)
    trainer = trainer_of([LRSchedulerConfig(first, interval="step")], first.optimizer)
    position = SchedulePosition(trainer, 0, 100, False)
    position.pull(30, [])
    trainer.global_step = 40  # this worker is ahead of what it has heard of the run
    anew = OneCycleLR(adamw(), max_lr=1.0, total_steps=60)
    trainer.lr_scheduler_configs, trainer.optimizers = [LRSchedulerConfig(anew, interval="step")], [anew.optimizer]
    position.before_batch(0)
    anew.step()
    position.pull(47, [])
    assert (anew.last_epoch, first.last_epoch) == (7, 30)
    position.before_batch(0)
    position.pull(130, [])
    assert anew.last_epoch == 60


def test_a_schedule_by_epoch_follows_the_epochs_of_the_run() -> None:
    scheduler = StepLR(adamw(), 1, 0.5)
    position = positioned(scheduler, interval="epoch", frequency=3)
    for pulled, steps in ((29, 0), (30, 1), (89, 2), (90, 3)):
        position.pull(pulled, [])
        assert scheduler.last_epoch == steps


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_steps_of_a_plateau_scheduler_that_only_another_job_has_are_left_out() -> None:
    optimizer, plateau = adamw(), ReduceLROnPlateau(adamw(), patience=0, factor=0.5)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    configs = [
        LRSchedulerConfig(schedule, interval="step"),
        LRSchedulerConfig(plateau, interval="step", reduce_on_plateau=True, monitor="val_loss"),
    ]
    trainer = trainer_of(configs, optimizer, plateau.optimizer)
    position = SchedulePosition(trainer, 0, 100, False, epoch_steps=10)
    with pytest.warns(UserWarning, match=r"index \d+, and this one has not"):
        position.pull(3, [(0, 1.0), (7, 1.0), (1, 1.0), (1, 2.0), (10**18, 2.0)])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1 / 4)
    assert plateau.optimizer.param_groups[0]["lr"] == pytest.approx(0.5)


def test_a_plateau_step_of_the_last_validation_is_made_once_when_more_epochs_follow() -> None:
    def make(rank: int) -> tuple[Any, SchedulePosition]:
        scheduler: Any = ReduceLROnPlateau(adamw(), factor=0.5, patience=0)
        return scheduler, positioned(scheduler, rank=rank, reduce_on_plateau=True, monitor="val_loss")

    scheduler, position = make(rank=1)
    history = [(0, 1.0), (0, 1.0)]
    position.pull(10, history[:1])
    position.catch_up(history)
    saved = copy.deepcopy((scheduler.state_dict(), position.state_dict()))

    resumed, again = make(rank=1)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    again.pull(10, history[len(again.history) :])
    assert resumed.last_epoch == 2
    assert again.history == history


def test_a_checkpoint_with_another_number_of_schedulers_is_a_warning() -> None:
    optimizer = adamw()
    schedulers = [LambdaLR(optimizer, lambda step: 1 / (1 + step)), StepLR(optimizer, 10)]
    configs = [LRSchedulerConfig(scheduler, interval="step") for scheduler in schedulers]
    both = SchedulePosition(trainer_of(configs, optimizer), 0, 100, False, epoch_steps=10)
    both.pull(5, [])
    one = positioned(LambdaLR(adamw(), lambda step: 1 / (1 + step)))
    with pytest.warns(UserWarning, match=r"positions of 2 learning-rate scheduler\(s\), but the module now makes 1"):
        one.load_state_dict(both.state_dict())
    one.pull(3, [])
    assert one._settings().__next__()["lr"] == pytest.approx(1 / 4)
