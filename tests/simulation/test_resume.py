"""A simulated run that was stopped and resumed ends bit for bit where one ends that was not stopped."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, IterableDataset

from lightning_halos import CheckpointError, HalosStrategy, SimulatedCluster
from lightning_halos.core.algorithms.defaults import ASSUMED_STEPS
from lightning_halos.core.sharding import local
from lightning_halos.optim import MuonAdamW
from lightning_halos.training import start
from tests.fsdp2 import divides_on_cpus, fully_shard
from tests.simulation.test_world import WORKERS, Toy, fit, loader


def run(name: str, folder: Path | None = None, every: int = 0, **flags: Any) -> dict[str, torch.Tensor]:
    """Runs a simulation that saves periodically. Returns the final model."""
    if folder is not None:
        saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1)
        flags |= {"callbacks": saving, "enable_checkpointing": True}
    return fit(name, Toy(), loader(shuffle=True), **flags)[1].state_dict()


def resume(name: str, path: Path, **flags: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(12345)
    return fit(name, Toy(), loader(shuffle=True), **flags, ckpt_path=path)[1].state_dict()


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for key in one:
        if one[key].is_floating_point():
            assert torch.equal(one[key], other[key]), key


@pytest.mark.parametrize(
    ("name", "flags", "every"),
    [
        ("halos", {"max_steps": 20}, 4),
        ("halos", {"max_epochs": 2, "accumulate_grad_batches": 2, "wire": "int4"}, 5),
        pytest.param("overlap, busy servers", {"max_steps": 20}, 5, marks=pytest.mark.slow),
        pytest.param("async_local_sgd", {"max_steps": 14}, 7, marks=pytest.mark.slow),
        pytest.param("diloco", {"max_steps": 14}, 7, marks=pytest.mark.slow),
        pytest.param("diloco_dynamic", {"max_epochs": 1}, 6, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_that_was_stopped_ends_where_it_would_have(
    tmp_path: Path, name: str, flags: dict[str, Any], every: int
) -> None:
    expected = run(name, tmp_path, every, **flags)
    assert_equal(expected, run(name, **flags))  # saving changes nothing
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert paths
    for path in paths:
        assert_equal(expected, resume(name, path, **flags))


def lengths(folder: Path) -> set[int]:
    """The lengths of the run in all manifests of a folder."""
    return {json.loads(path.read_text())["global_steps"] for path in folder.rglob("manifest.json")}


class WithoutSchedule(Toy):
    """A run of it may go on for longer than it was meant to."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_a_run_that_goes_on_longer_keeps_the_defaults_with_which_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, said = None, tmp_path / "said"
    monkeypatch.setattr(start, "rank_zero_info", said.write_text)  # of rank 0, which is another process
    for name, steps in (("first", 8), ("second", 16)):
        saving = ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=4, save_top_k=-1)
        flags: dict[str, Any] = {"callbacks": saving, "enable_checkpointing": True, "max_steps": steps}
        fit("halos", WithoutSchedule(), loader(shuffle=True), **flags, ckpt_path=path)
        assert lengths(tmp_path / name) == {8}
        assert "defaults for 8 global steps" in said.read_text()
        assert ("(with which this run began)" in said.read_text()) is (name == "second")
        path = tmp_path / name / "step=4.ckpt"


class Stream(IterableDataset[Any]):
    """Data without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(loader().dataset)  # type: ignore[call-overload]


def test_a_run_over_data_without_a_length_is_of_unknown_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tmp_path / "said"
    monkeypatch.setattr(start, "rank_zero_info", said.write_text)  # of rank 0, which is another process
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    flags: dict[str, Any] = {"callbacks": saving, "enable_checkpointing": True, "max_epochs": 1, "max_steps": -1}
    fit("halos", WithoutSchedule(), DataLoader(Stream(), batch_size=4), **flags)
    assert lengths(tmp_path) == {ASSUMED_STEPS}
    assert f"{ASSUMED_STEPS} global steps (the length of this run is unknown)" in said.read_text()


class WithMuon(Toy):
    """Trains with two optimizers in one, whose rates and momenta a schedule changes."""

    def configure_optimizers(self) -> Any:
        optimizer = MuonAdamW(self)
        schedule = OneCycleLR(optimizer, 1e-2, total_steps=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch.optim.Muon")
def test_a_run_with_muon_and_one_cycle_goes_on_where_it_was(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=8, save_top_k=-1)
    flags: dict[str, Any] = {"max_steps": 20, "gradient_clip_val": 0.5}
    _, module = fit("halos", WithMuon(), loader(shuffle=True), **flags, callbacks=saving, enable_checkpointing=True)
    torch.manual_seed(12345)
    _, resumed = fit("halos", WithMuon(), loader(shuffle=True), **flags, ckpt_path=tmp_path / "step=8.ckpt")
    assert_equal(module.state_dict(), resumed.state_dict())


class Saving(Callback):
    """Saves at the start of the first batch and of the first one of the second epoch, and within a validation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.batches = 0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.batches += 1
        if self.batches in (1, 17):
            self.save(trainer, f"batch {self.batches}")

    def on_validation_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, number: int, *_: Any) -> None:
        if number == 1 and not (self.folder / "validation.ckpt").exists():
            self.save(trainer, "validation")

    def save(self, trainer: pl.Trainer, name: str) -> None:
        if trainer.is_global_zero:
            trainer.save_checkpoint(self.folder / f"{name}.ckpt")


def test_a_run_may_be_saved_in_any_hook(tmp_path: Path) -> None:
    flags = {"max_steps": 20, "val_check_interval": 6, "check_val_every_n_epoch": None}
    expected = run("halos", **flags)
    assert_equal(expected, run("halos", **flags, callbacks=Saving(tmp_path)))
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert [path.stem for path in paths] == ["batch 1", "batch 17", "validation"]
    for path in paths:
        assert_equal(expected, resume("halos", path, **flags))


def test_a_run_may_be_saved_where_a_validation_follows(tmp_path: Path) -> None:
    flags = {"max_steps": 20, "val_check_interval": 5, "check_val_every_n_epoch": None}
    expected = run("halos", tmp_path, 5, **flags)
    assert_equal(expected, resume("halos", tmp_path / "step=10.ckpt", **flags))


class Preempted(Toy):
    """One process gets SIGTERM in mid-run."""

    def __init__(self, victim: int) -> None:
        super().__init__()
        self.victim = victim
        self.batches = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.batches += 1
        if self.global_rank == self.victim and self.batches == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("victim", [0, 3])
def test_a_preempted_simulation_goes_on_where_it_was(tmp_path: Path, victim: int) -> None:
    flags = {"callbacks": ModelCheckpoint(tmp_path), "enable_checkpointing": True, "max_steps": 20}
    expected = run("halos", max_steps=20)
    with pytest.raises(ProcessExitedException) as ended:
        fit("halos", Preempted(victim), loader(shuffle=True), **flags)
    assert ended.value.exit_code == 128 + signal.SIGTERM
    assert_equal(expected, resume("halos", tmp_path / "last-preempted.ckpt", max_steps=20))


def test_another_format_on_the_links_is_refused(tmp_path: Path) -> None:
    run("halos", tmp_path, 4, max_steps=12, wire={"between": "int8"})
    path = tmp_path / "step=4.ckpt"
    message = "wire=.* must be .*'between': 'int8'.* to resume this checkpoint"
    with pytest.raises((CheckpointError, ProcessRaisedException), match=message):
        resume("halos", path, max_steps=12)


def test_a_run_may_go_on_after_its_end_in_another_format(tmp_path: Path) -> None:
    """It ended in the middle of an epoch of 16 steps, and goes on in it and in the next one."""
    flags: dict[str, Any] = {"callbacks": ModelCheckpoint(tmp_path, "end"), "enable_checkpointing": True}
    trainer, module = fit("halos", WithoutSchedule(), loader(), max_steps=12, wire="int8", **flags)
    later, after = fit("halos", WithoutSchedule(), loader(), tmp_path / "end.ckpt", max_steps=20, wire="int4")
    weight, longer = module.state_dict()["net.0.weight"], after.state_dict()["net.0.weight"]
    assert bool(longer.isfinite().all())
    assert not torch.equal(longer, weight)
    assert later.strategy.history[0].time >= trainer.strategy.virtual_seconds * 1e3  # the clock goes on, too
    assert later.strategy.history[-1].steps == 20 * WORKERS


def test_the_clock_of_synchronous_sgd_goes_on_after_a_resume(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5)
    trainer, _ = fit("sync_sgd", Toy(), loader(), max_steps=8, callbacks=saving, enable_checkpointing=True)
    resumed, _ = fit("sync_sgd", Toy(), loader(), max_steps=8, ckpt_path=tmp_path / "step=5.ckpt")
    assert resumed.strategy.virtual_seconds == pytest.approx(trainer.strategy.virtual_seconds)
    assert [event.steps for event in resumed.strategy.history] == [24, 28, 32, 32]


class Divided(Toy):
    """Divided among the processes of a worker, if they train with FSDP2."""

    def configure_model(self) -> None:
        if self.device_mesh is not None and not hasattr(self.net[0].weight, "placements"):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class Noting(Callback):
    """Keeps what each process has of the model and of its optimizer after the fit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        moments = [own["exp_avg"] for own in trainer.optimizers[0].state.values()]
        tensors = [local(tensor).clone() for tensor in (*pl_module.parameters(), *moments)]
        torch.save(tensors, self.folder / str(trainer.global_rank))


ANSWERED_LATER = {"overlap": True, "wire": "int8", "message_bytes": 1_000_000_000}  # after about 4 batches


def run_divided(
    folder: Path,
    inner: str,
    *callbacks: Callback,
    ckpt_path: Path | None = None,
    message_bytes: int = 1_000_000,
    **flags: Any,
) -> list[list[torch.Tensor]]:
    """Runs a simulation of two workers of two processes. Returns what each process has; see :class:`Noting`."""
    cluster = SimulatedCluster([[10.0, 0.1], [0.2, 10.0]], [[1.0], [0.4]], step_ms=100.0, message_bytes=message_bytes)
    folder.mkdir()
    gather = ModelParallelStrategy.lightning_module_state_dict

    def noted(strategy: ModelParallelStrategy) -> dict[str, Any]:
        (folder / f"{strategy.lightning_module.trainer.global_rank}.gathered").touch()
        return gather(strategy)

    strategy = HalosStrategy(simulate=cluster, worker=2, inner=inner, local_steps=4, accumulate_updates=2, **flags)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    fixed = {"max_steps": 14, "num_sanity_val_steps": 0, "enable_checkpointing": bool(callbacks)}
    trainer = pl.Trainer(
        strategy=strategy, accelerator="cpu", devices=1, callbacks=[Noting(folder), *callbacks], **quiet, **fixed
    )
    pl.seed_everything(1, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelParallelStrategy, "lightning_module_state_dict", noted)
        trainer.fit(module := Divided(), loader(shuffle=True), loader(32), ckpt_path=ckpt_path)
    parts = [torch.load(folder / str(rank)) for rank in range(4)]
    weights = [part[0] for part in parts[:2]] if inner == "fsdp2" else [parts[0][0]]
    assert torch.equal(module.net[0].weight, torch.cat(weights)), "the process that launches has the final model"
    gathered = sorted(path.stem for path in folder.glob("*.gathered"))
    assert gathered == (["0", "1"] if inner == "fsdp2" else []), "no other worker collects the complete model"
    return parts


def saved_divided(folder: Path, inner: str, **flags: Any) -> tuple[list[list[torch.Tensor]], Path]:
    """Runs such a simulation with checkpoints. Returns what each process has after it, and a checkpoint in mid-run."""
    saving = ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=5, save_top_k=-1)
    expected = run_divided(folder / "complete", inner, saving, **flags)
    (path, *_) = sorted((folder / "saved").glob("*.ckpt"))
    files = [*path.with_suffix("").glob("*/worker-0*.pt")]
    assert len(files) == 2
    for file in files:
        assert ("answer" in torch.load(file, weights_only=True)) is flags.get("overlap", False), "a push is unanswered"
    return expected, path


@pytest.mark.parametrize(
    ("inner", "flags"),
    [
        pytest.param("ddp", ANSWERED_LATER, id="ddp, overlap"),
        pytest.param("fsdp2", {}, id="fsdp2", marks=divides_on_cpus),
    ],
)
def test_workers_of_several_processes_go_on_where_they_were(tmp_path: Path, inner: str, flags: dict[str, Any]) -> None:
    """Both processes of a worker save their own slices, in the middle of a round of the slow worker."""
    expected, path = saved_divided(tmp_path, inner, **flags)
    for mine, its in zip(expected, run_divided(tmp_path / "resumed", inner, ckpt_path=path, **flags), strict=True):
        assert len(mine) == len(its) > 0
        assert all(map(torch.equal, mine, its))


@divides_on_cpus
def test_a_model_that_is_divided_otherwise_goes_on_where_it_was(tmp_path: Path) -> None:
    """What a worker has in its round, and what rounding has left, is cut into other slices."""
    expected, path = saved_divided(tmp_path, "ddp", **ANSWERED_LATER)
    first, second, *_ = run_divided(tmp_path / "resumed", "fsdp2", ckpt_path=path, **ANSWERED_LATER)
    for complete, *pieces in zip(expected[0], first, second, strict=True):
        torch.testing.assert_close(torch.cat(pieces), complete, rtol=0, atol=0.01)  # other slices round otherwise
