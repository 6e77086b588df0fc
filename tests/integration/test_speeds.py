"""The seconds that a push reports are those of computing, on the device too, and of nothing else.

Clock and device are the test's own: a second passes only where the test says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset

from lightning_halos.core.cursor import Lease
from lightning_halos.core.messages import Push
from lightning_halos.core.vector import ModelVector
from lightning_halos.core.worker import WorkerRound
from lightning_halos.training.stopwatch import Stopwatch
from lightning_halos.transport.client import WorkerClient
from tests.integration.conftest import Run
from tests.integration.harness import Result
from tests.integration.toys import Toy, halos, loader, make_trainer, samples

LAUNCH, WORK, AGES = 0.25, 1.0, 1000.0  # seconds: to queue a batch's work, to do it, and of what must not count


class Device:
    """A clock, and a device whose work takes its time only when somebody waits for it."""

    time = queued = 0.0


def synchronize(_: Stopwatch) -> None:
    Device.time, Device.queued = Device.time + Device.queued, 0.0


class OnADevice(Toy):
    pause = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        Device.time += LAUNCH
        Device.queued += WORK
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        Device.queued += AGES
        super().validation_step(batch, batch_idx)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        Device.time += AGES
        return super().state_dict(*args, **kwargs)


class SlowDisk(TorchCheckpointIO):
    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        Device.time += AGES
        super().save_checkpoint(*args, **kwargs)


class SlowSamples(Dataset[Any]):
    """Validation samples that are slow to read."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        Device.time += AGES
        return samples()[index]


def reported(folder: Path, disturbance: str) -> Result:
    """Fits, and returns the steps, seconds computed and seconds waited of each push with steps."""
    pushes: list[Push] = []
    push, leases = WorkerRound.push, WorkerClient.leases

    def recorded(self: WorkerRound, *args: Any, **kwargs: Any) -> Push:
        pushes.append(push(self, *args, **kwargs))
        return pushes[-1]

    def slow(self: WorkerClient) -> Iterator[Lease]:
        for lease in leases(self):
            Device.time += AGES
            yield lease

    WorkerRound.push = recorded  # type: ignore[method-assign]
    Stopwatch.now = lambda self: Device.time  # type: ignore[method-assign]
    Stopwatch.synchronize = synchronize  # type: ignore[method-assign]
    module, strategy, kwargs = OnADevice(), halos(regions=1), {}
    if disturbance == "overlap":
        add_progress = ModelVector.add_progress_

        def copying(self: ModelVector, *args: Any) -> None:
            synchronize(trainer.strategy._fit.loop.stopwatch)  # a copy to the host waits for the device
            add_progress(self, *args)

        ModelVector.add_progress_ = copying  # type: ignore[method-assign]
        strategy = halos(regions=1, overlap=True)
    if disturbance == "saves":
        saving = ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1)
        strategy = halos(regions=1, checkpoint_io=SlowDisk())
        kwargs = {"enable_checkpointing": True, "callbacks": [saving]}
    if disturbance == "leases":
        WorkerClient.leases = slow  # type: ignore[method-assign]
    if disturbance == "validation":
        kwargs = {"val_check_interval": 6, "check_val_every_n_epoch": None}
    validated = [DataLoader(SlowSamples(), batch_size=2)] if disturbance == "validation" else []
    trainer = make_trainer(strategy, devices=1, max_steps=24, **kwargs)
    trainer.fit(module, loader(), *validated)
    return {"pushes": [(p.steps, p.seconds, p.waited) for p in pushes if p.steps], "passed": Device.time}


@pytest.mark.parametrize("disturbance", ["", "saves", "leases", "validation", "overlap"])
def test_a_push_reports_the_time_on_the_device_and_nothing_else(run: Run, tmp_path: Path, disturbance: str) -> None:
    (result,) = run(reported, tmp_path / "saved", disturbance, workers=1)
    for steps, seconds, waited in result["pushes"]:
        assert (seconds, waited) == (pytest.approx(steps * (LAUNCH + WORK)), 0.0)
    assert sum(steps for steps, _, _ in result["pushes"]) == 24
    assert (result["passed"] >= 2 * AGES) == (disturbance in ("saves", "leases", "validation"))
