"""Runs a scenario's module on the virtual clock: real Trainer processes whose speeds a description says.

What must not depend on the machine belongs here: how the workers interleave is the same in every run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_halos import SimulatedCluster
from tests.integration.harness import Result, load_results, save_result
from tests.integration.toys import Toy, halos, make_trainer, outcome

SLOW = 4.0  # times that a slow worker's step takes longer


class Saving(pl.Callback):
    """Saves every rank's outcome when its fit is over."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        save_result(self.folder, trainer.global_rank, {**outcome(trainer, pl_module), **pl_module.more()})


def simulate(
    folder: Path,
    module: Toy,
    *data: Any,
    slow: int | None = None,
    regions: tuple[int, ...] = (2, 2),
    strategy: dict[str, Any] | None = None,
    callbacks: Any = (),
    lanes: int | None = None,
    **flags: Any,
) -> list[Result]:
    """Fits a module with one process per worker, under a virtual clock.

    Args:
        folder: Where the outcomes are saved.
        module: The module. A batch takes no time of its own.
        data: Loaders for training and validation.
        slow: Index of a worker that is 4 times slower than the others.
        regions: Number of workers in each region.
        strategy: Further arguments of the strategy.
        callbacks: Further callbacks.
        lanes: Number of lanes. Default: as many as a worker has processes.
        flags: Further flags of the Trainer.

    Returns:
        The outcome of each rank.
    """
    workers = sum(regions)
    processes = workers * (strategy or {}).get("worker", 1)
    speeds = [1 / SLOW if rank == slow else 1.0 for rank in range(workers)]
    starts = [sum(regions[:index]) for index in range(len(regions))]
    cluster = SimulatedCluster(
        bandwidths=[[10.0 if a == b else 1.0 for b in regions_of(regions)] for a in regions_of(regions)],
        worker_speeds=[speeds[start : start + count] for start, count in zip(starts, regions, strict=True)],
        step_ms=100.0,
        message_bytes=1_000,
    )
    module.pause = 0.0
    made = halos(regions=None, simulate=cluster, **(strategy or {}))
    made._lanes = lanes
    trainer = make_trainer(
        made,
        devices=1,
        callbacks=[*callbacks, Saving(folder)],
        **flags,
    )
    trainer.fit(module, *data)
    return load_results(folder, processes)


def regions_of(regions: tuple[int, ...]) -> range:
    return range(len(regions))
