"""What workers trained on, written down batch by batch, so that it outlives a SIGKILL; and what has to hold for it.

Judges by what the workers wrote themselves and by what the server counted, never by the software's own records of data.
"""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class Witness(Callback):
    """Writes down each batch after the optimizer's step, and the model at the end.

    Args:
        folder: Where.
        name: Of the region.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._file = -1

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        path = self._folder / f"{self._name}-{trainer.global_rank}-{os.getpid()}.batches"
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *arguments: Any) -> None:
        batch = arguments[1]
        indices = ",".join(map(str, batch[2].tolist()))
        # One write for a line: a process that is killed leaves complete lines.
        os.write(self._file, f"{time.time():.3f} {trainer.current_epoch} {indices}\n".encode())

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        os.close(self._file)
        result = {
            "global_step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "state": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        }
        path = self._folder / f"{self._name}-{trainer.global_rank}.pt"
        torch.save(result, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)


@dataclass(frozen=True)
class Batch:
    """A batch that a worker trained on.

    Attributes:
        worker: The worker's process, with its region.
        at: When, by ``time.time``.
        epoch: The Trainer's epoch.
        samples: Indices of its samples.
    """

    worker: str
    at: float
    epoch: int
    samples: tuple[int, ...]


@dataclass
class Evidence:
    """All that the workers of a run wrote."""

    batches: list[Batch] = field(default_factory=list)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Evidence:
        batches = [
            _batch(path.stem, line)
            for path in sorted(folder.glob("*.batches"))
            for line in path.read_text().splitlines()
        ]
        results = {path.stem: torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))}
        return cls(batches, results)

    def repeated(self) -> list[list[Batch]]:
        """Batches that were trained on more than once, each time. Shuffled epochs have no batch in common."""
        times = defaultdict(list)
        for batch in self.batches:
            times[batch.samples].append(batch)
        return [batches for batches in times.values() if len(batches) > 1]

    def useful_steps(self, begin: float = 0.0, end: float = float("inf")) -> int:
        """Steps between two times whose batch was trained on for the first time."""
        first: dict[tuple[int, ...], float] = {}
        for batch in self.batches:
            first[batch.samples] = min(batch.at, first.get(batch.samples, batch.at))
        return sum(begin <= at < end for at in first.values())

    def longest_pause(self, regions: Iterable[str], begin: float, seconds: float) -> float:
        """The longest time between two batches of a worker of these regions, of those that end in so many seconds."""
        longest = 0.0
        for worker in {batch.worker for batch in self.batches}:
            if worker.split("-")[0] in regions:
                times = sorted(batch.at for batch in self.batches if batch.worker == worker)
                pauses = [after - before for before, after in pairwise(times) if begin <= before < begin + seconds]
                longest = max([longest, *pauses])
        return longest

    def span(self) -> tuple[float, float]:
        """When the first and the last batch ended."""
        times = [batch.at for batch in self.batches]
        return min(times), max(times)

    def assert_used_once(
        self, epochs: int, samples: int, is_explained: Callable[[Batch], bool] = lambda batch: False
    ) -> None:
        """Every epoch used every sample, and once, unless one of the times is explained."""
        uses = Counter(sample for batch in {batch.samples for batch in self.batches} for sample in batch)
        wrong = {index: uses[index] for index in range(samples) if uses[index] != epochs}
        assert not wrong, f"{len(wrong)} samples were not used {epochs} times: {dict(list(wrong.items())[:20])} ..."
        again = [batches for batches in self.repeated() if not any(map(is_explained, batches))]
        assert not again, f"{len(again)} batches were trained on again without a reason: {again[:5]} ..."

    def assert_same_model(self, workers: Iterable[str]) -> dict[str, Tensor]:
        """The named workers ended with the same finite model, bit for bit. Returns it."""
        states = {worker: self.results[worker]["state"] for worker in workers}
        first: dict[str, Tensor] = next(iter(states.values()))
        for worker, state in states.items():
            assert state.keys() == first.keys()
            for name, tensor in state.items():
                assert torch.isfinite(tensor).all(), f"{name} of {worker}"
                assert torch.equal(tensor, first[name]), f"{name} of {worker} and of {next(iter(states))} differ"
        return first

    def assert_same_step(self, workers: Sequence[str], step: int) -> None:
        """The named workers' Trainers ended with the same global step."""
        assert {worker: self.results[worker]["global_step"] for worker in workers} == dict.fromkeys(workers, step)


def _batch(worker: str, line: str) -> Batch:
    at, epoch, samples = line.split(" ")
    return Batch(worker, float(at), int(epoch), tuple(map(int, samples.split(","))))
