"""A simulation is the published simulator, event by event: through a Trainer, with a float64 LightningModule.

The recordings are those of `tests/core/golden.py`, of other clusters and settings those of `tests/core/reference.py`.
Everything that a record says is compared; see :func:`published` for what our side says by other means.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_halos import AsyncLocalSGDStrategy, DilocoStrategy, HalosStrategy, SimulatedCluster
from lightning_halos.simulation import history as simulation
from tests.core import golden, reference
from tests.core.reference import Event

SAMPLES = 100_000


class Samples(Dataset[tuple[int, Tensor]]):
    """Sample i of the toy problem is the i-th that the cursor hands out: it undoes the shuffling of the first epoch."""

    def __init__(self) -> None:
        self.places = torch.argsort(torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0)))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        place = int(self.places[index])
        return place, torch.from_numpy(reference.sample(place))


class Toy(pl.LightningModule):
    """The toy problem of `tests/core/reference.py`. Each worker notes what it trains on, in a file of a folder."""

    def __init__(self, config: dict[str, Any], folder: Path) -> None:
        super().__init__()
        self.config = config
        self.folder = folder
        self.notes: list[tuple[int, int]] = []
        self.weight = nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        places, samples = batch
        schedule: Any = self.lr_schedulers()
        self.notes.append((int(places[0]), schedule.last_epoch))
        return 0.5 * (self.weight - samples.mean(0)).square().sum()

    def on_train_end(self) -> None:
        (self.folder / f"{self.global_rank}.json").write_text(json.dumps(self.notes))

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
        all_reduce="ring",
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


def enough_steps(config: dict[str, Any], record: list[Event]) -> int:
    """Global steps with which a run goes on after the record's end, where ours begins to flush its servers."""
    rounds = reference.local_steps(config)
    finished = Counter(dict.fromkeys(range(len(rounds)), 1))
    for event in record:
        finished.update(range(len(rounds)) if event.kind == "round" else [event.worker] if event.worker >= 0 else [])
    handed_out = sum(rounds[worker] * count for worker, count in finished.items())
    return math.ceil(handed_out / len(rounds)) + 2 * max(rounds)


def simulate(config: dict[str, Any], record: list[Event], folder: Path) -> list[Event]:
    """Runs a Trainer beyond a record. Returns what its history and its workers' notes say of the same events."""
    workers = len(reference.local_steps(config))
    assert config["global_batch_size"] == workers * config["local_batch_size"], "a global step is a step of each worker"
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
    trainer.fit(Toy(config, folder), DataLoader(Samples(), batch_size=config["local_batch_size"]))
    notes = [Notes(folder / f"{rank}.json", config["local_batch_size"]) for rank in range(workers)]
    history = trainer.strategy.history
    assert len(history) > len(record)
    return list(published(config, history[: len(record)], notes))


def published(config: dict[str, Any], history: Sequence[simulation.Event], notes: list[Notes]) -> Iterator[Event]:
    """Translates a history into the published simulator's events.

    `steps` of our history is what all workers have finished. The published one is what the global server was brought:
    of each update, what the server's workers finished between the pushes that made it send this one and the last one.
    A push makes a server send if it is the K-th after the server's last merge. What a round trained on, and where its
    LR schedule began, are from the worker's own notes.
    """
    finished = counted = 0
    unsent, merged_at = Counter[int](), Counter[int]()
    sent: dict[int, int] = {}
    begins = [0.0] * len(notes)
    for event in history:
        brings, finished = event.steps - finished, event.steps
        facts: dict[str, Any] = {}
        if event.kind == "push":
            first, end, position = notes[event.worker].take(brings)
            facts = {"local_steps": brings, "samples": (first, end), "position": position}
            facts["start"], begins[event.worker] = begins[event.worker], event.time
            unsent[event.server] += brings
        elif event.kind == "round":
            own = [note.take(steps) for note, steps in zip(notes, reference.local_steps(config), strict=True)]
            assert [first for first, *_ in own[1:]] == [end for _, end, _ in own[:-1]]
            facts = {"local_steps": brings, "samples": (own[0][0], own[-1][1])}
            facts["position"] = tuple(position for *_, position in own)
        elif event.kind == "update":
            brings = sent.pop(event.server)
            counted += brings
            facts["local_steps"] = brings
        if config["algorithm"] != "halos":
            counted = finished
        elif event.kind == "merge":
            facts["merged_version"] = merged_at[event.server] = event.version
        elif event.kind == "push":
            facts["merged_version"] = merged_at[event.server]
            facts["sends_update"] = event.version == merged_at[event.server] + config["accumulation"]
            if facts["sends_update"]:
                sent[event.server] = unsent.pop(event.server)
        assert event.parameters is not None
        of = event.time, event.kind, event.server, event.worker, event.version
        yield Event(*of, counted, event.parameters.numpy(), **facts)


class Notes:
    """A worker's record of each batch: the position of its first sample and of the LR schedule.

    Args:
        path: The file.
        size: Samples in a batch.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._batches = iter(json.loads(path.read_text()))
        self._size = size

    def take(self, steps: int) -> tuple[int, int, int]:
        """Returns the next round's first sample, the one after its last, and the position that it began at."""
        own = list(itertools.islice(self._batches, steps))
        first, position = own[0]
        assert own == [[first + step * self._size, position + step] for step in range(steps)]
        return first, first + steps * self._size, position


@pytest.mark.parametrize("part", [pytest.param(0.1, id="a tenth"), pytest.param(1.0, id="all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("path", golden.FILES, ids=lambda path: path.stem)
def test_a_simulation_reproduces_the_recording(path: Path, part: float, tmp_path: Path) -> None:
    """`tests/core` compares all of each recording with the servers, which takes a second."""
    recording = golden.load(path)
    events = recording.events[: math.ceil(part * len(recording.events))]
    golden.assert_equal(simulate(recording.config, events, tmp_path), events)


def slow(change: dict[str, Any]) -> Any:
    return pytest.param(change, marks=pytest.mark.slow)


TWO_REGIONS = golden.load(golden.SHIPPED / "halos_two_regions.json").config
UNEVEN = {  # two servers in a region, regions of unequal size, asymmetric links
    "network_bandwidths_gbps": [[10.0, 0.1, 0.3], [0.2, 10.0, 0.15], [0.25, 0.4, 8.0]],
    "worker_speeds": [[1.0, 0.5, 0.7, 0.6], [0.25, 0.8], [0.9, 0.45]],
    "global_batch_size": 32,
    "num_lps": 4,
}


@pytest.mark.parametrize(
    "change",
    [
        slow(UNEVEN),
        UNEVEN | {"dynamic_local_steps": True, "local_steps": 5, "accumulation": 3},
        slow({"local_optimizer": {"opt_type": "sgd", "lr": 0.3, "momentum": 0.5, "nesterov": True}}),
        slow({"global_optimizer": {"opt_type": "sgd", "lr": 0.7, "momentum": 0.9, "nesterov": True}}),
        slow({"worker_optimizer": {"opt_type": "sgd", "lr": 0.05, "momentum": 0.6, "nesterov": True}}),
        slow(UNEVEN | {"algorithm": "async_local_sgd"}),
        slow(UNEVEN | {"algorithm": "diloco", "outer_optimizer": {"opt_type": "sgd", "lr": 0.7}}),
        UNEVEN
        | {
            "algorithm": "diloco",
            "dynamic_local_steps": True,
            "outer_optimizer": {"opt_type": "delayed_nesterov", "lr": 0.9, "beta": 0.5, "buffer_size": 2, "c": 0.1},
        },
    ],
    ids=lambda change: "-".join(f"{k}={v}" for k, v in change.items() if not isinstance(v, list))[:100],
)
def test_a_simulation_reproduces_other_clusters_and_settings(change: dict[str, Any], tmp_path: Path) -> None:
    config = TWO_REGIONS | {"total_local_steps": 400} | change
    record = reference.record(config)
    golden.assert_equal(simulate(config, record, tmp_path), record)
