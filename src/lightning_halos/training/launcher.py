"""Starts the processes of a simulation, one per described worker, and returns the history to the calling process."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_halos.simulation.history import Event
from lightning_halos.training.compat import MultiProcessingLauncher


class SimulationLauncher(MultiProcessingLauncher):
    """Lightning's launcher, which also returns rank 0's history to the strategy of the calling process."""

    def get_extra_results(self, trainer: pl.Trainer) -> dict[str, Any]:
        extra: dict[str, Any] = super().get_extra_results(trainer)
        strategy: Any = trainer.strategy
        # In a file, as Lightning does with the weights: the parent reads the queue only after its children have ended,
        # and until then the queue's capacity is that of a pipe.
        path = Path(tempfile.mkdtemp()) / "history.pt"
        torch.save([vars(event) for event in strategy.history], path)
        return {**extra, "history": str(path), "virtual_seconds": strategy.virtual_seconds}

    def update_main_process_results(self, trainer: pl.Trainer, extra: dict[str, Any]) -> None:
        super().update_main_process_results(trainer, extra)
        strategy: Any = trainer.strategy
        path = Path(extra["history"])
        events = torch.load(path, weights_only=True)
        shutil.rmtree(path.parent)
        strategy.store_history([Event(**event) for event in events], extra["virtual_seconds"])
