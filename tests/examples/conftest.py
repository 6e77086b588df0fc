"""Runs a script of ``examples/`` in worker processes, and keeps what its module and the servers were at the end."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest

from lightning_halos import AlgorithmStrategy
from tests.integration.harness import Result, lightning_environments, run_workers
from tests.integration.toys import state

EXAMPLES = Path(__file__).parents[2] / "examples"

Example = Callable[..., list[Result]]


@pytest.fixture
def example(tmp_path: Path) -> Example:
    """Runs ``examples/SCRIPT OPTIONS`` in processes in ``tmp_path``. Returns what :func:`recorded` does, by rank."""

    def run(script: str, *options: str, processes: int = 2) -> list[Result]:
        environments = lightning_environments(processes)
        return run_workers(recorded, script, options, processes, folder=tmp_path, environments=environments)

    return run


def recorded(script: str, options: tuple[str, ...], processes: int) -> Result:
    record: Result = {}

    def on_fit_start(module: pl.LightningModule) -> None:
        record["start"] = state(module)

    def on_train_end(module: pl.LightningModule) -> None:
        strategy = module.trainer.strategy
        if isinstance(strategy, AlgorithmStrategy):
            assert strategy.round is not None
            record["local_steps"] = strategy.round.total_steps
            record["servers"] = strategy.servers.statistics() if strategy.servers is not None else []

    def on_fit_end(module: pl.LightningModule) -> None:
        record["state"] = state(module)
        record["metrics"] = {name: float(value) for name, value in module.trainer.callback_metrics.items()}

    def on_test_end(module: pl.LightningModule) -> None:
        record["tested"] = {name: float(value) for name, value in module.trainer.callback_metrics.items()}

    for hook in (on_fit_start, on_train_end, on_fit_end, on_test_end):
        setattr(pl.LightningModule, hook.__name__, hook)
    sys.argv = [script, "--devices", str(processes), *options]
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return record
