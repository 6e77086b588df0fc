"""How many steps a worker has left in data of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_halos.training.own_data import steps_left


class Left(Callback):
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps = steps_left(trainer)


def left(folder: Path, *callbacks: Callback, path: Path | None = None, **flags: Any) -> float:
    found = Left()
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu", default_root_dir=folder, callbacks=[found, *callbacks], **{"max_epochs": 3, **quiet, **flags}
    )
    trainer.fit(BoringModel(), ckpt_path=path)  # an epoch has 64 batches
    return found.steps


@pytest.mark.parametrize("step", [5, 64, 70])
def test_they_are_those_that_are_not_done_yet_in_a_resumed_run(tmp_path: Path, step: int) -> None:
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=step, save_top_k=-1)
    assert left(tmp_path, saving) == 3 * 64
    assert left(tmp_path, path=tmp_path / f"step={step}.ckpt") == 3 * 64 - step


def test_accumulation_may_change_and_batches_at_the_end_of_an_epoch_make_a_step(tmp_path: Path) -> None:
    assert left(tmp_path, GradientAccumulationScheduler({0: 1, 1: 3})) == 64 + 22 + 22
    assert left(tmp_path, accumulate_grad_batches=3, limit_train_batches=10) == 3 * 4


def test_without_an_end_they_are_infinite_and_many_epochs_take_no_time(tmp_path: Path) -> None:
    for epochs, steps in ((-1, float("inf")), (10**9, 64 * 10**9)):
        assert left(tmp_path, max_epochs=epochs, max_steps=2) == steps
