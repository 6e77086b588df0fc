"""A simulation is the published simulator, event by event: through a Trainer, with a float64 LightningModule.

What the files hold, and what is compared where they hold no events, says `tests/core/golden.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_halos import AsyncLocalSGDStrategy, DilocoStrategy, HalosStrategy, SimulatedCluster
from tests.core import golden, reference

SAMPLES = 100_000


class Samples(Dataset[Tensor]):
    """Sample i of the toy problem is the i-th that the cursor hands out: it undoes the shuffling of the first epoch."""

    def __init__(self) -> None:
        self.places = torch.argsort(torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0)))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(reference.sample(int(self.places[index])))


class Toy(pl.LightningModule):
    """The toy problem of the design, section 4."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return 0.5 * (self.weight - batch.mean(0)).square().sum()

    def configure_optimizers(self) -> Any:
        optimizer = golden.optimizer(self.config["worker_optimizer"] | {"lr": 1.0})(self.parameters())
        schedule = self.config["worker_lr_schedule"]
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: reference.learning_rate(schedule, step + 1)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def strategy_of(config: dict[str, Any]) -> HalosStrategy:
    cluster = SimulatedCluster(
        config["network_bandwidths_gbps"],
        config["worker_speeds"],
        config["local_step_time_ms"],
        config["message_bytes"],
        record_parameters=True,
    )
    common = {name: config[name] for name in ("local_steps", "dynamic_local_steps")} | {"simulate": cluster}
    if config["algorithm"] == "diloco":
        return DilocoStrategy(outer_optimizer=golden.optimizer(config["outer_optimizer"]), **common)
    global_optimizer = golden.optimizer(config["global_optimizer"])
    if config["algorithm"] == "async_local_sgd":
        return AsyncLocalSGDStrategy(optimizer=global_optimizer, **common)
    return HalosStrategy(
        servers_per_region=[len(speeds) // config["workers_per_lps"] for speeds in config["worker_speeds"]],
        accumulate_updates=config["accumulation"],
        merge_weight=config["merge_weight"],
        local_optimizer=golden.optimizer(config["local_optimizer"]),
        global_optimizer=global_optimizer,
        **common,
    )


def enough_steps(config: dict[str, Any], record: list[reference.Event]) -> int:
    """Global steps with which a run goes on after the record's end, where ours gives every region's rest away."""
    rounds = reference.local_steps(config)
    finished = Counter(dict.fromkeys(range(len(rounds)), 1))
    for event in record:
        finished.update(range(len(rounds)) if event.kind == "round" else [event.worker] if event.worker >= 0 else [])
    handed_out = sum(rounds[worker] * count for worker, count in finished.items())
    return math.ceil(handed_out / len(rounds)) + 2 * max(rounds)


def check(data: dict[str, Any]) -> None:
    config = data["config"]
    workers = len(reference.local_steps(config))
    assert config["global_batch_size"] == workers * config["local_batch_size"], "a global step is a step of each worker"
    record, finals = golden.record_of(data)
    trainer = pl.Trainer(
        strategy=strategy_of(config),
        accelerator="cpu",
        devices=1,
        precision="64-true",
        max_steps=enough_steps(config, record),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Toy(config), DataLoader(Samples(), batch_size=config["local_batch_size"]))
    history = trainer.strategy.history
    for number, (wanted, event) in enumerate(zip(record, history, strict=False)):
        place = f"event {number}: {event}, not {wanted}"
        assert (event.kind, event.server, event.worker) == (wanted.kind, wanted.lps, wanted.worker), place
        if not is_after_the_end(config, record, number):
            assert event.version == wanted.version, place
        assert abs(event.time - wanted.time) < golden.MILLISECONDS, place
        if not is_after_the_end(config, record, number):
            assert np.abs(event.parameters.numpy() - wanted.parameters).max() < golden.PARAMETERS, place
    assert len(history) > len(record)
    if finals:
        last = next(e for e in reversed(history[: len(record)]) if e.kind == "update" or config["algorithm"] != "halos")
        assert min(np.abs(last.parameters.numpy() - np.array(final)).max() for final in finals) < golden.PARAMETERS


def is_after_the_end(config: dict[str, Any], record: list[reference.Event], number: int) -> bool:
    """Whether the published global server had its steps before this event, and applied nothing more."""
    return number > 0 and record[number - 1].steps >= config["total_local_steps"]


@pytest.mark.parametrize("path", golden.FILES, ids=lambda path: path.stem)
def test_a_simulation_reproduces_the_record_of(path: Path) -> None:
    check(golden.load(path))


TWO_REGIONS = golden.load(golden.SHIPPED / "halos_two_regions.json")["config"]
UNEVEN = {
    "network_bandwidths_gbps": [[10.0, 0.1, 0.3], [0.2, 10.0, 0.15], [0.25, 0.4, 8.0]],
    "worker_speeds": [[1.0, 0.5, 0.7, 0.6], [0.25, 0.8], [0.9, 0.45]],
    "global_batch_size": 32,
    "num_lps": 4,
}


@pytest.mark.parametrize(
    "change",
    [
        UNEVEN,  # two servers in a region, regions of unequal size, asymmetric links
        UNEVEN | {"dynamic_local_steps": True, "local_steps": 5, "accumulation": 3},
        {"local_optimizer": {"opt_type": "sgd", "lr": 0.3, "momentum": 0.5, "nesterov": True}},
        {"global_optimizer": {"opt_type": "sgd", "lr": 0.7, "momentum": 0.9, "nesterov": True}},
        {"worker_optimizer": {"opt_type": "sgd", "lr": 0.05, "momentum": 0.6, "nesterov": True}},
        UNEVEN | {"algorithm": "async_local_sgd"},
        UNEVEN | {"algorithm": "diloco", "outer_optimizer": {"opt_type": "sgd", "lr": 0.7}},
        UNEVEN
        | {
            "algorithm": "diloco",
            "dynamic_local_steps": True,
            "outer_optimizer": {"opt_type": "delayed_nesterov", "lr": 0.9, "beta": 0.5, "buffer_size": 2, "c": 0.1},
        },
    ],
    ids=lambda change: "-".join(f"{k}={v}" for k, v in change.items() if not isinstance(v, list))[:100],
)
def test_a_simulation_reproduces_other_clusters_and_settings(change: dict[str, Any]) -> None:
    check({"config": TWO_REGIONS | {"total_local_steps": 400} | change})
