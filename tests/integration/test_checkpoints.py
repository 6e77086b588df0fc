"""A resumed run continues with all its state."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO, MixedPrecision, TorchCheckpointIO
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import nn

from lightning_halos import AsyncLocalSGDStrategy, CheckpointError
from lightning_halos.checkpoint.manifest import NAME, Manifest
from lightning_halos.checkpoint.places import newest_complete
from tests.integration.conftest import Run
from tests.integration.harness import Result
from tests.integration.toys import (
    BATCH,
    LOCAL_STEPS,
    Toy,
    Watching,
    assert_same_model,
    halos,
    loader,
    make_trainer,
    outcome,
    samples,
    state,
)
from tests.integration.virtual import simulate

WHOLE = {"global.pt", NAME, *(f"worker-{rank}.pt" for rank in range(4)), *(f"server-{index}.pt" for index in range(2))}


def manifest_of(path: Path) -> Manifest:
    """The manifest of a checkpoint, which has one save in its folder."""
    (folder,) = path.with_suffix("").iterdir()
    assert {file.name for file in folder.iterdir()} == WHOLE
    return Manifest.read((folder / NAME).read_text(), folder / NAME)


class Noting(Toy):
    """Records the epoch of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[int] = []
        self.first_state: dict[str, Any] = {}
        self.first_lr = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if not self.first_state:
            (adam,) = self.trainer.optimizers
            self.first_state = {"steps": [int(state["step"]) for state in adam.state.values()]}
        self.epochs += [self.current_epoch] * len(batch[2])
        return super().training_step(batch, batch_idx)


def saving(folder: Path, every: int, **kwargs: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1, **kwargs)


class Counting(pl.Callback):
    """Counts this worker's batches. Records the count and rank 0's metrics at the first batch of a fit."""

    def __init__(self) -> None:
        self.batches = 0
        self.at_start: tuple[int, list[str]] | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.at_start = self.at_start or (self.batches, list(trainer.callback_metrics))

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches = state["batches"]


def interrupted_and_resumed(folder: Path, step: int, flags: dict[str, Any]) -> Result:
    flags = {"val_check_interval": 10, "check_val_every_n_epoch": None, **flags}
    counting = Counting()
    trainer = make_trainer(callbacks=[saving(folder, step), counting], enable_checkpointing=True, **flags)
    first = Noting()
    trainer.fit(first, loader(shuffle=True), loader(16))
    counted, counting = counting.batches, Counting()
    module, trainer = Noting(), make_trainer(callbacks=counting, **flags)
    trainer.fit(module, loader(shuffle=True), loader(16), ckpt_path=folder / f"step={step}.ckpt")
    more = {"first": module.first_state, "counted": counted, "at_start": counting.at_start}
    return outcome(trainer, module, epochs=module.epochs, **more)


def test_a_run_resumes_where_it_was_saved(run: Run, tmp_path: Path) -> None:
    results = run(interrupted_and_resumed, tmp_path, 24, {"max_epochs": 3})
    manifest = manifest_of(tmp_path / "step=24.ckpt")
    done = sum(stop - start for start, stop in manifest.done)
    assert 0 < done == manifest.total
    # Others may have pushed several rounds before the snapshot began; a round in flight is not in it. Rank 0 estimates
    # in its round how far the others are, and on a busy machine they may be a round behind.
    assert done >= 24 * 4 - 8 * LOCAL_STEPS
    used = Counter(index for result in results for index in result["trained_on"])
    assert sum(used.values()) == 4 * (3 * 64 - done)  # what was in flight is run again, and nothing else
    assert max(used.values()) <= 3
    goes_on = [result for result in results if result["trained_on"]]  # others were late, and found no data left
    for result in results:
        assert (result["global_step"], result["epoch"]) == (48, 3)
    for result in goes_on:
        assert all(steps > 0 for steps in result["first"]["steps"])
        batches, metrics = result["at_start"]
        assert 0 <= batches <= result["counted"]
        assert "val_loss" in metrics
    assert any(0 < result["at_start"][0] < result["counted"] for result in goes_on)
    assert_same_model(results)


@pytest.mark.parametrize("shares_data", [True, False])
def test_what_falls_due_while_rank_0_waits_for_the_end_is_saved_at_the_end(tmp_path: Path, shares_data: bool) -> None:
    """It waits for the others' last rounds or, if the workers have data of their own, for a slow worker."""
    callbacks = [saving(tmp_path, 5), ModelCheckpoint(tmp_path, "last of {step}", every_n_train_steps=3)]
    results = simulate(
        tmp_path,
        Toy(),
        loader() if shares_data else loader(64),
        slow=0 if shares_data else 3,
        max_epochs=2,
        callbacks=callbacks,
        enable_checkpointing=True,
        use_distributed_sampler=shares_data,
    )
    assert_same_model(results)
    assert {result["global_step"] for result in results} == {32}
    saved = sorted(int(path.stem.removeprefix("step=")) for path in tmp_path.glob("step=*.ckpt"))
    assert saved[-1] == 32, "the multiples of 5 that were passed at the end are one save"
    assert set(saved[:-1]) < set(range(5, 32, 5))
    assert len(saved) > 2
    (last,) = tmp_path.glob("last of *.ckpt")
    assert last.stem == "last of step=32"
    for path in (last, tmp_path / "step=32.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["global_step"] == 32
        for name, tensor in results[0]["state"].items():
            assert torch.equal(checkpoint["state_dict"][name], tensor)


class Scaled(Noting):
    """Records the scale of the losses at its first batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        plugin = self.trainer.precision_plugin
        assert isinstance(plugin, MixedPrecision)
        assert plugin.scaler is not None
        self.first_state.setdefault("scale", plugin.scaler.get_scale())
        return loss


def one_server_interrupted_and_resumed(folder: Path) -> Result:
    """Under Async-Local-SGD, with scaled losses of 16 bits."""

    def trainer(scale: float, **kwargs: Any) -> pl.Trainer:
        precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
        strategy = AsyncLocalSGDStrategy(local_steps=4, timeout=60)
        return make_trainer(strategy, plugins=precision, max_epochs=2, **kwargs)

    trainer(64.0, callbacks=saving(folder, 16), enable_checkpointing=True).fit(Noting(), loader(shuffle=True))
    module, resumed = Scaled(), trainer(2.0)
    resumed.fit(module, loader(shuffle=True), ckpt_path=folder / "step=16.ckpt")
    return outcome(resumed, module, first=module.first_state)


def test_a_run_with_one_server_resumes(run: Run, tmp_path: Path) -> None:
    results = run(one_server_interrupted_and_resumed, tmp_path)
    (folder,) = (tmp_path / "step=16").iterdir()
    assert {file.name for file in folder.iterdir()} == WHOLE - {"server-1.pt"}
    done = sum(stop - start for start, stop in Manifest.read((folder / NAME).read_text(), folder / NAME).done)
    assert sum(len(result["trained_on"]) for result in results) == 4 * (2 * 64 - done) > 0
    for result in results:
        assert result["global_step"] == 32
        if result["trained_on"]:  # else the worker was late, and found no data left
            assert all(steps > 0 for steps in result["first"]["steps"])
            assert result["first"]["scale"] == 64.0
    assert_same_model(results)


def saved_with(folder: Path, flags: dict[str, Any]) -> Result:
    module, trainer = Noting(), make_trainer(callbacks=saving(folder, 24), enable_checkpointing=True, **flags)
    trainer.fit(module, loader(shuffle=True))
    return outcome(trainer, module)


def resumed_with(folder: Path, regions: Any, flags: dict[str, Any]) -> Result:
    module, watching = Noting(), Watching()
    workers = sum(map(len, regions))
    trainer = make_trainer(
        halos(regions=regions), devices=workers, callbacks=watching, enable_checkpointing=True, **flags
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader(shuffle=True), ckpt_path=folder / "step=24.ckpt")
    said = [str(warning.message) for warning in caught if "are kept" in str(warning.message)]
    return outcome(trainer, module, first=module.first_state, said=said, seen=watching.seen)


@pytest.mark.parametrize("regions", [[[0, 1, 2, 3]], [[0], [1, 2]], [[0, 1], [2], [3, 4]]], ids=str)
def test_a_run_resumes_with_other_workers_and_regions(run: Run, tmp_path: Path, regions: list[list[int]]) -> None:
    run(saved_with, tmp_path, {"max_epochs": 2})
    done = sum(stop - start for start, stop in manifest_of(tmp_path / "step=24.ckpt").done)
    workers = sum(map(len, regions))
    results = run(resumed_with, tmp_path, regions, {"max_epochs": 2}, workers=workers)
    used = Counter(index for result in results for index in result["trained_on"])
    assert sum(used.values()) == 4 * (2 * 64 - done)
    assert max(used.values()) <= 2
    for rank, result in enumerate(results):
        if result["trained_on"]:  # on a busy machine the others may have taken all data before a worker starts
            assert bool(result["first"]["steps"]) == (rank < 4)  # new workers start from scratch
        assert len(result["said"]) == (rank == 0)
    assert "Not kept: the local servers' momentum" in results[0]["said"][0]
    end = results[0]["global_step"]
    assert results[0]["seen"][-1] == end
    if len(results[0]["seen"]) > 3 * LOCAL_STEPS:  # on a busy machine the others may have taken all but a round of it
        assert any(24 < step < end for step in results[0]["seen"])
    assert_same_model(results)


class Wider(Toy):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 1))


class PartlyFrozen(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)


class Unsaveable(pl.Callback):
    """On one rank, a callback whose state can be neither copied nor written."""

    rank: int | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"lock": threading.Lock()} if rank_zero_only.rank == self.rank else {}


def refused(folder: Path, module: Toy, path: Any = "step=20.ckpt", regions: Any = ((0,), (1,)), **flags: Any) -> str:
    trainer = make_trainer(halos(regions=regions), devices=2, max_steps=30, **flags)
    try:
        trainer.fit(module, loader(), ckpt_path=folder / path)
    except (CheckpointError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def gone_wrong(folder: Path) -> Result:
    """Several mishaps, one after the other, with two workers."""
    flags = {"devices": 2, "max_steps": 20, "enable_checkpointing": True}
    make_trainer(halos(regions=[[0], [1]]), callbacks=saving(folder, 10), **flags).fit(Toy(), loader())
    trainer = make_trainer(halos(regions=[[0], [1]]), callbacks=saving(folder, 10), **flags)
    trainer.strategy.setup_environment()

    errors = {"other_model": refused(folder, Wider()), "other_part": refused(folder, PartlyFrozen())}
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        (shard,) = (folder / "step=20").glob("*/worker-1.pt")
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-1] + b"x")
    trainer.strategy.barrier()
    errors["damaged"] = refused(folder, Toy())
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        shard.unlink()
    trainer.strategy.barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        errors["out_of_reach"] = refused(folder, Toy(), regions=[[0, 1]])
    out_of_reach = [str(warning.message) for warning in caught if "Not kept" in str(warning.message)]
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        shard.write_bytes(whole)
        manifest = folder / "step=20" / shard.parent.name / NAME
        manifest.write_bytes(manifest.read_bytes().replace(b"algorithm", b"\xff"))
    trainer.strategy.barrier()
    errors["not_text"] = refused(folder, Toy())
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        manifest.unlink()
    trainer.strategy.barrier()
    errors["incomplete"] = refused(folder, Toy())
    unsaveable = Unsaveable()
    trainer = make_trainer(halos(regions=[[0], [1]]), devices=2, max_steps=11, callbacks=unsaveable)
    trainer.fit(Toy(), loader())
    for rank in range(2):
        unsaveable.rank = rank
        try:
            trainer.save_checkpoint(folder / "unsaveable.ckpt")
        except OSError as error:
            errors[f"unsaveable on {rank}"] = str(error)
    unsaveable.rank = None
    if trainer.is_global_zero:
        (folder / "blocked.ckpt").mkdir()
        (folder / "elsewhere").mkdir()
        shutil.copy(folder / "step=10.ckpt", folder / "elsewhere")
    trainer.strategy.barrier()
    try:
        trainer.save_checkpoint(folder / "blocked.ckpt")
    except OSError as error:
        errors["blocked"] = str(error)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        errors["without_shards"] = refused(folder, Toy(), "elsewhere/step=10.ckpt")
    without = [str(warning.message) for warning in caught if "has no folder of shards" in str(warning.message)]
    return {"errors": errors, "without_shards": without, "out_of_reach": out_of_reach}


def test_what_is_wrong_with_a_checkpoint_is_said_on_all_ranks(run: Run, tmp_path: Path) -> None:
    results = run(gone_wrong, tmp_path, workers=2)
    for result in results:
        errors = result["errors"]
        assert "Error(s) in loading state_dict for Wider" in errors["other_model"]  # Lightning's own
        assert errors["other_part"].startswith("CheckpointError: The checkpoint belongs to another model: ")
        assert errors["damaged"].startswith("CheckpointError: ")
        assert "worker-1.pt is damaged: its checksum is" in errors["damaged"]
        assert errors["out_of_reach"] == ""
        assert errors["not_text"].startswith(f"CheckpointError: {tmp_path / 'step=20'}")
        assert f"{NAME} is damaged" in errors["not_text"]
        for rank, name in enumerate(("unsaveable.ckpt", "worker-1.pt")):
            assert f"{name} could not be written: cannot pickle" in errors[f"unsaveable on {rank}"]
        assert errors["incomplete"].startswith(f"CheckpointError: {tmp_path / 'step=20.ckpt'} is incomplete")
        assert str(tmp_path / "step=10.ckpt") in errors["incomplete"]  # what to take instead
        assert errors["blocked"] == f"{tmp_path / 'blocked.ckpt'} could not be written"
        assert errors["without_shards"] == ""  # it goes on from the global model
    assert len(results[0]["without_shards"]) == 1
    _, warning = results[0]["out_of_reach"]
    assert "the optimizers of the workers [1], whose shards (worker-1.pt) are not in" in warning
    assert not list(tmp_path.glob("unsaveable*"))


def on_a_full_disk(folder: Path) -> Result:
    module, checkpoints = Toy(), ModelCheckpoint(folder, "{step}", every_n_train_steps=10, save_top_k=1)
    trainer = make_trainer(
        halos(regions=[[0], [1]]),
        devices=2,
        max_steps=40,
        callbacks=[checkpoints, FillsDisk(folder)],
        enable_checkpointing=True,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader())
    said = [str(warning.message) for warning in caught if "is not complete" in str(warning.message)]
    return outcome(trainer, module, said=said)


class FillsDisk(pl.Callback):
    """After the first complete checkpoint, rank 1 cannot write its shards any more. Until then, all are slow."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_rank == 1 and list(self.folder.glob(f"step=10/*/{NAME}")):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            (self.folder / "is full").touch()
        elif trainer.global_step >= 12 and not (self.folder / "is full").exists():
            time.sleep(0.3)

    def on_fit_end(self, *_: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_a_full_disk_ends_neither_the_run_nor_the_older_checkpoint(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    results = run(on_a_full_disk, folder, workers=2)
    assert [result["global_step"] for result in results] == [40, 40]
    assert_same_model(results)
    failed = [text for text in results[0]["said"] if "an earlier one is not yet" not in text]
    assert failed
    assert all("-1.pt could not be written" in text and "File too large" in text for text in failed)
    assert len(list(folder.glob(f"*/*/{NAME}"))) >= 1  # a complete one is left
    whole = newest_complete(folder / "last.ckpt")
    assert whole is not None
    assert torch.load(whole, weights_only=True)["state_dict"].keys() == results[0]["state"].keys()


def fit_and_note_warnings(trainer: pl.Trainer) -> Result:
    """Trains, and notes the warnings about checkpoints that are not complete."""
    module = Toy()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader())
    said = [str(warning.message) for warning in caught if "is not complete" in str(warning.message)]
    return outcome(trainer, module, said=said)


def on_a_slow_disk(folder: Path) -> Result:
    fsync = os.fsync
    os.fsync = lambda handle: (time.sleep(0.05), fsync(handle))[1]
    checkpoints = saving(folder, 1, save_last=True)
    trainer = make_trainer(
        halos(regions=[[0], [1]]), devices=2, max_epochs=1, callbacks=checkpoints, enable_checkpointing=True
    )
    return fit_and_note_warnings(trainer)


def test_on_a_slow_disk_checkpoints_are_left_out_but_never_the_final_one(run: Run, tmp_path: Path) -> None:
    results = run(on_a_slow_disk, tmp_path, workers=2)
    said = results[0]["said"]
    assert said
    assert all("an earlier one is not yet" in text for text in said)
    skipped = {path for path in tmp_path.glob("step=*.ckpt") if not list(path.with_suffix("").glob(f"*/{NAME}"))}
    assert {str(path) for path in skipped} <= {text.split()[2] for text in said}
    for name in ("step=32.ckpt", "last.ckpt"):
        manifest, *others = [
            Manifest.read(path.read_text(), path) for path in (tmp_path / name).with_suffix("").glob(f"*/{NAME}")
        ]
        assert not others
        assert (manifest.total, manifest.done) == (64, [[0, 64]])
        content = torch.load(tmp_path / name, weights_only=True)
        assert content["lightning_halos"]["save"] == manifest.save
        assert content["global_step"] == 32
        for key, tensor in results[0]["state"].items():
            assert torch.equal(content["state_dict"][key], tensor)


class SlowIO(TorchCheckpointIO):
    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(0.3)
        super().save_checkpoint(*args, **kwargs)


class Reading(pl.Callback):
    """Reads a checkpoint as soon as rank 0 has saved it."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.is_global_zero and not Path("mine.ckpt").exists():
            trainer.save_checkpoint("mine.ckpt")
            assert len(torch.load("mine.ckpt", weights_only=True)["state_dict"]) == 4


def saved_asynchronously(folder: Path) -> Result:
    trainer = make_trainer(
        halos(regions=[[0], [1]]),
        devices=2,
        max_steps=24,
        callbacks=[Reading(), saving(folder, 8, save_last=True)],
        enable_checkpointing=True,
        plugins=AsyncCheckpointIO(SlowIO()),
    )
    return fit_and_note_warnings(trainer)


def test_with_asynchronous_io_a_checkpoint_is_complete_when_its_file_is_there(run: Run, tmp_path: Path) -> None:
    results = run(saved_asynchronously, tmp_path, workers=2)
    assert all("an earlier one is not yet" in text for text in results[0]["said"])
    for name in ("step=24.ckpt", "last.ckpt"):
        (path,) = (tmp_path / name).with_suffix("").glob(f"*/{NAME}")
        content, manifest = torch.load(tmp_path / name, weights_only=True), Manifest.read(path.read_text(), path)
        assert content["global_step"] == 24
        assert content["lightning_halos"]["save"] == manifest.save
        for key, tensor in results[0]["state"].items():
            assert torch.equal(content["state_dict"][key], tensor)


def test_the_file_is_an_ordinary_checkpoint_of_lightnings(run: Run, tmp_path: Path) -> None:
    results = run(saved_with, tmp_path, {"max_steps": 24})
    path = tmp_path / "step=24.ckpt"
    weights = torch.load(path, weights_only=True)["state_dict"]
    loaded = Toy.load_from_checkpoint(path, weights_only=True).state_dict()
    for name, tensor in results[0]["state"].items():
        assert torch.equal(weights[name], tensor)
        assert torch.equal(loaded[name], tensor)
    module = Noting()
    module.on_train_end = lambda: None  # type: ignore[method-assign]
    trainer = make_trainer("auto", devices=1, max_steps=26)
    trainer.fit(module, loader(), ckpt_path=path)
    assert (trainer.global_step, len(module.trained_on)) == (26, 8)


def saved_at(path: str, home: Path) -> Result:
    """Saves at a path as Lightning takes it, and resumes from it. Returns what was said meanwhile."""
    os.environ["HOME"] = str(home)
    trainer = make_trainer(halos(regions=1), devices=1, max_steps=8)
    trainer.fit(Toy(), loader())
    trainer.save_checkpoint(path)
    again = make_trainer(halos(regions=1), devices=1, max_steps=12)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again.fit(Toy(), loader(), ckpt_path=path)
    said = [str(warning.message) for warning in caught if "shards" in str(warning.message)]
    return {"said": said, "step": again.global_step, "written": sorted(path.name for path in home.glob("model*"))}


@pytest.mark.parametrize("path", ["~/model.ckpt", pytest.param("file://{}/model.ckpt", marks=pytest.mark.slow)])
def test_paths_are_read_as_by_lightning(run: Run, tmp_path: Path, path: str) -> None:
    """A path that begins with ``~`` was a folder of this name, whose shards a resume did not find."""
    (result,) = run(saved_at, path.format(tmp_path), tmp_path, workers=1)
    assert (result["said"], result["step"], result["written"]) == ([], 12, ["model", "model.ckpt"])


class Stateful:
    """A loader of each worker's own, whose state is in checkpoints. It may have fewer batches than its length says."""

    def __init__(self, missing: int = 0) -> None:
        self.data = samples(128)
        self.next = 0
        self.missing = missing

    def __len__(self) -> int:
        return len(self.data) // 4 + self.missing

    def __iter__(self) -> Iterator[Any]:
        while self.next < len(self.data):
            self.next += 4
            yield self.data[self.next - 4 : self.next]
        self.next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


class SlowSecond(Toy):
    slow = 1


def with_stateful_loaders(folder: Path) -> Result:
    first, second = SlowSecond(), SlowSecond()
    flags = {"max_steps": 16, "callbacks": [saving(folder, 16)], "enable_checkpointing": True}
    make_trainer(halos(regions=1), devices=2, **flags).fit(first, Stateful())
    trainer = make_trainer(halos(regions=1), devices=2, max_epochs=1)
    trainer.fit(second, Stateful(), ckpt_path=folder / "step=16.ckpt")
    return {"first": first.trained_on, "second": second.trained_on}


def test_a_loader_with_its_own_state_goes_on_where_each_worker_was(run: Run, tmp_path: Path) -> None:
    results = run(with_stateful_loaders, tmp_path, workers=2)
    assert len(results[0]["first"]) > len(results[1]["first"])
    for result in results:
        assert result["first"] + result["second"] == list(range(128))


def resumed_from_inside(folder: Path, slow: int, missing: int) -> Result:
    """Resumes from each complete checkpoint of a fit in which the fast worker ends first."""
    SlowSecond.slow = slow
    first, results = SlowSecond(), {}
    flags = {"max_epochs": 1, "callbacks": [saving(folder, 8)], "enable_checkpointing": True}
    make_trainer(halos(regions=2), devices=2, **flags).fit(first, Stateful(missing))
    for path in sorted(folder.glob(f"step=*/*/{NAME}")):
        module, trainer = SlowSecond(), make_trainer(halos(regions=2), devices=2, max_epochs=1)
        module.pause = 0.0
        name = path.parent.parent.name
        trainer.fit(module, Stateful(missing), ckpt_path=folder / f"{name}.ckpt")
        results[name] = module.trained_on
    return {"first": first.trained_on, **results}


@pytest.mark.parametrize(("slow", "missing"), [(0, 3), (1, 0)])
def test_a_loader_with_its_own_state_repeats_exactly_what_no_server_had(
    run: Run, tmp_path: Path, slow: int, missing: int
) -> None:
    results = run(resumed_from_inside, tmp_path, slow, missing, workers=2)
    assert [result["first"] for result in results] == [list(range(128))] * 2
    saved = results[0].keys() - {"first"}
    assert saved  # on a busy machine, not every eighth step: rank 0 may see several pass at once
    for name in saved:
        starts = [128 - len(result[name]) for result in results]
        assert [result[name] for result in results] == [list(range(start, 128)) for start in starts], name
        (path,) = tmp_path.glob(f"{name}/*/{NAME}")
        assert sum(starts) == BATCH * Manifest.read(path.read_text(), path).total, name


def without_steps() -> Result:
    results = {}
    for name, data, flags in (("no_steps", loader(), {"max_steps": 0}), ("no_data", loader(0), {"max_epochs": 1})):
        trainer, module = make_trainer(halos(regions=1), devices=2, **flags), Toy()
        trainer.fit(module, data)
        results[name] = state(module)["net.0.weight"]
    return results


def test_a_fit_without_steps_gives_all_ranks_one_model(run: Run) -> None:
    results = run(without_steps, workers=2)
    for name, weight in results[0].items():
        assert torch.equal(results[1][name], weight)
