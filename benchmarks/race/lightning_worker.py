"""One worker of a run under Lightning: HALoS, our DiLoCo, or DDP.

Run as ``python -m race.lightning_worker FOLDER SETTINGS``, with the variables of a cluster that starts processes by
itself in the environment. SETTINGS are JSON.
"""

import json
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from lightning_halos import DelayedNesterov, DilocoStrategy, HalosStrategy
from race.task import REGIONS, SEED, WORKERS, Device, RaceData, RaceGPT, Record

_FORWARD = 1 / 3  # of a batch's time; a backward pass computes twice as much


class Race(L.Callback):
    """Keeps the pace of the worker's device, and writes down what the worker does.

    Args:
        device: The worker's device.
        record: Where to write it down.
        steps: The last global step.
    """

    def __init__(self, device: Device, record: Record, steps: int) -> None:
        self.device, self.record, self.steps = device, record, steps

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.record.begin()
        self.device.begin()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        computed = self.device.computed
        self.device.sleep_until(1.0)
        self.record.step(computed)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.record.model(pl_module, trainer.global_step, trainer.global_step >= self.steps)


class RaceInStep(Race):
    """The same for DDP, whose batches end when the gradients have been averaged.

    DDP averages parts of the gradients while the backward pass goes on. A part is ready when the device has computed
    it, so the device's pace is kept where DDP asks for the averaging of a part.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        model: Any = trainer.strategy.model
        model.register_comm_hook(None, self._average)
        self.elements = sum(parameter.numel() for parameter in pl_module.parameters())
        self.ready = 0

    # DDP reads the types of a hook and refuses strings, so this file does not postpone the evaluation of annotations.
    def _average(self, _: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self.ready += bucket.buffer().numel()
        self.device.sleep_until(_FORWARD + (1 - _FORWARD) * self.ready / self.elements)
        if bucket.is_last():
            self.computed, self.ready = self.device.computed, 0
        return allreduce_hook(dist.group.WORLD, bucket)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.record.step(self.computed)


def make_strategy(settings: dict[str, Any]) -> Any:
    """Makes the strategy of a run."""
    if settings["software"] == "ddp":
        return "ddp"
    if settings["software"] == "diloco":
        outer = partial(torch.optim.SGD, **settings["outer"])
        return DilocoStrategy(regions=REGIONS, local_steps=settings["local_steps"], outer_optimizer=outer)
    return HalosStrategy(
        regions=REGIONS,
        local_steps=settings["local_steps"],
        accumulate_updates=settings["accumulate_updates"],
        merge_weight=settings["merge_weight"],
        local_optimizer=partial(DelayedNesterov, **settings["local"]),
        global_optimizer=partial(DelayedNesterov, **settings["global"]),
        **settings["options"],
    )


def main(folder: str, text: str) -> None:
    """Trains until the last step, or until it is ended."""
    warnings.filterwarnings("ignore")
    settings = json.loads(text)
    rank, steps = int(os.environ["RANK"]), settings["steps"]
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    L.seed_everything(SEED, verbose=False)
    kind = RaceInStep if settings["software"] == "ddp" else Race
    trainer = L.Trainer(
        strategy=make_strategy(settings),
        accelerator="cpu",
        devices=WORKERS // REGIONS,
        num_nodes=REGIONS,
        max_steps=steps,
        val_check_interval=settings["validate_every"],
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        callbacks=[kind(Device(settings["seconds"][rank]), Record(Path(folder), rank), steps)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(RaceGPT(), RaceData())


if __name__ == "__main__":
    main(*sys.argv[1:])
