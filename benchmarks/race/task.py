"""What all runs of the race train: the model, the data, the pace of a device, and what a worker writes down.

It knows no strategy. ``lightning_worker`` and ``torchft_worker`` train it, ``rows`` reads what they have written.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from train_char_lm import ByteGPT, StandardLibrary

WORKERS, REGIONS = 4, 2
CONTEXT, BATCH = 64, 4
VALIDATION_WINDOWS = 64
SEED = 0
BETWEEN_MODELS = 4.0  # seconds, at least, between two models that a run writes down


class RaceGPT(ByteGPT):
    """The demo's GPT, with 10.9 million parameters. Its models are evaluated after the run."""

    def __init__(self) -> None:
        super().__init__(context=CONTEXT, depth=6, width=384, heads=6, lr=1e-3)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Does nothing, because a validation only says when to write a model down."""

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Returns the mean loss of a batch, in nats per byte."""
        tokens, targets = batch
        return self._loss((tokens, targets))


class RaceData(StandardLibrary):
    """The demo's data."""

    def __init__(self) -> None:
        super().__init__(CONTEXT, BATCH, VALIDATION_WINDOWS)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(Subset(self.val, [0]), 1)


def message_bytes() -> int:
    """Returns the bytes of the model on a link, in float32."""
    with torch.device("meta"):
        return 4 * sum(parameter.numel() for parameter in RaceGPT().parameters())


class Device:
    """The pace of the device that a worker stands for.

    All workers compute on the cores of one machine. So a batch lasts at least as long as on a device of its own: the
    worker computes for a part of this time and sleeps for the rest. Time in which it waits for others does not count.

    Args:
        seconds: Seconds per batch.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._start = self._slept = 0.0

    def begin(self) -> None:
        """Notes that a batch begins."""
        self._start, self._slept = time.perf_counter(), 0.0

    def sleep_until(self, share: float) -> None:
        """Returns when the device has done a share of the batch."""
        before = time.perf_counter()
        time.sleep(max(0.0, self._start + share * self.seconds - before))
        self._slept += time.perf_counter() - before

    @property
    def computed(self) -> float:
        """Seconds since the batch began, without those of sleep."""
        return time.perf_counter() - self._start - self._slept


class Record:
    """What a worker writes down in the folder of its run, so that a run can be ended at any time.

    Rank 0 writes ``start``, which contains the time of its first batch, and a file for each model. Each worker writes
    ``<rank>.steps``: for each of its local steps the time, and the seconds that it computed.

    Args:
        folder: The folder.
        rank: The worker's rank.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._steps = (folder / f"{rank}.steps").open("a", buffering=1)
        self._has_begun = False
        self._last_model = float("-inf")

    def begin(self) -> None:
        """A batch begins."""
        if self._rank == 0 and not self._has_begun:
            self._replace("start", lambda path: path.write_text(repr(time.time())))
        self._has_begun = True

    def step(self, computed: float) -> None:
        """A local step has ended."""
        print(f"{time.time():.3f} {computed:.3f}", file=self._steps)

    def model(self, module: nn.Module, global_step: int, is_last: bool) -> None:
        """There is a new global model. It is written if it is the last one, or some seconds after the previous one."""
        now = time.time()
        if self._rank == 0 and (is_last or now >= self._last_model + BETWEEN_MODELS):
            self._last_model = now
            content = {"time": now, "global_step": global_step, "model": module.state_dict()}
            self._replace(f"{global_step:05}.pt", lambda path: torch.save(content, path))

    def _replace(self, name: str, write: Callable[[Path], object]) -> None:
        partial = self._folder / f"{name}.partial"
        write(partial)
        os.replace(partial, self._folder / name)
