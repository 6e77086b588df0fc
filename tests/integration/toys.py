"""The smallest module and data that show everything, and the checks that every test makes after a fit."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_halos import AlgorithmStrategy, HalosStrategy
from tests.integration.harness import Result

WORKERS, LOCAL_STEPS = 4, 4
SAMPLES, FEATURES, BATCH = 256, 8, 4
PAUSE = 0.02  # seconds per batch: so that the work, not the machine's scheduler, decides how the workers interleave


def samples(number: int = SAMPLES) -> TensorDataset:
    """Inputs, targets, and the index of each sample."""
    inputs = torch.randn(number, FEATURES, generator=torch.Generator().manual_seed(7))
    return TensorDataset(inputs, inputs.sum(1, keepdim=True), torch.arange(number))


def loader(number: int = SAMPLES, batch_size: int = BATCH, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(samples(number), batch_size=batch_size, **kwargs)


class Toy(pl.LightningModule):
    """Linear regression that records its samples. Every process starts from different weights.

    Attributes:
        pause: Seconds that a batch takes at least.
        slow: Rank of a worker that is 4 times slower than the others, ``None`` if there is none.
    """

    pause = PAUSE
    slow: int | None = None

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or nn.Sequential(nn.Linear(FEATURES, 4), nn.Linear(4, 1))
        self.trained_on: list[int] = []
        self.validated_on: list[list[int]] = []
        self.optimizer_steps = 0
        self.local_steps = 0
        self.server_steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(self.pause * (4 if self.global_rank == self.slow else 1))
        self.trained_on += batch[2].tolist()
        return self.loss(batch)

    def loss(self, batch: Any) -> Tensor:
        return mse_loss(self.net(batch[0]), batch[1])

    def on_validation_start(self) -> None:
        self.validated_on.append([])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated_on[-1] += batch[2].tolist()
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return self.counted(torch.optim.AdamW(self.parameters(), lr=1e-2))

    def counted(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        optimizer.register_step_post_hook(self._count)
        return optimizer

    def on_train_end(self) -> None:
        strategy = self.trainer.strategy
        assert isinstance(strategy, AlgorithmStrategy)
        assert strategy.round is not None
        self.local_steps += strategy.round.total_steps
        if strategy.servers is not None:
            self.server_steps += strategy.servers.steps

    def more(self) -> Result:
        """Further results of a test with its own module."""
        return {}

    def _count(self, *_: Any) -> None:
        self.optimizer_steps += 1


class HoldingBack(Toy):
    """The last worker waits in its second batch until the others together have taken ``AHEAD`` batches.

    If they waited for its round, they could take two rounds each, however fast the processes are.
    """

    AHEAD = 12 * LOCAL_STEPS

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank < WORKERS - 1:
            Path(f"batch-{self.global_rank}-{self.optimizer_steps}").touch()
        elif self.optimizer_steps == 1:
            wait_for(lambda: len(list(Path().glob("batch-*"))) >= self.AHEAD, "the others wait for the slow worker")
        return super().training_step(batch, batch_idx)


def wait_for(condition: Callable[[], bool], otherwise: str, limit: float = 120.0) -> None:
    """Waits until a condition holds, so that a test's processes come to a point in the same order at any speed.

    Raises:
        AssertionError: If it does not hold after ``limit`` seconds; ``otherwise`` says what that means.
    """
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.01)


def meet(place: str, rank: int, number: int) -> None:
    """Waits until a number of processes have come to a place, which has a name in the present folder."""
    Path(f"{place}.{rank}").touch()
    wait_for(lambda: len(list(Path().glob(f"{place}.*"))) >= number, f"not all processes came to {place}")


class Watching(Checkpoint):
    """Records the global step when checkpoints are saved."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen.append(trainer.global_step)


def halos(**kwargs: Any) -> HalosStrategy:
    fixed = {"regions": 2, "local_steps": LOCAL_STEPS, "accumulate_updates": 4, "timeout": 60}
    return HalosStrategy(**{**fixed, **kwargs})


def make_trainer(strategy: Any = None, **kwargs: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "log_every_n_steps": 10}
    fixed = {"accelerator": "cpu", "devices": WORKERS, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return pl.Trainer(strategy=strategy or halos(), **{**quiet, **fixed, **kwargs})


def fit(module: Toy, **kwargs: Any) -> Result:
    """Fits a module to the usual samples."""
    start, trainer = state(module), make_trainer(**kwargs)
    trainer.fit(module, loader())
    return outcome(trainer, module, start=start)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def outcome(trainer: pl.Trainer, module: Toy, **more: Any) -> Result:
    return {
        "global_step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "schedules": [config.scheduler.last_epoch for config in trainer.lr_scheduler_configs],
        "lrs": [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups],
        "metrics": {name: value.tolist() for name, value in trainer.callback_metrics.items()},
        "state": state(module),
        "trained_on": module.trained_on,
        "validated_on": module.validated_on,
        "optimizer_steps": module.optimizer_steps,
        "local_steps": module.local_steps,
        "server_steps": module.server_steps,
        **more,
    }


def assert_same_model(results: list[Result]) -> None:
    """Every rank ends with the same weights and buffers, bit for bit; and they are numbers."""
    for result in results:
        assert result["state"].keys() == results[0]["state"].keys()
        for name, tensor in result["state"].items():
            assert torch.isfinite(tensor).all(), name
            assert torch.equal(tensor, results[0]["state"][name]), name


def assert_no_step_lost(results: list[Result]) -> None:
    """The servers counted every step that an optimizer took."""
    for result in results:
        assert result["local_steps"] == result["optimizer_steps"]
    assert results[0]["server_steps"] == sum(result["optimizer_steps"] for result in results)


def assert_trained(results: list[Result], max_steps: int) -> None:
    """At least the steps that were ordered, none lost; one schedule and one model.

    How many more there are depends on how long a stop notice takes, which a busy machine decides: ``test_nodes`` and
    the chaos runs have the limit.
    """
    assert sum(result["optimizer_steps"] for result in results) >= max_steps * len(results)
    assert_no_step_lost(results)
    for result in results:
        assert result["global_step"] == max_steps
        assert set(result["schedules"]) <= {max_steps}
        assert result["lrs"] == results[0]["lrs"]
    assert_same_model(results)
