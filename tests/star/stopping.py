"""A region's script that starts from a checkpoint, has schedules with closed formulas, and stops when a test says so.

A test says so with an empty file. All files are in the folder of the evidence.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.utils.data import DataLoader

from lightning_halos import HalosStrategy
from tests.star.evidence import Witness
from tests.star.roles import Module, Task, samples

RATE = 3e-3
CHECKPOINT = "start.ckpt"  # from which all start, if it exists
STOP = "stop-{}"  # lets the worker of that name set trainer.should_stop
STOP_EARLY = "stop-early"  # lets EarlyStopping stop, where it validates


def one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> OneCycleLR:
    """It changes the rate and AdamW's first beta."""
    return OneCycleLR(optimizer, max_lr=RATE, total_steps=steps)


def fading(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 1 - step / (steps + 1))


class Scheduled(Module):
    """Rank 0 of a job has a ``OneCycleLR``, the others have a ``LambdaLR``."""

    def __init__(self, pause: float, folder: Path) -> None:
        super().__init__(pause)
        self.folder = folder

    def configure_optimizers(self) -> Any:
        steps = int(self.trainer.estimated_stepping_batches)
        optimizer = torch.optim.AdamW(self.parameters(), lr=RATE)
        schedule = (one_cycle if self.trainer.global_rank == 0 else fading)(optimizer, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", torch.tensor(0.0 if (self.folder / STOP_EARLY).exists() else 1.0))


class Noting(Callback):
    """Writes down how this process begins, and stops when a test says so."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.completed:
            return
        worker = f"{self._name}-{trainer.global_rank}"
        torch.save(module.state_dict(), self._folder / f"{worker}.begin")
        group = trainer.optimizers[0].param_groups[0]
        line = {"worker": worker, "step": trainer.global_step, "rate": group["lr"], "beta": group["betas"][0]}
        file = os.open(self._folder / "begins", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.write(file, (json.dumps(line) + "\n").encode())
        os.close(file)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if (self._folder / STOP.format(f"{self._name}-{trainer.global_rank}")).exists():
            trainer.should_stop = True


def stopping_region(folder: str, name: str) -> None:
    """One worker of a region's job; see ``roles.region``."""
    task, places = Task.of_environment(), Path(folder)
    checkpoint = places / CHECKPOINT if (places / CHECKPOINT).exists() else None
    torch.set_num_threads(1)
    torch.manual_seed(os.getpid())
    strategy = HalosStrategy(
        local_steps=task.local_steps, accumulate_updates=task.accumulate, timeout=task.timeout, grace_time=5
    )
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=2,
        max_epochs=task.epochs,
        callbacks=[
            Noting(places, name),
            Witness(places, name),
            EarlyStopping("val_loss", stopping_threshold=0.5, patience=10**6),
            ModelCheckpoint(places / f"checkpoints-{name}", "{step}", every_n_train_steps=5, save_last=True),
        ],
        val_check_interval=5,
        check_val_every_n_epoch=None,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    data = DataLoader(samples(task.samples), batch_size=task.batch, shuffle=True)
    module = Scheduled(task.pause, places)
    held_out = DataLoader(samples(8, seed=9), batch_size=8)
    trainer.fit(module, data, held_out, ckpt_path=checkpoint)
