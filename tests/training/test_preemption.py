"""DataLoader workers and SIGTERM: they go on during every fit, and end at once when the run is over."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_halos.training.preemption import let_data_workers_end, outlive_sigterm


def test_data_workers_survive_sigterm_in_a_second_fit_with_the_same_loader() -> None:
    loader: DataLoader[Any] = DataLoader(
        TensorDataset(torch.arange(40)),
        batch_size=4,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    for _ in range(2):
        outlive_sigterm(loader, rank=0, seconds=60)
        batches: Any = iter(loader)
        next(batches)
        (worker,) = batches._workers
        os.kill(worker.pid, signal.SIGTERM)
        time.sleep(0.2)
        assert len(list(batches)) == 9
        let_data_workers_end()
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(timeout=60)
    assert worker.exitcode == 0
