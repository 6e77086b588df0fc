"""A region's script with everything that one job decides for all: validation, checkpoints, early stopping, plateaus."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from lightning_halos import HalosMonitor, HalosStrategy
from tests.star.evidence import Witness
from tests.star.roles import Module, Task, samples

HELD_OUT = samples(64, seed=9)


class Deciding(Module):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", mse_loss(self.net(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", mse_loss(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1.0)
        self.steps = int(self.trainer.estimated_stepping_batches)
        self.schedule = torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lambda step: 1.0)
        every_step = {"scheduler": self.schedule, "interval": "step"}
        return [optimizer], [{"scheduler": plateau, "monitor": "val_loss"}, every_step]


class Journal(Callback):
    """Writes down what this process validates, and what it knows at the end."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name

    def _write(self, kind: str, **values: Any) -> None:
        line = json.dumps({"kind": kind, "region": self._name, "pid": os.getpid(), **values}) + "\n"
        file = os.open(self._folder / "journal", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.write(file, line.encode())
        os.close(file)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.completed == 0:
            scheduled = module.schedule.last_epoch
            self._write("begin", step=trainer.global_step, epoch=trainer.current_epoch, scheduled=scheduled)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            stopping = trainer.early_stopping_callback
            assert stopping is not None
            self._write(
                "validated",
                rank=trainer.global_rank,
                step=trainer.global_step,
                loss=float(trainer.callback_metrics["val_loss"]),
                waited=stopping.wait_count,
            )

    def on_test_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._write("tested", loss=float(trainer.callback_metrics["test_loss"]))

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._write(
            "end",
            rank=trainer.global_rank,
            estimate=module.steps,
            step=trainer.global_step,
            rate=trainer.optimizers[0].param_groups[0]["lr"],
            loss=float(trainer.callback_metrics.get("val_loss", float("nan"))),
        )


def held_out_loss(state: dict[str, Tensor]) -> float:
    """The loss of a model's state dict on the samples of validations and tests."""
    module = Deciding(0.0)
    module.load_state_dict(state)
    inputs, targets, _ = HELD_OUT.tensors
    with torch.no_grad():
        return float(mse_loss(module.net(inputs), targets))


def deciding_region(folder: str, name: str) -> None:
    """One worker of a region's job; see ``roles.region``."""
    task = Task.of_environment()
    torch.set_num_threads(1)
    torch.manual_seed(os.getpid())
    strategy = HalosStrategy(
        local_steps=task.local_steps, accumulate_updates=task.accumulate, timeout=task.timeout, grace_time=5
    )
    places = Path(folder)
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=2,
        max_epochs=task.epochs,
        callbacks=[
            Journal(places, name),
            Witness(places, name),
            HalosMonitor(),
            EarlyStopping("val_loss", patience=1000, min_delta=1000.0),
            ModelCheckpoint(places / f"checkpoints-{name}", monitor="val_loss", save_top_k=2),
        ],
        val_check_interval=20,
        check_val_every_n_epoch=None,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    data = DataLoader(samples(task.samples), batch_size=task.batch, shuffle=True)
    held_out = DataLoader(HELD_OUT, batch_size=32)
    trainer.fit(Deciding(task.pause, folder=places), data, held_out)
    trainer.test(dataloaders=held_out)
    trainer.test(ckpt_path="best", dataloaders=held_out)
