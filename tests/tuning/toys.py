"""The smallest module that can be tuned, and functions that make it, well or badly."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_halos import SimulatedCluster

CLUSTER = SimulatedCluster([[10.0, 0.3], [0.3, 10.0]], [[1.0], [0.5]], step_ms=100, message_bytes=10_000_000)


class Regression(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[0].sum(1, keepdim=True))

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val_loss", self.training_step(batch, 0))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.02)

    def train_dataloader(self) -> DataLoader[Any]:
        return loader()


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(64, 4, generator=torch.Generator().manual_seed(1))), 4)


def make() -> Any:
    return Regression(), loader(), loader()


def count_call(path: Path) -> int:
    """Adds a call to a file, and returns its number. No two calls get the same one, in whichever processes they are."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(file, b".")
        return os.lseek(file, 0, os.SEEK_CUR)  # the end of what this call has written
    finally:
        os.close(file)


class Killed:
    """Makes a module, and kills its process from a number of calls on, while a process that this has started lives."""

    def __init__(self, path: Path, first: int) -> None:
        self.path, self.first = path, first

    def __call__(self) -> Any:
        if count_call(self.path) >= self.first:
            if os.fork() == 0:
                time.sleep(60)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
        return make()


class Counting:
    """Makes a module, and counts the calls in a file. It fails at one of them, and sends SIGINT at another one."""

    def __init__(self, path: Path, fails_at: int = 0, interrupts_at: int = 0) -> None:
        self.path, self.fails_at, self.interrupts_at = path, fails_at, interrupts_at
        self.search = os.getpid()

    def __call__(self) -> Any:
        number = count_call(self.path)
        if number == self.fails_at:
            raise RuntimeError("no memory is left")
        if number == self.interrupts_at:
            os.kill(self.search, signal.SIGINT)
        return make()
