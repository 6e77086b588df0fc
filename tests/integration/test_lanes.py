"""Checkpoints of workers of several processes: the servers of a run with other lanes start where the old ones ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_halos.checkpoint.manifest import Manifest, global_shard, server_shard, worker_shard
from lightning_halos.core.layout import Layout
from lightning_halos.core.reslicing import Reslicing
from lightning_halos.training.worlds.real import RealWorld
from tests.integration.conftest import Run
from tests.integration.harness import Result
from tests.integration.toys import (
    BATCH,
    LOCAL_STEPS,
    Toy,
    assert_same_model,
    halos,
    loader,
    make_trainer,
    meet,
    outcome,
)

SIZES = [32, 4, 4, 1]  # of the parameters of a Toy


class Servers(pl.Callback):
    """Keeps the states of this process's servers before the first batch of any worker."""

    def __init__(self, fit: str) -> None:
        self.fit = fit
        self.states: dict[str, Any] = {}

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.states:
            return
        world = trainer.strategy._fit.world  # type: ignore[attr-defined]
        assert isinstance(world, RealWorld)
        self.states = dict(zip(("region", "global"), world.state(), strict=True))
        meet(f"{self.fit} starts", trainer.global_rank, trainer.world_size)


def trains(worker: int, max_steps: int, before: str | None, after: str) -> Result:
    module, servers = Toy(), Servers(Path(after).stem)
    # In a resumed run the global server gets nothing before the end.
    strategy = halos(worker=worker, defaults="published", accumulate_updates=4 if before is None else 1000)
    trainer = make_trainer(strategy, devices=2 * worker, max_steps=max_steps, callbacks=[servers])
    trainer.fit(module, loader(batch_size=BATCH // worker), ckpt_path=before)
    trainer.save_checkpoint(after)
    return outcome(trainer, module, **servers.states)


def one_lane(layout: Layout, states: list[Any]) -> Any:
    """The state of a server, of those of all lanes."""
    one = layout.undivided()
    reslicing = Reslicing(layout, one, 0, one.shapes(0))
    for lane, state in enumerate(states):
        reslicing.add(lane, state)
    return reslicing.state["server"]


def layout_of(path: Path) -> tuple[Layout, Path]:
    """The layout of a checkpoint, and its manifest's file."""
    (manifest_file,) = path.with_suffix("").glob("*/manifest.json")
    manifest = Manifest.read(manifest_file.read_bytes(), manifest_file)
    layout = Layout.build(SIZES, 4, 1) if manifest.layout is None else Layout.from_plain(manifest.layout)
    return layout, manifest_file


def saved_servers(path: Path) -> tuple[dict[str, Any], int]:
    """The servers of a checkpoint, and its lanes."""
    layout, manifest_file = layout_of(path)
    names = {"global": global_shard, **{f"server-{index}": _shard_of(index) for index in range(2)}}
    servers = {}
    for name, shard in names.items():
        files = [manifest_file.with_name(shard(lane)) for lane in range(layout.lanes)]
        servers[name] = one_lane(layout, [torch.load(file, weights_only=True) for file in files])
    return servers, layout.lanes


def _shard_of(index: int) -> Any:
    return lambda lane: server_shard(index, lane)


def started_servers(results: list[Result], lanes: int) -> dict[str, Any]:
    """The servers of two workers, each the only one of its region, before the first batch."""
    layout = Layout.build(SIZES, 4, lanes)
    first, second = results[:lanes], results[lanes:]
    return {
        "global": one_lane(layout, [result["global"] for result in first]),
        "server-0": one_lane(layout, [result["region"] for result in first]),
        "server-1": one_lane(layout, [result["region"] for result in second]),
    }


def assert_equal(one: Any, other: Any, name: str) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), name
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            assert_equal(one[key], other[key], f"{name}/{key}")
    else:
        assert one == other, name


def test_servers_go_on_in_runs_with_other_lanes(run: Run, tmp_path: Path) -> None:
    """From two lanes to two, to one, and back to two. The models and the momentum are the same, bit for bit."""
    paths = [tmp_path / f"{name}.ckpt" for name in "abcd"]
    for worker, before, after in ((2, None, 0), (2, 0, 1), (1, 0, 2), (2, 2, 3)):
        resumed = None if before is None else str(paths[before])
        results = run(trains, worker, 16 + 4 * after, resumed, str(paths[after]), workers=2 * worker)
        assert_same_model(results)
        saved, lanes = saved_servers(paths[after])
        assert lanes == worker
        model = torch.cat([value.flatten() for value in results[0]["state"].values()])
        assert torch.equal(saved["global"]["model"], model)
        if before is not None:
            old, _ = saved_servers(paths[before])
            started = started_servers(results, worker)
            for name in old:
                for of_a_run in ("steps", "accumulate_updates"):
                    old[name].pop(of_a_run, None)
                    started[name].pop(of_a_run, None)
                assert_equal(old[name], started[name], name)
            assert old["global"]["optimizer"]["state"][0]["momentum"].any()


class Residual(pl.Callback):
    """Keeps what this process's worker has not sent yet because of its link's format, before the first batch.

    No worker trains on a second round before all have pushed one.
    """

    def __init__(self, fit: str) -> None:
        self.fit = fit
        self.start: Tensor | None = None
        self.seen = False
        self.batches = 0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.batches == LOCAL_STEPS:
            meet(f"{self.fit} has pushed", trainer.global_rank, trainer.world_size)
        self.batches += 1
        if not self.seen:
            state = trainer.strategy._fit.loop._wire.state_dict(has_shadow=False)  # type: ignore[attr-defined]
            self.seen, self.start = True, state.get("residual")


def rounded(folder: Path) -> list[Result]:
    """Two workers of two processes with checkpoints in mid-run: both carry a slice, then only the first, then both."""
    results, before = [], None
    for number, lanes in enumerate((2, 1, 2)):
        module, residual, step = Toy(), Residual(f"fit {number}"), 12 + 24 * number
        saving = ModelCheckpoint(folder / str(number), "{step}", every_n_train_steps=step, save_top_k=-1)
        strategy = halos(worker=2, regions=1, wire="int8")
        strategy._lanes = lanes
        callbacks = [residual, saving]
        trainer = make_trainer(strategy, max_steps=24 * (number + 1), callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(module, loader(batch_size=BATCH // 2), ckpt_path=before)
        results.append(outcome(trainer, module, residual=residual.start))
        before = folder / str(number) / f"step={step}.ckpt"
    return results


def test_residuals_go_on_in_runs_with_other_lanes(run: Run, tmp_path: Path) -> None:
    """A worker keeps, bit for bit, what the rounding of its pushes has left."""
    fits = run(rounded, tmp_path)
    for number, step, lanes in ((1, 12, 1), (2, 36, 2)):
        results = [result[number] for result in fits]
        assert_same_model(results)
        old, manifest_file = layout_of(tmp_path / str(number - 1) / f"step={step}.ckpt")
        files = [manifest_file.with_name(worker_shard(1, lane)) for lane in range(old.lanes)]
        saved = old.join([torch.load(file, weights_only=True)["residual"] for file in files])
        started = [result["residual"] for result in results[2 : 2 + lanes]]  # of worker 1: worker 0 has its server
        assert old.lanes == 3 - lanes
        assert bool(saved.any())
        assert torch.equal(Layout.build(SIZES, 4, lanes).join(started), saved)
