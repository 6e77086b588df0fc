"""Learning rates follow the global step on every worker, independently of its own number of steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import RandomSampler

from tests.integration.conftest import Run
from tests.integration.harness import Result
from tests.integration.toys import (
    LOCAL_STEPS,
    Toy,
    assert_no_step_lost,
    assert_same_model,
    assert_trained,
    halos,
    loader,
    make_trainer,
    outcome,
    samples,
)
from tests.integration.virtual import simulate

STEPS = 40


def make_scheduler(kind: str, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    if kind == "one cycle":
        return OneCycleLR(optimizer, 1e-2, total_steps=total_steps)
    return LambdaLR(optimizer, lambda step: 1 - step / (2 * total_steps))


def learning_rate(kind: str, steps: int) -> float:
    """The learning rate of one process after a number of steps, in a schedule of as many steps."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-2)
    scheduler = make_scheduler(kind, optimizer, steps)
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
    return float(optimizer.param_groups[0]["lr"])


class Scheduled(Toy):
    """Records the scheduler's position in every batch."""

    pause = 0.03
    slow = 3

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.positions: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        scheduler: Any = self.lr_schedulers()
        self.positions.append(scheduler.last_epoch)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = self.counted(torch.optim.SGD(self.parameters(), lr=1e-2))
        scheduler = make_scheduler(self.kind, optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def more(self) -> Result:
        return {"positions": self.positions}


@pytest.mark.parametrize("kind", ["lambda", "one cycle"])
def test_schedule_by_step(tmp_path: Path, kind: str) -> None:
    results = simulate(tmp_path, Scheduled(kind), loader(), slow=3, max_steps=STEPS)
    assert_trained(results, max_steps=STEPS)
    for result in results:
        assert result["lrs"] == [pytest.approx(learning_rate(kind, STEPS))]
        assert result["positions"][0] <= LOCAL_STEPS
        assert max(result["positions"]) <= STEPS
    own_steps = [result["optimizer_steps"] for result in results]
    assert own_steps[3] < STEPS * 2 / 3 < STEPS < max(own_steps)
    assert results[3]["positions"][-1] > STEPS * 2 / 3, "a slow worker's schedule is that of all workers"


def scheduled_epochs() -> Result:
    module, trainer = Scheduled("one cycle"), make_trainer(max_epochs=2)
    trainer.fit(module, loader())
    return outcome(trainer, module)


def test_one_cycle_over_epochs(run: Run) -> None:
    results = run(scheduled_epochs)
    for result in results:
        assert result["schedules"] == [32]
        assert result["global_step"] == 32
    assert_no_step_lost(results)
    assert_same_model(results)


class ByEpoch(Toy):
    def configure_optimizers(self) -> Any:
        optimizer = self.counted(torch.optim.SGD(self.parameters(), lr=1e-2))
        return [optimizer], [StepLR(optimizer, step_size=1, gamma=0.5)]


def by_epoch() -> Result:
    module, trainer = ByEpoch(), make_trainer(max_epochs=3)
    trainer.fit(module, loader())
    return outcome(trainer, module)


def test_schedule_by_epoch(run: Run) -> None:
    results = run(by_epoch)
    for result in results:
        assert result["schedules"] == [3]
        assert result["lrs"] == [pytest.approx(1e-2 / 8)]
        assert result["global_step"] == 48
    assert_no_step_lost(results)
    assert_same_model(results)


class EveryThirdEpoch(Toy):
    def configure_optimizers(self) -> Any:
        optimizer = self.counted(torch.optim.SGD(self.parameters(), lr=1e-2))
        return [optimizer], [{"scheduler": StepLR(optimizer, step_size=1), "interval": "epoch", "frequency": 3}]


def test_a_schedule_by_epoch_is_that_of_the_run_where_a_fast_worker_has_more_epochs(tmp_path: Path) -> None:
    own = RandomSampler(samples(16))
    data = loader(16, sampler=own)
    results = simulate(tmp_path, EveryThirdEpoch(), data, slow=3, max_steps=36, use_distributed_sampler=False)
    assert results[0]["epoch"] > 9 > results[3]["epoch"]
    assert [result["schedules"] for result in results] == [[3]] * 4


class Plateau(Toy):
    """A validation loss that never gets better, so every validation but the first lowers the learning rate."""

    slow = 0

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated_on[-1] += batch[2].tolist()
        self.log("val_loss", torch.tensor(1.0))

    def configure_optimizers(self) -> Any:
        optimizer = self.counted(torch.optim.SGD(self.parameters(), lr=1.0))
        scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        plateau = {"scheduler": scheduler, "monitor": "val_loss", **self.config}
        decay = {"scheduler": ExponentialLR(optimizer, 0.9), "interval": "step"}
        return [optimizer], [plateau, decay] if self.config["interval"] == "step" else [plateau]


def plateau(config: dict[str, Any], flags: dict[str, Any]) -> Result:
    module, trainer = Plateau(config), make_trainer(**flags)
    trainer.fit(module, loader(), loader(16))
    return outcome(trainer, module)


@pytest.mark.parametrize(
    ("config", "flags", "decay"),
    [
        ({"interval": "epoch"}, {"max_epochs": 4}, 1.0),
        ({"interval": "step", "frequency": 16}, {"max_steps": 64, "val_check_interval": 16}, 0.9**64),
    ],
    ids=["epoch", "step"],
)
def test_plateau_is_decided_by_rank_0(run: Run, config: dict[str, Any], flags: dict[str, Any], decay: float) -> None:
    results = run(plateau, config, flags)
    validations = len(results[0]["validated_on"])
    # Two that fall due at once, on a busy machine, are one.
    assert validations == 4 or (2 <= validations < 4 and config["interval"] == "step")
    assert [result["lrs"] for result in results] == [[pytest.approx(0.5 ** (validations - 1) * decay)]] * 4
    assert [result["global_step"] for result in results] == [64] * 4
    assert 64 * 4 <= sum(result["optimizer_steps"] for result in results) <= (64 + 2 * LOCAL_STEPS) * 4
    assert_no_step_lost(results)
    assert_same_model(results)


def test_plateau_steps_of_rank_0_in_epochs_without_data_are_repeated_too(tmp_path: Path) -> None:
    results = simulate(tmp_path, Plateau({"interval": "epoch"}), loader(16), loader(8), slow=0, max_epochs=6)
    assert results[0]["optimizer_steps"] == 2, "in four epochs the others take all data"
    assert [result["schedules"] for result in results] == [[6]] * 4
    assert [result["lrs"] for result in results] == [[0.5**5]] * 4


class Raising(Toy):
    """Raises its rate in the middle of a round, at the start of an epoch."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.trainer.optimizers[0].param_groups[0]["lr"] = 1e-2

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-2)
        scheduler = ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def raised() -> Result:
    trainer = make_trainer(halos(regions=1), devices=1, max_epochs=2)
    trainer.fit(Raising(), loader(24))
    return {"rate": trainer.optimizers[0].param_groups[0]["lr"], "steps": trainer.global_step}


def test_a_rate_that_a_hook_sets_in_a_round_does_not_fall_back(run: Run) -> None:
    """An epoch has 6 steps, and a round 4, whose steps before the hook may count once more."""
    (result,) = run(raised, workers=1)
    assert result["steps"] == 12
    assert 1e-2 * 0.9**8 * 0.999 < result["rate"] <= 1e-2 * 0.9**6  # under DDP the latter
