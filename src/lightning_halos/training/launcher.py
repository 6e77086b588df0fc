"""Starts the processes of a simulation, one per described worker, and returns the history to the calling process."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies.parallel import ParallelStrategy

from lightning_halos.simulation.history import Event
from lightning_halos.training.compat import MultiProcessingLauncher


class Recorder(Protocol):
    """What has the history of a simulation: the strategy."""

    @property
    def history(self) -> list[Event]: ...
    @property
    def virtual_seconds(self) -> float: ...

    def store_history(self, history: list[Event], virtual_seconds: float) -> None:
        """Keeps the history and the final time of a simulation that has ended."""


class SimulationLauncher(MultiProcessingLauncher):
    """Lightning's launcher, which also returns rank 0's history to the calling process.

    Args:
        strategy: The strategy.
        start_method: As in Lightning's launcher.
        recorder: The strategy once more.
    """

    def __init__(self, strategy: ParallelStrategy, start_method: Any, recorder: Recorder) -> None:
        super().__init__(strategy, start_method)
        self._recorder = recorder

    def get_extra_results(self, trainer: pl.Trainer) -> dict[str, Any]:
        extra: dict[str, Any] = super().get_extra_results(trainer)
        # In a file, as Lightning does with the weights: the parent reads the queue only after its children have ended,
        # and until then the queue's capacity is that of a pipe.
        path = Path(tempfile.mkdtemp()) / "history.pt"
        torch.save([vars(event) for event in self._recorder.history], path)
        return {**extra, "history": str(path), "virtual_seconds": self._recorder.virtual_seconds}

    def update_main_process_results(self, trainer: pl.Trainer, extra: dict[str, Any]) -> None:
        super().update_main_process_results(trainer, extra)
        path = Path(extra["history"])
        events = torch.load(path, weights_only=True)
        shutil.rmtree(path.parent)
        self._recorder.store_history([Event(**event) for event in events], extra["virtual_seconds"])
