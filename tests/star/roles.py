"""What the processes of a star do: the server's command, and a region's training script.

Started as ``python -m tests.star.roles ROLE ARGUMENTS``, or forked by ``processes``. A region's script is one that a
user would write, with a callback that writes down what it trains on.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_halos import HalosStrategy, cli
from tests.star.evidence import Witness

FEATURES, NOISE = 8, 0.1
HURRY = "hurry"
"""Name of the file, in the folder of the evidence, with which a test lets batches take no longer than they must."""
MISTAKE = "a mistake in the user's code"


@dataclass(frozen=True)
class Task:
    """What a star trains. All its jobs get the same.

    Attributes:
        epochs: Epochs.
        samples: Samples of an epoch.
        batch: Samples of a batch.
        pause: Seconds that a batch takes at least, until the test lets all hurry.
        local_steps: Steps of a round.
        accumulate: Pushes between two exchanges with the global server.
        timeout: ``HalosStrategy(timeout=...)``.
        overlap: 1 for ``HalosStrategy(overlap=True)``.
        wire: ``HalosStrategy(wire=...)``.
        width: Hidden units of the network.
    """

    epochs: int = 2
    samples: int = 768
    batch: int = 4
    pause: float = 0.02
    local_steps: int = 4
    accumulate: int = 4
    timeout: float = 30.0
    overlap: int = 0
    wire: str = "float32"
    width: int = 32

    @property
    def steps(self) -> int:
        """Steps of all workers together."""
        return self.epochs * self.samples // self.batch

    def environment(self) -> dict[str, str]:
        return {f"TASK_{name.upper()}": str(value) for name, value in asdict(self).items()}

    @classmethod
    def of_environment(cls) -> Task:
        return cls(**{name: type(value)(os.environ[f"TASK_{name.upper()}"]) for name, value in asdict(cls()).items()})


def teacher(inputs: Tensor) -> Tensor:
    """A smooth function that a small network learns within a minute."""
    return torch.sin(inputs.sum(1, keepdim=True)) + 0.5 * inputs[:, :1]


def samples(number: int, seed: int = 7) -> TensorDataset:
    """Inputs, noisy targets, and the index of each sample."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(number, FEATURES, generator=generator) / FEATURES**0.5
    noise = NOISE * torch.randn(number, 1, generator=generator)
    return TensorDataset(inputs, teacher(inputs) + noise, torch.arange(number))


def network(width: int = 32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, width), nn.Tanh(), nn.Linear(width, 1))


def loss_of(state: dict[str, Tensor]) -> float:
    """Mean squared distance from the teacher, of a model's state dict, on samples that nobody trained on."""
    module = Module(0.0)
    module.load_state_dict(state)
    inputs = samples(4096, seed=8).tensors[0]
    with torch.no_grad():
        return float(mse_loss(module.net(inputs), teacher(inputs)))


class Module(pl.LightningModule):
    """Regression; every process starts from different weights."""

    def __init__(self, pause: float, width: int = 32, folder: Path | None = None) -> None:
        super().__init__()
        self.net = network(width)
        self.pause = pause
        self.hurry = None if folder is None else folder / HURRY

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.hurry is None or not self.hurry.exists():
            time.sleep(self.pause)
        loss = mse_loss(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def serve(*arguments: str) -> None:
    """``lightning-halos serve``."""
    sys.exit(cli.main(["serve", *arguments]))


def region(folder: str, name: str) -> None:
    """One process of a region's job. HALOS_SERVER and HALOS_KEYS say where the star is, as they would for a user."""
    task = Task.of_environment()
    signal.signal(signal.SIGUSR2, _make_a_mistake)
    torch.set_num_threads(1)
    torch.manual_seed(os.getpid())
    worker = int(os.environ.get("TASK_WORKER", "1"))
    strategy = HalosStrategy(
        local_steps=task.local_steps,
        accumulate_updates=task.accumulate,
        timeout=task.timeout,
        overlap=bool(task.overlap),
        wire=task.wire,
        grace_time=5,
        worker=worker,
    )
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=2 * worker,
        max_epochs=task.epochs,
        callbacks=[Witness(Path(folder), name)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    data = DataLoader(samples(task.samples), batch_size=task.batch // worker, shuffle=True)
    trainer.fit(Module(task.pause, task.width, Path(folder)), data)


def _make_a_mistake(*_: object) -> None:
    raise RuntimeError(MISTAKE)


if __name__ == "__main__":
    {"serve": serve, "region": region}[sys.argv[1]](*sys.argv[2:])
