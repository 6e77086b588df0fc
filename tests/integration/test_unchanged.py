"""What modules and scripts do under DDP works here, without a line changed."""

from __future__ import annotations

import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import Logger
from lightning_utilities.core.imports import RequirementCache
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_halos import DilocoStrategy
from tests.integration.conftest import Run
from tests.integration.harness import Result
from tests.integration.toys import FEATURES, Toy, assert_same_model, halos, loader, make_trainer, outcome


def keys_of(trainer: Any) -> list[str]:
    return list(torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["state_dict"])


def compiled() -> Result:
    module, inner = Toy(), Toy()
    keys = list(inner.state_dict())
    inner.net = torch.compile(inner.net, backend="aot_eager")
    trainers = [
        make_trainer(halos(regions=1), devices=2, max_epochs=1, callbacks=ModelCheckpoint(), enable_checkpointing=True)
        for _ in range(2)
    ]
    trainers[0].fit(torch.compile(module, backend="eager"), loader(64), loader(8))
    trainers[1].fit(inner, loader(64))
    names = [key.replace("net.", "net._orig_mod.") for key in keys]  # as under DDP
    assert [keys_of(trainer) for trainer in trainers] == [keys, names]
    return outcome(trainers[0], module, inner=outcome(trainers[1], inner))


def test_compiled_modules_train_and_have_the_keys_of_ddp_in_checkpoints(run: Run) -> None:
    results = run(compiled, workers=2)
    for each in (results, [result["inner"] for result in results]):
        assert_same_model(each)
        assert all(result["global_step"] == 8 for result in each)


class Growing(Toy):
    """Has more data in every epoch."""

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(32 * (1 + self.trainer.current_epoch))


def growing(strategy: str) -> Result:
    module = Growing()
    trainer = make_trainer(
        halos(regions=1) if strategy == "halos" else DilocoStrategy(),
        devices=2,
        max_epochs=3,
        reload_dataloaders_every_n_epochs=1,
        val_check_interval=timedelta(seconds=0.05) if RequirementCache("lightning>=2.6") else None,
    )
    trainer.fit(module, val_dataloaders=loader(8))
    return outcome(trainer, module)


@pytest.mark.parametrize("strategy", ["halos", "diloco"])
def test_a_dataset_that_grows_and_validation_by_time(run: Run, strategy: str) -> None:
    results = run(growing, strategy, workers=2)
    assert_same_model(results)
    used = sorted(index for result in results for index in result["trained_on"])
    assert used == sorted([*range(32), *range(64), *range(96)])
    assert all(result["global_step"] == 4 + 8 + 12 for result in results)
    assert len(results[0]["validated_on"]) > 1  # a batch takes 0.02 s
    assert results[1]["validated_on"] == []


class Unlike(Toy):
    """Has other data from the second epoch on, of which the workers may not use what they share of the first."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.trained_in: list[list[int]] = []

    def on_train_epoch_start(self) -> None:
        self.trained_in.append([])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        batch = batch[0] if isinstance(batch[0], list) else batch
        self.trained_in[-1] += batch[2].tolist()
        return super().training_step(batch, batch_idx)

    def train_dataloader(self) -> Any:
        epoch, kind = self.trainer.current_epoch, self.kind
        if kind == "smaller batches":
            return loader(64, 8 // (1 + epoch))
        if kind == "larger batches":
            return loader(64, 4 * (1 + epoch))
        if epoch == 0:
            return loader(64)
        if kind == "two loaders":
            return [loader(64), loader(64)]
        if kind == "a sampler":
            return loader(64, sampler=[*range(8)] * 2)
        return loader(64, batch_size=None, sampler=[[0, 1], [2, 3], [4, 5], [6, 7]])  # a batch sampler


def unlike(kind: str) -> Result:
    module = Unlike(kind)
    trainer = make_trainer(halos(regions=1), devices=2, max_epochs=2, reload_dataloaders_every_n_epochs=1)
    trainer.fit(module, val_dataloaders=loader(8))
    return outcome(trainer, module, trained_in=module.trained_in)


@pytest.mark.parametrize(
    "kind", ["smaller batches", "larger batches", "two loaders", "a sampler", "batches of indices"]
)
def test_data_that_is_reloaded_in_another_form(run: Run, kind: str) -> None:
    results = run(unlike, kind, workers=2)
    assert_same_model(results)
    assert len(results[0]["validated_on"]) == 2, "at the end of each epoch"
    first, second = (sorted(i for result in results for i in result["trained_in"][epoch]) for epoch in range(2))
    assert first == [*range(64)]
    if kind == "a sampler":
        assert second == sorted([*range(8)] * 2)
    elif kind == "batches of indices":
        assert second == [*range(8)]
    else:
        assert second == [*range(64)]


class Counting(Toy):
    """Records in every batch what there is to know about the length of its epoch."""

    slow = 1

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[list[float]]] = []
        self.lasts: list[list[bool]] = []

    def on_train_epoch_start(self) -> None:
        self.seen.append([self.lengths()])
        self.lasts.append([])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen[-1].append(self.lengths())
        by_number = batch_idx + 1 == self.trainer.num_training_batches
        assert by_number == self.trainer.is_last_batch == self.trainer.fit_loop._data_fetcher.done
        self.lasts[-1].append(by_number)
        return super().training_step(batch, batch_idx)

    def lengths(self) -> list[float]:
        loader: Any = self.trainer.train_dataloader
        return [self.trainer.num_training_batches, len(loader), len(loader.sampler), len(loader.batch_sampler)]


def counting() -> Result:
    module = Counting()
    trainer = make_trainer(halos(regions=1), devices=2, max_epochs=2)
    trainer.fit(module, loader(128))
    after = [trainer.num_training_batches, len(trainer.train_dataloader)]
    return outcome(trainer, module, seen=module.seen, lasts=module.lasts, after=after)


def test_numbers_of_batches_while_training(run: Run) -> None:
    """The shard's, as far as a worker knows. A fast one has more batches, and the last one is known as such."""
    results = run(counting, workers=2)
    assert sum(len(epoch) for result in results for epoch in result["lasts"]) == 2 * 32
    for result in results:
        assert result["after"] == [16, 16]
        for seen, lasts in zip(result["seen"], result["lasts"], strict=True):
            assert seen[0] == [16, 16, 64, 16]
            if not lasts:
                continue  # this worker was late, and the other one had taken all data of the epoch
            assert [lengths[0] for lengths in seen[1:-1]] == [max(16, batch + 2) for batch in range(len(lasts) - 1)]
            assert seen[-1][0] == len(lasts)
            assert all(lengths[1:] == [16, 64, 16] for lengths in seen)
            assert lasts == [False] * (len(lasts) - 1) + [True]
    assert max(len(epoch) for result in results for epoch in result["lasts"]) > 16


class Uploading(Logger):
    """Records which checkpoints are there when it is told of one."""

    name, version = "uploading", 0

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, int]] = []

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        path = Path(checkpoint_callback.last_model_path)
        if path.is_file():
            step = torch.load(path, weights_only=True)["global_step"]
            self.told.append((path.name, step))

    def log_metrics(self, *_: Any, **__: Any) -> None: ...

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...


class Everyday(Toy):
    """Does in hooks what many modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        self.read: list[float] = []
        self.validated: list[Tensor] = []
        self.best = torch.inf

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.outputs.append(loss.detach())
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        assert isinstance(self.trainer.checkpoint_callback, ModelCheckpoint)
        assert isinstance(self.trainer.early_stopping_callback, EarlyStopping)
        if self.trainer.is_global_zero and self.trainer.current_epoch == self.trainer.fit_loop.batch_idx == 0:
            self.trainer.save_checkpoint("mine.ckpt")
            assert len(torch.load("mine.ckpt", weights_only=True)["state_dict"]) == 4

    def on_validation_epoch_end(self) -> None:
        self.best = min(self.best, float(self.trainer.callback_metrics["val_loss"]))
        self.validated = []  # another list, but empty as before

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("shown", self.loss(batch), prog_bar=True)

    def on_train_epoch_end(self) -> None:
        self.read.append(float(self.trainer.callback_metrics["val_loss"]))
        of_logger, of_bar = self.trainer.logged_metrics["val_loss"], self.trainer.progress_bar_metrics["shown"]
        assert [float(of_logger), of_bar] == pytest.approx([self.read[-1]] * 2, nan_ok=True)
        self.log("mean", torch.stack(self.outputs).mean())
        self.outputs.clear()

    def on_train_end(self) -> None:
        callback: Any = self.trainer.checkpoint_callback
        self.load_state_dict(torch.load(callback.best_model_path, weights_only=True)["state_dict"])
        super().on_train_end()


def everyday(strategy: str) -> Result:
    module, logger = Everyday(), Uploading()
    saving = ModelCheckpoint("saved", monitor="val_loss", save_last=True)
    trainer = make_trainer(
        DilocoStrategy(local_steps=4, timeout=60) if strategy == "diloco" else halos(regions=1),
        devices=2,
        max_epochs=3,
        enable_checkpointing=True,
        logger=logger,
        callbacks=[saving, EarlyStopping("val_loss", patience=10)],
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader(64), loader(8))
    best = torch.load(saving.best_model_path, weights_only=True)["state_dict"]
    assert all(torch.equal(best[name], tensor) for name, tensor in module.state_dict().items())
    said = [str(warning.message) for warning in caught]
    shown = [trainer.logged_metrics["val_loss"].item(), trainer.progress_bar_metrics["shown"]]
    told, best = logger.told, saving.best_model_path
    return outcome(trainer, module, read=module.read, told=told, said=said, best=best, shown=shown)


@pytest.mark.parametrize("strategy", ["halos", "diloco"])
def test_hooks_that_everybody_writes(run: Run, strategy: str) -> None:
    results = run(everyday, strategy, workers=2)
    assert_same_model(results)
    assert results[0]["best"] == results[1]["best"] != ""
    assert results[0]["shown"] == results[1]["shown"]
    for result in results:
        assert len(result["read"]) == 3
    if strategy == "halos":
        assert torch.isfinite(torch.tensor([result["read"] for result in results])).all()
        assert results[1]["read"][0] in results[0]["read"]
        assert results[0]["told"][-1] == ("last.ckpt", results[0]["global_step"])
    (said,) = [text for text in results[0]["said"] if "changed attributes of the module, on rank 0 only" in text]
    assert ": validated_on, best. " in said
    assert "self.log" in said


class Stacking(Toy):
    """Needs a batch in every epoch, as there is one under DDP."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.outputs.append(super().training_step(batch, batch_idx))
        return self.outputs[-1]

    def on_train_epoch_end(self) -> None:
        self.log("mean", torch.stack(self.outputs).mean().detach())
        self.outputs.clear()


def stacking() -> Result:
    module, trainer = Stacking(), make_trainer(halos(regions=1), devices=2, max_epochs=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader(4))
    return outcome(trainer, module, said=[str(warning.message) for warning in caught])


def test_an_epoch_in_which_a_worker_has_no_batch(run: Run) -> None:
    results = run(stacking, workers=2)
    assert_same_model(results)
    assert [result["global_step"] for result in results] == [1, 1]  # 3 local steps of 2 workers
    said = [text for result in results for text in result["said"] if "It is ignored: RuntimeError" in text]
    assert len(said) == 3


class Normalizing(Toy):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))

    def configure_optimizers(self) -> Any:
        optimizer = self.counted(torch.optim.SGD(self.parameters(), lr=1e-2))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def stochastic_averaging() -> Result:
    modules = [Normalizing(), Toy()]
    for module in modules:
        averaging = StochasticWeightAveraging(5e-3, swa_epoch_start=2, annealing_epochs=1)
        trainer = make_trainer(halos(regions=1), devices=2, max_epochs=4, callbacks=averaging)
        trainer.fit(module, loader(64), loader(8))
        assert trainer.global_step in (32, 33)  # with BatchNorm, Lightning counts a step that changes nothing
        assert averaging.n_averaged == 3
    return {**outcome(trainer, modules[0]), "other": outcome(trainer, modules[1])}


def test_stochastic_weight_averaging_trains_and_all_ranks_end_with_the_average(run: Run) -> None:
    results = run(stochastic_averaging, workers=2)
    assert_same_model(results)
    assert_same_model([result["other"] for result in results])
    assert results[0]["state"]["net.1.num_batches_tracked"] == 8  # of the additional epoch, on the worker's shard
    assert results[0]["state"]["net.1.running_mean"].abs().max() > 0


class Tunable(Toy):
    lr = 1e-3

    def configure_optimizers(self) -> Any:
        return self.counted(torch.optim.AdamW(self.parameters(), lr=self.lr))

    def on_train_end(self) -> None:
        """Ends the search, in which there are no rounds, too."""


def finding_a_rate() -> Result:
    module, finder = Tunable(), LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
    trainer = make_trainer(halos(regions=1), devices=2, max_epochs=1, callbacks=finder)
    trainer.fit(module, loader(160))
    assert finder.optimal_lr is not None
    return outcome(trainer, module, tried=finder.optimal_lr.results["lr"], found=module.lr)


def test_a_learning_rate_is_found_as_under_ddp(run: Run) -> None:
    results = run(finding_a_rate, workers=2)
    assert_same_model(results)
    assert results[0]["tried"] == results[1]["tried"] == sorted(results[0]["tried"])
    assert len(results[0]["tried"]) == 20
    assert results[0]["found"] == results[1]["found"] != 1e-3
    assert results[0]["global_step"] == 20


class Showing(Callback):
    """Looks at the validation data on all ranks, as callbacks do that show predictions."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, list[Any], list[int]]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        (inputs, _, numbers) = next(iter(trainer.val_dataloaders))
        assert pl_module.net(inputs).isfinite().all()
        self.seen.append((len(trainer.val_dataloaders.dataset), trainer.num_val_batches, numbers.tolist()))


class Asking(Toy):
    """Asks for the validation data when training starts, and has more of it in every epoch."""

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(8 * (1 + self.trainer.current_epoch))

    def on_train_start(self) -> None:
        assert self.trainer.num_val_batches == [1]
        assert len(self.trainer.val_dataloaders.dataset) == 8


def showing() -> Result:
    showing, module = Showing(), Asking()
    trainer = make_trainer(
        halos(regions=1),
        devices=2,
        max_epochs=3,
        callbacks=showing,
        limit_val_batches=1,
        reload_dataloaders_every_n_epochs=1,
    )
    trainer.fit(module, loader(64))
    trainer.validate(module, loader(16), verbose=False)
    return outcome(trainer, module, seen=showing.seen, limit=trainer.limit_val_batches)


def test_validation_data_is_there_on_all_ranks(run: Run) -> None:
    results = run(showing, workers=2)
    assert_same_model(results)
    for result in results:
        assert result["seen"] == [(8 * (1 + epoch), [1], [0, 1, 2, 3]) for epoch in range(3)]
        assert result["limit"] == 1
    assert [len(result["validated_on"]) for result in results] == [4, 1]  # rank 0's epochs, and all ranks' at the end


class Stepping(Toy):
    """Changes in hooks of the validation what belongs to all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def on_validation_epoch_end(self) -> None:
        self.lr_schedulers().step()

    def on_validation_end(self) -> None:
        self.level = self.trainer.current_epoch

    def configure_optimizers(self) -> Any:
        optimizer = self.counted(torch.optim.SGD(self.parameters(), lr=1e-2))
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


def stepping() -> Result:
    module, trainer = Stepping(), make_trainer(halos(regions=1), devices=2, max_epochs=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader(64), loader(8))
    return outcome(trainer, module, said=[str(warning.message) for warning in caught])


def test_what_any_hook_of_a_validation_changes_on_rank_0_only_is_named(run: Run) -> None:
    results = run(stepping, workers=2)
    assert_same_model(results)
    said = [text for text in results[0]["said"] if "A validation has changed" in text]
    assert len(said) == 2
    assert "attributes of the module, on rank 0 only: validated_on, level. " in said[0]
    assert "settings of optimizers, on rank 0 only: SGD.param_groups[0]['lr']. " in said[1]
    assert "on_train_epoch_end" in said[1]
