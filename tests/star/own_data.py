"""A region's script in which each worker reads a stream of its own, which only ends when it is read to the end.

A test opens the gate to the last epoch with an empty file, ``GATE``, in the folder of the evidence.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, IterableDataset

from lightning_halos import HalosStrategy
from tests.star.evidence import Witness
from tests.star.roles import Module, Task, samples

GATE = "gate"
_LIMIT = 600.0  # seconds; the test has shorter limits


class Stream(IterableDataset[Any]):
    """All samples, in order. It has no length."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Iterator[Any]:
        data = samples(self.number)
        yield from (data[index] for index in range(self.number))


class Gate(Callback):
    """Lets no worker begin its last epoch before the test says so."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / GATE

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert trainer.max_epochs is not None
        deadline = time.monotonic() + _LIMIT
        while trainer.current_epoch + 1 == trainer.max_epochs and not self._path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)


def own_data_region(folder: str, name: str) -> None:
    """One worker of a region's job; see ``roles.region``."""
    task, places = Task.of_environment(), Path(folder)
    torch.set_num_threads(1)
    strategy = HalosStrategy(
        local_steps=task.local_steps, accumulate_updates=task.accumulate, timeout=task.timeout, grace_time=5
    )
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=2,
        max_epochs=task.epochs,
        callbacks=[Witness(places, name), Gate(places)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(os.getpid())
    trainer.fit(Module(task.pause), DataLoader(Stream(task.samples), batch_size=task.batch))
