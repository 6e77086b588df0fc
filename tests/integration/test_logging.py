"""Users' metrics: during a fit they are the worker's own, otherwise those of all workers."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanSquaredError
from torchmetrics.classification import BinaryConfusionMatrix

from tests.integration.conftest import Run
from tests.integration.harness import Result
from tests.integration.toys import (
    LOCAL_STEPS,
    Toy,
    assert_no_step_lost,
    assert_trained,
    loader,
    make_trainer,
    outcome,
    samples,
)
from tests.integration.virtual import simulate

HELD_OUT = 60  # 15 per worker: three whole batches and a part of one


class Measured(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.measures = nn.ModuleDict({name: MeanSquaredError() for name in ("train_", "val", "test")})
        self.steps: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.steps.append(float(loss))
        self.measures["train_"](self.net(batch[0]), batch[1])
        self.log("train_mse", self.measures["train_"], on_step=True, on_epoch=True)
        self.log("train_loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.measure("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.measure("test", batch)

    def measure(self, name: str, batch: Any) -> None:
        self.measures[name].update(self.net(batch[0]), batch[1])
        self.log(f"{name}_mse", self.measures[name])
        self.log(f"{name}_loss", self.loss(batch), sync_dist=True)
        self.log(f"{name}_largest", batch[2].max().float(), sync_dist=True, reduce_fx="max")
        self.log(f"{name}_alone", float(self.global_rank), rank_zero_only=True)


def measured() -> Result:
    module, held_out = Measured(), loader(HELD_OUT)
    trainer = make_trainer(max_epochs=1, val_check_interval=0.5)
    trainer.fit(module, loader(), held_out)
    fitted = outcome(trainer, module, steps=module.steps)
    (validated,) = trainer.validate(module, held_out, verbose=False)
    (tested,) = trainer.test(module, held_out, verbose=False)
    (again,) = trainer.validate(module, held_out, verbose=False)
    return {**fitted, "validated": dict(validated), "tested": dict(tested), "again": dict(again)}


def test_metrics(run: Run) -> None:
    results = run(measured)
    assert_trained(results, max_steps=16)
    module = Measured()
    module.load_state_dict(results[0]["state"])
    inputs, targets, _ = samples(HELD_OUT).tensors
    whole = pytest.approx(float(mse_loss(module.net(inputs), targets).detach()), rel=1e-5)

    first = results[0]["metrics"]
    own = results[0]["steps"]
    assert first["train_mse_epoch"] == pytest.approx(sum(own) / len(own), rel=1e-5)
    assert first["train_loss_epoch"] == pytest.approx(sum(own) / len(own), rel=1e-5)
    assert first["train_loss_step"] == pytest.approx(own[-1], rel=1e-5)
    assert (first["val_mse"], first["val_loss"], first["val_largest"]) == (whole, whole, HELD_OUT - 1)
    for result in results:
        assert result["metrics"]["val_mse"] == first["val_mse"]
        assert result["validated"] == result["again"]
        for name, found in (("val", result["validated"]), ("test", result["tested"])):
            assert (found[f"{name}_mse"], found[f"{name}_loss"], found[f"{name}_largest"]) == (
                whole,
                whole,
                HELD_OUT - 1,
            )


class Confused(Toy):
    """Logs a metric of several numbers, as Lightning allows if no logger gets it."""

    def __init__(self) -> None:
        super().__init__()
        self.confusion = BinaryConfusionMatrix()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.confusion.update(self.net(batch[0]), (batch[1] > 0).int())
        self.log("confusion", self.confusion, logger=False)
        self.log("val_loss", self.loss(batch))


def test_a_metric_of_several_numbers_stays_on_rank_0(tmp_path: Path) -> None:
    first, *others = simulate(tmp_path, Confused(), loader(), loader(16), max_steps=20, val_check_interval=10)
    assert sum(map(sum, first["metrics"]["confusion"])) == 16
    for other in others:
        assert "confusion" not in other["metrics"]
        assert other["metrics"]["val_loss"] == first["metrics"]["val_loss"]


class Decaying(Toy):
    """With a learning rate that tells the schedule's position."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("mine", 1.0)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = self.counted(torch.optim.SGD(self.parameters(), lr=1e-4))
        scheduler = LambdaLR(optimizer, lambda step: 100 - step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize("slow", [None, 0])
def test_logs_are_over_the_global_step(tmp_path: Path, slow: int | None) -> None:
    results = simulate(
        tmp_path,
        Decaying(),
        loader(),
        loader(16),
        slow=slow,
        max_steps=60,
        log_every_n_steps=20,
        logger=CSVLogger(tmp_path, "", ""),
        callbacks=[LearningRateMonitor("step")],
        val_check_interval=30,
        check_val_every_n_epoch=None,
    )
    assert_trained(results, max_steps=60)
    (path,) = tmp_path.rglob("metrics.csv")
    steps = defaultdict(list)
    with path.open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value:
                    steps[name].append(int(row["step"]))
                if value and name == "lr-SGD":
                    position = 100 - float(value) / 1e-4
                    assert abs(position - int(row["step"])) <= 4 * LOCAL_STEPS
    # As under DDP: Lightning counts from 0.
    assert steps["mine"] == [19, 39, 59]
    assert steps["lr-SGD"] in ([19, 39, 59], [19, 39])  # the last one if this worker has a batch there
    assert steps["val_loss"] == [29, 59]


def test_logging_every_step_does_not_move_the_global_step(tmp_path: Path) -> None:
    flags: dict[str, Any] = {"max_steps": 40, "log_every_n_steps": 1, "logger": CSVLogger(tmp_path, "", "")}
    results = simulate(tmp_path, Decaying(), loader(), slow=0, **flags)
    assert_trained(results, max_steps=40)
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["mine"]]
    assert steps == sorted(steps)
    # Rank 0 is slow: the others make most of the global steps.
    assert results[0]["optimizer_steps"] < min(result["optimizer_steps"] for result in results[1:])
    assert steps[-1] > results[0]["optimizer_steps"]


@pytest.mark.parametrize("scheduling", [{0: 2}, {0: 1, 1: 4}], ids=str)
def test_no_log_is_past_the_last_step_when_the_others_have_used_up_data_of_their_own(
    tmp_path: Path, scheduling: dict[int, int]
) -> None:
    """Rank 0 is slow: the global step seems to grow fast until the others have ended."""
    results = simulate(
        tmp_path,
        Decaying(),
        loader(128),
        slow=0,
        regions=(1, 1),
        strategy={"local_steps": 8, "dynamic_local_steps": False},
        max_epochs=2,
        log_every_n_steps=1,
        logger=CSVLogger(tmp_path, "", ""),
        callbacks=[GradientAccumulationScheduler(scheduling)],
    )
    assert_no_step_lost(results)
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == sorted(steps)
    assert steps[-1] == results[0]["global_step"] - 1
