"""A simulation is a real run under another clock: deterministic, with all that a Trainer does."""

from __future__ import annotations

import copy
import csv
import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_halos import (
    AsyncLocalSGDStrategy,
    DilocoStrategy,
    HalosMonitor,
    HalosStrategy,
    SimulatedCluster,
    SyncSGDStrategy,
)
from lightning_halos.simulation.history import Event

WORKERS, SAMPLES, FEATURES, BATCH = 4, 256, 8, 4
CLUSTER = SimulatedCluster(
    bandwidths=[[10.0, 0.1], [0.2, 10.0]],
    worker_speeds=[[1.0, 0.5], [0.8, 0.25]],
    step_ms=100.0,
    message_bytes=1_000_000,
    record_parameters=True,
)
STRATEGIES = {
    "halos": lambda **kwargs: HalosStrategy(simulate=CLUSTER, local_steps=4, accumulate_updates=3, **kwargs),
    "async_local_sgd": lambda **kwargs: AsyncLocalSGDStrategy(simulate=CLUSTER, local_steps=4, **kwargs),
    "diloco": lambda **kwargs: DilocoStrategy(simulate=CLUSTER, local_steps=4, **kwargs),
    "diloco_dynamic": lambda **kwargs: DilocoStrategy(
        simulate=CLUSTER, local_steps=4, dynamic_local_steps=True, **kwargs
    ),
    "sync_sgd": lambda **kwargs: SyncSGDStrategy(simulate=CLUSTER, **kwargs),
}
FAR = dataclasses.replace(CLUSTER, message_bytes=200_000_000)  # a push is answered after 3 batches
OVERLAPPING = {
    "overlap": lambda **kwargs: HalosStrategy(
        simulate=FAR, local_steps=4, accumulate_updates=3, overlap=True, **kwargs
    ),
}
BUSY = {
    "overlap, busy servers": lambda **kwargs: HalosStrategy(
        simulate=dataclasses.replace(FAR, server_gigabytes_per_second=1.0),
        local_steps=4,
        accumulate_updates=3,
        overlap=True,
        **kwargs,
    ),
}
NAMED = ["rank 0 (region 0)", "rank 1 (region 0)", "rank 2 (region 1)", "rank 3 (region 1)"]
WORLD = "the simulated world of rank 0 (region 0)"
every_strategy = pytest.mark.parametrize("name", STRATEGIES)


class Toy(pl.LightningModule):
    """Linear regression with dropout and BatchNorm, so that every worker's randomness counts.

    Attributes:
        nap: Seconds that a batch may take longer, at random and not seeded.
    """

    nap = 0.0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 1))
        self.folder: Path | None = None

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        time.sleep(self.nap * (time.perf_counter_ns() % 7))
        if self.folder is not None:
            with (self.folder / f"samples{self.global_rank}").open("a") as file:
                file.writelines(f"{self.current_epoch} {index}\n" for index in batch[2].tolist())
        loss = mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", mse_loss(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loader(samples: int = SAMPLES, **kwargs: Any) -> DataLoader[Any]:
    inputs = torch.randn(samples, FEATURES, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True), torch.arange(samples)), BATCH, **kwargs)


def fit(
    name: str, module: Toy | None = None, data: Any = None, ckpt_path: Path | None = None, **kwargs: Any
) -> tuple[pl.Trainer, Toy]:
    module = module or Toy()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    fixed = {"accelerator": "cpu", "devices": 1, "enable_model_summary": False, "num_sanity_val_steps": 0}
    options = {key: kwargs.pop(key) for key in ["max_norm_ratio", "wire"] if key in kwargs}
    strategy = {**STRATEGIES, **OVERLAPPING, **BUSY}[name](timeout=60, **options)
    trainer = pl.Trainer(strategy=strategy, **{**quiet, **fixed, "log_every_n_steps": 5, **kwargs})
    pl.seed_everything(1, verbose=False)
    trainer.fit(module, None if data is module else loader() if data is None else data, loader(32), ckpt_path=ckpt_path)
    return trainer, module


@pytest.mark.parametrize(
    "name", ["halos", pytest.param("diloco_dynamic", marks=pytest.mark.slow), "sync_sgd", *OVERLAPPING]
)
def test_the_result_does_not_depend_on_the_machines_own_timing(name: str, tmp_path: Path) -> None:
    steady, napping = Toy(), Toy()
    napping.nap = 0.004
    flags = {"max_steps": 30, "val_check_interval": 10, "check_val_every_n_epoch": None, "log_every_n_steps": 1}
    first, _ = fit(name, steady, **flags, logger=CSVLogger(tmp_path, "", "first"), callbacks=HalosMonitor())
    second, _ = fit(name, napping, **flags, logger=CSVLogger(tmp_path, "", "second"), callbacks=HalosMonitor())
    assert (tmp_path / "first" / "metrics.csv").read_text() == (tmp_path / "second" / "metrics.csv").read_text()
    assert len(first.strategy.history) > 5
    for one, other in zip(first.strategy.history, second.strategy.history, strict=True):
        assert {**vars(one), "parameters": None} == {**vars(other), "parameters": None}
        assert one.parameters is None or torch.equal(one.parameters, other.parameters)
    for parameter, same in zip(steady.state_dict().values(), napping.state_dict().values(), strict=True):
        assert torch.equal(parameter, same)
    assert first.callback_metrics["val_loss"] == second.callback_metrics["val_loss"]


@pytest.mark.parametrize("name", [*STRATEGIES, *OVERLAPPING])
def test_all_workers_together_take_the_steps_that_were_ordered(name: str) -> None:
    trainer, _ = fit(name, max_steps=25)
    assert trainer.strategy.history[-1].kind == "end"
    assert trainer.strategy.history[-1].steps == 25 * WORKERS


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        *((name, {}) for name in [*STRATEGIES, *OVERLAPPING] if name != "sync_sgd"),
        ("halos", {"accumulate_grad_batches": 3}),
        pytest.param("diloco", {"accumulate_grad_batches": 3}, marks=pytest.mark.slow),
        ("halos", {"limit_train_batches": 10}),
        pytest.param("diloco", {"limit_train_batches": 10}, marks=pytest.mark.slow),
        ("halos", {"reload_dataloaders_every_n_epochs": 1}),
    ],
    ids=str,
)
def test_every_sample_is_used_once_per_epoch(name: str, flags: dict[str, Any], tmp_path: Path) -> None:
    module = Toy()
    module.folder = tmp_path
    fit(name, module, loader(250), max_epochs=3, **flags)
    for epoch in range(3):
        used = sorted(index for at, index in samples_in(tmp_path) if at == epoch)
        if "limit_train_batches" in flags:
            assert len(used) == len(set(used)) == 10 * BATCH * WORKERS
        else:
            assert used == list(range(250))


def samples_in(folder: Path) -> list[tuple[int, int]]:
    """Epoch and index of every sample that a worker trained on."""
    lines = [line.split() for path in folder.glob("samples*") for line in path.read_text().splitlines()]
    return [(int(epoch), int(index)) for epoch, index in lines]


class Growing(Toy):
    """Has more data in every epoch."""

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(40 + 50 * self.trainer.current_epoch, shuffle=True)


@pytest.mark.parametrize("name", ["halos", "diloco"])
def test_a_dataset_that_grows_is_used_as_in_a_real_run(name: str, tmp_path: Path) -> None:
    """Workers share its first epoch; then each has the part that it would have under DDP."""
    modules = [Growing(), Growing()]
    for number, module in enumerate(modules):
        module.folder = tmp_path / str(number)
        module.folder.mkdir()
        trainer, _ = fit(name, module, module, max_epochs=3, reload_dataloaders_every_n_epochs=1)
    used = [sorted(index for at, index in samples_in(tmp_path / "0") if at == epoch) for epoch in range(3)]
    assert used[0] == list(range(40))
    for epoch, length in ((1, 90), (2, 140)):
        assert set(used[epoch]) == set(range(length))
        assert len(used[epoch]) == -(-length // WORKERS) * WORKERS  # DDP's sampler repeats samples for equal parts
        parts = [path.read_text().splitlines() for path in (tmp_path / "0").glob("samples*")]
        assert {sum(line.startswith(f"{epoch} ") for line in part) for part in parts} == {-(-length // WORKERS)}
    assert trainer.strategy.history[-1].steps == 10 + WORKERS * (6 + 9)
    for parameter, same in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        assert torch.equal(parameter, same)


def test_a_dataset_that_grows_leaves_the_ordered_steps_as_they_are() -> None:
    module = Growing()
    trainer, _ = fit("halos", module, module, max_steps=25, reload_dataloaders_every_n_epochs=1)
    assert trainer.strategy.history[-1].steps == 25 * WORKERS


class Skipping(Toy):
    """Skips the rest of its first epoch."""

    def on_train_batch_start(self, batch: list[Tensor], batch_idx: int) -> int | None:
        return -1 if (self.current_epoch, batch_idx) == (0, 5) and self.global_rank == 1 else None


def test_skipping_the_rest_of_an_epoch_repeats_nothing(tmp_path: Path) -> None:
    module = Skipping()
    module.folder = tmp_path
    fit("halos", module, max_epochs=2)
    used = samples_in(tmp_path)
    assert len(used) == len(set(used))


def test_dataloader_workers_look_ahead_without_changing_anything() -> None:
    plain, looking_ahead = Toy(), Toy()
    fit("halos", plain, max_steps=20)
    fit("halos", looking_ahead, loader(num_workers=1, multiprocessing_context="fork"), max_steps=20)
    for parameter, same in zip(plain.state_dict().values(), looking_ahead.state_dict().values(), strict=True):
        assert torch.equal(parameter, same)


class Plain(Toy):
    """A module without dropout or BatchNorm, for which DDP and a simulation give the same result."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 4), nn.Linear(4, 1))


class Experts(Plain):
    """Workers use different parameters, also of different size; one has sparse gradients, one is complex."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(FEATURES, n), nn.Linear(n, 1)) for n in (1, 2, 3))
        self.rows = nn.EmbeddingBag(8, 1, sparse=True)
        self.wave = nn.Parameter(torch.ones(FEATURES, dtype=torch.complex64))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y, _ = batch
        expert = self.experts[(self.global_rank + batch_idx) % 3]
        wave = (x * self.wave.conj()).real + (x * self.wave).abs()
        rows = self.rows((x[:, :2].abs() * 2).long().clamp(0, 7))
        return mse_loss(self.net(x) + expert(x) + rows + wave.sum(1, keepdim=True), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize(
    ("kind", "clip", "strategy"),
    [(Plain, 0.5, "ddp_fork"), (Experts, None, "ddp_fork_find_unused_parameters_true")],
    ids=["the same parameters", "other parameters on each worker"],
)
def test_synchronous_sgd_is_ddp(kind: type[Plain], clip: float | None, strategy: str) -> None:
    torch.manual_seed(3)
    simulated, real = kind(), kind()
    real.load_state_dict(simulated.state_dict())
    fit("sync_sgd", simulated, max_steps=20, gradient_clip_val=clip)
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=WORKERS,
        max_steps=20,
        gradient_clip_val=clip,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    pl.seed_everything(1, verbose=False)
    trainer.fit(real, loader())
    for parameter, same in zip(simulated.parameters(), real.parameters(), strict=True):
        torch.testing.assert_close(parameter, same, rtol=1e-5, atol=1e-6)


@every_strategy
def test_loggers_get_the_virtual_time(name: str, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, "", "")
    trainer, _ = fit(name, max_steps=40, val_check_interval=10, check_val_every_n_epoch=None, logger=logger)
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    validated = [(int(row["step"]), float(row["virtual_seconds"])) for row in rows if row.get("val_loss")]
    assert [step for step, _ in validated] == [9, 19, 29, 39]
    times = [seconds for _, seconds in validated]
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] <= trainer.strategy.virtual_seconds * (1 + 1e-6)  # loggers have float32
    assert trainer.strategy.virtual_seconds == trainer.strategy.history[-1].time / 1e3


@pytest.mark.parametrize(("strategy", "seconds"), [(HalosStrategy, 9.0), (DilocoStrategy, 2.0), (SyncSGDStrategy, 2.0)])
def test_the_model_of_synchronous_rounds_was_there_at_the_end_of_the_last_one(strategy: Any, seconds: float) -> None:
    made = strategy(simulate=CLUSTER)
    assert made.model_seconds == 0
    made.store_history([Event(2000.0, "round", -1, -1, 1, 8)], 9.0)
    assert made.model_seconds == seconds


@pytest.mark.parametrize(("name", "accumulated"), [*((name, 1) for name in STRATEGIES), ("sync_sgd", 2)])
def test_rank_0_decides_for_everybody(name: str, accumulated: int, tmp_path: Path) -> None:
    stopping = EarlyStopping("val_loss", patience=0, mode="max")  # it falls, so this stops at the second validation
    saving = ModelCheckpoint(tmp_path, monitor="val_loss")
    flags = {"max_steps": 400, "val_check_interval": 10, "check_val_every_n_epoch": None}
    trainer, _ = fit(name, **flags, accumulate_grad_batches=accumulated,
                     callbacks=[stopping, saving], enable_checkpointing=True)  # fmt: skip
    assert trainer.strategy.history[-1].steps < 60 * WORKERS
    assert len(list(tmp_path.glob("*.ckpt"))) == 1


class StopsBetweenBatches(Toy):
    """One worker asks for the end, in a hook outside of a batch."""

    hook = ""

    def stop(self, hook: str) -> None:
        if hook == self.hook and self.global_rank == 1 and self.trainer.fit_loop.total_batch_idx > 5:
            self.trainer.should_stop = True

    def on_train_batch_end(self, *args: Any) -> None:
        self.stop("on_train_batch_end")  # later than that of callbacks

    def on_train_epoch_end(self) -> None:
        self.stop("on_train_epoch_end")

    def on_train_epoch_start(self) -> None:
        self.stop("on_train_epoch_start")


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end", "on_train_epoch_start"])
@pytest.mark.parametrize(("name", "accumulated"), [("halos", 1), ("sync_sgd", 1), ("sync_sgd", 2)])
def test_any_worker_may_stop_the_run_between_two_batches(name: str, accumulated: int, hook: str) -> None:
    module = StopsBetweenBatches()
    module.hook = hook
    trainer, _ = fit(name, module, max_epochs=50, accumulate_grad_batches=accumulated)
    assert trainer.strategy.history[-1].steps < 50 * SAMPLES // BATCH


class Marching(Toy):
    """A teacher that moves by 1 in each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    @torch.no_grad()
    def on_train_batch_end(self, *args: Any) -> None:
        self.teacher[0].bias += 1


@pytest.mark.parametrize("name", ["async_local_sgd", "diloco", "sync_sgd"])
def test_a_teacher_moves_as_far_as_those_of_its_workers(name: str) -> None:
    module = Marching()
    before = module.teacher[0].bias.clone()
    trainer, _ = fit(name, module, max_steps=40)
    moved = module.teacher[0].bias - before
    expected = torch.full_like(moved, trainer.strategy.history[-1].steps / WORKERS)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-3)


def test_a_worker_that_raises_ends_the_simulation() -> None:
    class Broken(Toy):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            alarm = self.trainer.strategy._fit.world.alarm
            if self.global_rank == 0:  # what its errors would call the others
                assert {link.peer for link in alarm.links} == {WORLD, *NAMED}
            if self.global_rank == 2 and batch_idx == 5:
                raise RuntimeError(f"the cat sat on the keyboard of {alarm.here}")
            return super().training_step(batch, batch_idx)

    with pytest.raises(Exception, match=r"the cat sat on the keyboard of rank 2 \(region 1\)"):
        fit("halos", Broken(), max_steps=400)


class Spoiled(Toy):
    """One worker's device fails after a while."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.global_rank == 3 and self.global_step > 60:
            with torch.no_grad():
                self.net[0].weight.fill_(1e6)
        return super().training_step(batch, batch_idx)


def test_what_one_worker_spoils_is_kept_out_of_the_model_and_the_worker_is_named(tmp_path: Path) -> None:
    log = logging.getLogger("lightning_halos")
    log.addHandler(to_file := logging.FileHandler(tmp_path / "log"))
    try:
        trainer, module = fit("halos", Spoiled(), max_steps=100, max_norm_ratio=10)
    finally:
        log.removeHandler(to_file)
        to_file.close()
    text = (tmp_path / "log").read_text()
    assert "The last 3 updates of rank 3 (region 1) were all rejected, this one because its norm of " in text
    assert trainer.strategy.history[-1].steps == 100 * WORKERS
    assert _largest(module) < 100
    assert _largest(fit("halos", Spoiled(), max_steps=100)[1]) > 1000, "without the limit"


def _largest(module: nn.Module) -> float:
    return max(float(parameter.abs().max()) for parameter in module.parameters())


class TestErrors:
    def test_more_regions_than_the_cluster_says(self) -> None:
        with pytest.raises(ValueError, match=r"regions=2 must be None with simulate=\.\.\."):
            HalosStrategy(regions=2, simulate=CLUSTER)

    def test_not_a_cluster(self) -> None:
        with pytest.raises(TypeError, match=r"simulate=<int> must be a SimulatedCluster, or the path of its file"):
            HalosStrategy(simulate=4)  # type: ignore[arg-type]
        for path in ("nowhere.yaml", Path("nowhere.yaml")):
            with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
                HalosStrategy(simulate=path)

    def test_synchronous_sgd_without_a_cluster(self) -> None:
        with pytest.raises(ValueError, match="strategy='ddp'"):
            SyncSGDStrategy()

    def test_several_nodes(self) -> None:
        with pytest.raises(ValueError, match="num_nodes=1"):
            pl.Trainer(strategy=HalosStrategy(simulate=CLUSTER), accelerator="cpu", devices=1, num_nodes=2)
