"""Rank 0's decisions for all workers: validation during a fit, early stopping, and checkpoints."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.nn.functional import mse_loss

from tests.integration.conftest import Run
from tests.integration.harness import Result
from tests.integration.toys import (
    LOCAL_STEPS,
    Toy,
    assert_no_step_lost,
    assert_same_model,
    assert_trained,
    halos,
    loader,
    make_trainer,
    outcome,
    samples,
    state,
)
from tests.integration.virtual import simulate

HELD_OUT = 30  # samples, in batches of 4


# An epoch has 16 batches. The last number is how often DDP validates.
@pytest.mark.parametrize(
    ("flags", "validations", "slow"),
    [
        pytest.param(
            {"max_steps": 60, "val_check_interval": 20, "check_val_every_n_epoch": None},
            3,
            None,
            marks=pytest.mark.slow,
        ),
        ({"max_steps": 60, "val_check_interval": 20, "check_val_every_n_epoch": None}, 3, 0),
        ({"max_steps": 40, "val_check_interval": 10}, 2, 0),
        ({"max_steps": 10, "val_check_interval": 10, "accumulate_grad_batches": 2}, 1, 0),
        ({"max_steps": 40}, 2, 0),
        pytest.param({"max_epochs": 3}, 3, None, marks=pytest.mark.slow),
        ({"max_epochs": 3}, 3, 0),
        ({"max_epochs": 4, "check_val_every_n_epoch": 2}, 2, 0),
        pytest.param({"max_epochs": 1, "val_check_interval": 0.25}, 4, None, marks=pytest.mark.slow),
        ({"max_epochs": 1, "val_check_interval": 0.25}, 4, 0),
        ({"max_epochs": 1, "num_sanity_val_steps": 1}, 1, 0),
    ],
    ids=str,
)
def test_validation_runs_on_rank_0_as_often_as_under_ddp(
    tmp_path: Path, flags: dict[str, Any], validations: int, slow: int | None
) -> None:
    # Rank 0 learns at the end of each of its rounds how far all are: in time for a quarter of so short an epoch.
    strategy = {"local_steps": 1} if flags.get("val_check_interval") == 0.25 else {}
    first, *others = simulate(tmp_path, Toy(), loader(), loader(HELD_OUT), slow=slow, strategy=strategy, **flags)
    everything, sanity = list(range(HELD_OUT)), [[0, 1, 2, 3]] if "num_sanity_val_steps" in flags else []
    count = len(first["validated_on"]) - len(sanity)
    assert first["validated_on"] == sanity + [everything] * count
    # Two that fall due together, since this worker's data of an epoch ends before that of others, are one.
    assert count == validations or (count == validations - 1 and flags.get("val_check_interval") == 0.25)
    for other in others:
        assert other["validated_on"] == []
        assert other["metrics"]["val_loss"] == first["metrics"]["val_loss"]


def validated() -> Result:
    module, trainer = Toy(), make_trainer(max_epochs=2)
    trainer.fit(module, loader(), loader(HELD_OUT))
    return outcome(trainer, module, limit=trainer.limit_val_batches)


def test_in_real_time_rank_0_validates_too_and_the_others_get_its_metrics(run: Run) -> None:
    first, *others = run(validated)
    assert first["validated_on"] == [list(range(HELD_OUT))] * 2
    for other in others:
        assert other["validated_on"] == []
        assert other["metrics"]["val_loss"] == first["metrics"]["val_loss"]
        assert other["limit"] == first["limit"]


class Remembering(Toy):
    """Records the validated model, and its own model before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.own: list[Any] = []
        self.steps: list[int] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.before = state(self)

    def on_train_batch_start(self, *_: Any) -> None:
        if len(self.own) < len(self.seen):
            self.own.append([self.before, state(self)])

    def on_validation_epoch_end(self) -> None:
        self.seen.append([state(self), float(self.trainer.callback_metrics["val_loss"])])
        self.steps.append(self.trainer.global_step)


def validated_model() -> Result:
    module, trainer = Remembering(), make_trainer(max_steps=60, val_check_interval=20, check_val_every_n_epoch=None)
    trainer.fit(module, loader(), loader(HELD_OUT))
    return outcome(trainer, module, seen=module.seen, own=module.own)


def loss_of(weights: Any, number: int = HELD_OUT) -> float:
    module = Toy()
    module.load_state_dict(weights)
    inputs, targets, _ = samples(number).tensors
    return float(mse_loss(module.net(inputs), targets).detach())


def test_the_global_model_is_validated_and_the_workers_own_goes_on(run: Run) -> None:
    results = run(validated_model)
    assert_trained(results, max_steps=60)
    first = results[0]
    assert 2 <= len(first["seen"]) <= 3  # two that fall due at once, on a busy machine, are one
    for weights, loss in first["seen"]:
        assert loss == pytest.approx(loss_of(weights), rel=1e-5)
    last_weights, _ = first["seen"][-1]
    assert all(torch.equal(last_weights[name], first["state"][name]) for name in last_weights)
    assert len(first["own"]) == len(first["seen"]) - 1
    for (weights, _), (before, after) in zip(first["seen"], first["own"], strict=False):
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert not torch.equal(weights["net.0.weight"], after["net.0.weight"])


class Looking(pl.Callback):
    """Looks at the global model in the middle of training."""

    def __init__(self) -> None:
        self.looks: list[list[Any]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        before = state(pl_module)
        with trainer.strategy.global_model():
            seen = state(pl_module)
            saved = {name: part.clone() for name, part in trainer.strategy.lightning_module_state_dict().items()}
        self.looks.append([before, seen, state(pl_module), saved])


def looked_at() -> Result:
    module, looking = Toy(), Looking()
    trainer = make_trainer(max_steps=20, callbacks=[looking])
    trainer.fit(module, loader())
    with trainer.strategy.global_model():
        final = state(module)
    return outcome(trainer, module, looks=looking.looks, final=final)


def test_a_callback_of_rank_0_can_look_at_the_global_model(run: Run) -> None:
    results = run(looked_at)
    assert_trained(results, max_steps=20)
    for rank, result in enumerate(results):
        for before, seen, after, saved in result["looks"]:
            assert all(torch.equal(before[name], after[name]) for name in before)
            assert all(torch.equal(seen[name], saved[name]) for name in seen)
        other = [not torch.equal(seen["net.0.weight"], before["net.0.weight"]) for before, seen, *_ in result["looks"]]
        assert any(other) == (rank == 0)
        assert torch.equal(result["final"]["net.0.weight"], result["state"]["net.0.weight"])


class OftenWithoutData(Toy):
    """Records for each epoch: the batches of this worker, and the validations until then."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[list[int]] = []
        self.batches = 0

    def on_train_epoch_start(self) -> None:
        self.batches = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.batches += 1

    def on_train_epoch_end(self) -> None:
        validations = len(self.validated_on)
        if self.global_rank == 0 and validations:
            assert self.trainer.callback_metrics["val_loss"] > 0
        self.epochs.append([self.batches, validations])

    def more(self) -> Result:
        return {"epochs": self.epochs}


def assert_final_model_validated(result: Result) -> None:
    """The last validation, of 8 samples, was of the model that the fit ended with."""
    module = Toy()
    module.load_state_dict(result["state"])
    with torch.no_grad():
        losses = [module.loss(batch) for batch in loader(8)]
    assert result["metrics"]["val_loss"] == pytest.approx(float(sum(losses)) / 2)


@pytest.mark.parametrize("every", [1, 2])
def test_rank_0_validates_also_if_others_took_all_data_of_an_epoch(tmp_path: Path, every: int) -> None:
    results = simulate(
        tmp_path, OftenWithoutData(), loader(16), loader(8), slow=0, max_epochs=6, check_val_every_n_epoch=every
    )
    assert_same_model(results)
    assert [sum(result["epochs"][epoch][0] for result in results) for epoch in range(6)] == [4] * 6
    # There are as many validations as epochs, except where the global model is still that of the last one.
    batches, validations = zip(*results[0]["epochs"], strict=True)
    assert batches == (1, 0, 0, 1, 0, 0)
    assert validations == ((1, 1, 1, 2, 2, 3) if every == 1 else (0, 1, 1, 2, 2, 3))
    assert_final_model_validated(results[0])


class Reducing(OftenWithoutData):
    """Has a schedule that needs a metric at the end of each epoch."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


@pytest.mark.parametrize("slow", [None, 0, 3])
def test_with_max_steps_each_epoch_of_rank_0_ends_with_a_validation_too(tmp_path: Path, slow: int | None) -> None:
    stopping = EarlyStopping("val_loss", patience=9)
    data = loader(), loader(HELD_OUT)
    results = simulate(tmp_path, Reducing(), *data, slow=slow, max_steps=40, callbacks=[stopping])
    assert_same_model(results)
    assert [validations for _, validations in results[0]["epochs"]][:2] == [1, 2]
    assert {result["global_step"] for result in results} == {40}


def test_each_epoch_of_rank_0_has_its_validation_although_its_ends_drift_from_the_runs(tmp_path: Path) -> None:
    """9 batches for 8 workers are 2 per shard, so the run has an end every 2 steps, and the data one every 9 / 8."""
    strategy = {"local_steps": 1}
    results = simulate(tmp_path, Reducing(), loader(36), loader(8), regions=(4, 4), strategy=strategy, max_steps=24)
    assert_same_model(results)
    validations = [0, *(count for _, count in results[0]["epochs"])]
    assert len(validations) > 16
    before_the_last = validations[:-3]  # just before it ends, the run waits for its final model
    assert all(before < after for before, after in pairwise(before_the_last))


@pytest.mark.parametrize("flags", [{}, {"max_steps": 1_000_000}, {"accumulate_grad_batches": 2, "max_steps": 1_000}])
def test_the_final_model_is_validated_if_the_data_ends_the_run(tmp_path: Path, flags: dict[str, Any]) -> None:
    results = simulate(tmp_path, Toy(), loader(60), loader(8), regions=(2,), max_epochs=3, **flags)
    assert_final_model_validated(results[0])


class RunningAhead(Toy):
    """Rank 0 comes to the ends of its epochs before the run does."""

    slow = 1


def decided_with_max_steps() -> Result:
    module, saving = RunningAhead(), ModelCheckpoint("saved", monitor="val_loss", save_top_k=-1)
    callbacks = [EarlyStopping("val_loss", patience=9), saving]
    trainer = make_trainer(halos(regions=1), devices=2, max_steps=24, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(module, loader(64), loader(HELD_OUT))
    return outcome(trainer, module, saved=len(saving.best_k_models))


def test_with_max_steps_callbacks_find_the_metrics_of_an_epoch_at_its_end(run: Run) -> None:
    results = run(decided_with_max_steps, workers=2)
    assert_trained(results, max_steps=24)
    assert len(results[0]["validated_on"]) >= 3
    assert all(result["saved"] >= 3 for result in results)


class Stagnating(Toy):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated_on[-1] += batch[2].tolist()
        self.log("val_loss", torch.tensor(1.0))


@pytest.mark.parametrize(("flags", "at_least", "validations"), [({}, 60, 3), ({"min_steps": 90}, 90, 5)], ids=str)
def test_early_stopping_on_rank_0_stops_all(
    tmp_path: Path, flags: dict[str, Any], at_least: int, validations: int
) -> None:
    every = {"max_steps": 400, "val_check_interval": 20, "check_val_every_n_epoch": None}
    stopping = EarlyStopping("val_loss", patience=2)
    results = simulate(tmp_path, Stagnating(), loader(), loader(HELD_OUT), callbacks=[stopping], **every, **flags)
    assert len(results[0]["validated_on"]) == validations
    for result in results:
        assert at_least <= result["global_step"] < at_least + 2 * LOCAL_STEPS
        assert result["global_step"] == results[0]["global_step"]
    assert_no_step_lost(results)
    assert_same_model(results)


def stopped_early() -> Result:
    module, stopping = Stagnating(), EarlyStopping("val_loss", patience=2)
    trainer = make_trainer(max_steps=400, val_check_interval=20, check_val_every_n_epoch=None, callbacks=stopping)
    trainer.fit(module, loader(), loader(HELD_OUT))
    return outcome(
        trainer,
        module,
        stopped_epoch=stopping.stopped_epoch,
        waited=stopping.wait_count,
        callbacks=[type(callback).__name__ for callback in trainer.callbacks],
    )


def test_in_real_time_early_stopping_ends_all_and_every_rank_has_its_state(run: Run) -> None:
    results = run(stopped_early)
    first = results[0]
    assert first["global_step"] >= 60
    for result in results:
        assert result["global_step"] == first["global_step"]
        assert (result["waited"], result["stopped_epoch"]) == (first["waited"], first["stopped_epoch"])
        assert "EarlyStopping" in result["callbacks"]
    assert_no_step_lost(results)
    assert_same_model(results)


class Stopping(Toy):
    """Worker 2 stops the run in its 5th batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 2 and self.optimizer_steps == 4:
            self.trainer.should_stop = True
        return super().training_step(batch, batch_idx)


def test_any_worker_can_stop_the_run(tmp_path: Path) -> None:
    results = simulate(tmp_path, Stopping(), loader(), max_steps=400)
    assert results[2]["optimizer_steps"] == 5
    assert all(result["optimizer_steps"] <= 5 + 2 * LOCAL_STEPS for result in results)
    assert len({result["global_step"] for result in results}) == 1
    assert_no_step_lost(results)
    assert_same_model(results)


def stopping() -> Result:
    module, trainer = Stopping(), make_trainer(max_steps=400)
    trainer.fit(module, loader())
    return outcome(trainer, module)


def test_in_real_time_any_worker_can_stop_the_run(run: Run) -> None:
    results = run(stopping)
    assert results[2]["optimizer_steps"] == 5
    assert len({result["global_step"] for result in results}) == 1
    assert_no_step_lost(results)
    assert_same_model(results)


class WithTest(Remembering):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)


def best_saved(folder: Path) -> Result:
    module = WithTest()
    saving = ModelCheckpoint(folder / "checkpoints", "{step}", monitor="val_loss", save_top_k=2)
    trainer = make_trainer(
        max_steps=60,
        val_check_interval=20,
        check_val_every_n_epoch=None,
        callbacks=saving,
        enable_checkpointing=True,
    )
    trainer.fit(module, loader(), loader(HELD_OUT))
    result = outcome(trainer, module, seen=module.seen, steps=module.steps)
    (tested,) = trainer.test(module, loader(32), ckpt_path="best", verbose=False)
    return {
        **result,
        "best": saving.best_model_path,
        "score": float(saving.best_model_score or 0),
        "kept": sorted(saving.best_k_models),
        "tested": tested["test_loss"],
    }


def test_the_best_checkpoint_is_the_global_model_that_was_validated(run: Run, tmp_path: Path) -> None:
    results = run(best_saved, tmp_path)
    assert_trained(results, max_steps=60)
    first = results[0]
    validated = dict(zip(first["steps"], first["seen"], strict=True))
    assert {60} < validated.keys() <= {20, 40, 60}  # two that fall due at once, on a busy machine, are one
    losses = {step: loss for step, (_, loss) in validated.items()}
    ranked = sorted(losses, key=lambda step: losses[step])
    assert Path(first["best"]).name == f"step={ranked[0]}.ckpt"
    for step in ranked[:2]:
        path = tmp_path / "checkpoints" / f"step={step}.ckpt"
        saved = torch.load(path, weights_only=False)
        weights, loss = validated[step]
        assert saved["global_step"] == step
        assert all(torch.equal(saved["state_dict"][name], weights[name]) for name in weights)
        assert loss == pytest.approx(loss_of(saved["state_dict"]), rel=1e-5)
    kept = {f"step={step}" for step in ranked[:2]}
    there = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert {name for name in there if name.endswith(".ckpt")} == {f"{name}.ckpt" for name in kept}
    # Shards are left out while an earlier checkpoint waits for those of a worker that is late.
    assert {name for name in there if not name.endswith(".ckpt")} <= kept
    expected = loss_of(torch.load(first["best"], weights_only=False)["state_dict"], 32)
    for result in results:
        assert (result["best"], result["score"], result["kept"]) == (first["best"], first["score"], first["kept"])
        assert result["tested"] == pytest.approx(expected, rel=1e-5)


class Watching(pl.Callback):
    """Looks at the worker's model after each batch, and at the module when something is saved."""

    def __init__(self) -> None:
        self.saved: dict[str, Any] = {}
        self.own: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.own = state(pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.saved[str(checkpoint["global_step"])] = {"own": self.own, "seen": state(pl_module)}


def saved_by_steps(folder: Path) -> Result:
    module, watching = Toy(), Watching()
    saving = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=20, save_top_k=-1)
    trainer = make_trainer(max_steps=60, callbacks=[saving, watching], enable_checkpointing=True)
    trainer.fit(module, loader())
    return outcome(trainer, module, saved=watching.saved)


def test_checkpoints_every_n_train_steps_of_all_workers(run: Run, tmp_path: Path) -> None:
    results = run(saved_by_steps, tmp_path)
    assert_trained(results, max_steps=60)
    first, *others = results
    files = {path.name for path in (tmp_path / "checkpoints").glob("*.ckpt")}
    saved_at = [step for step in (20, 40, 60) if f"step={step}.ckpt" in files]
    assert files == {f"step={step}.ckpt" for step in saved_at}
    assert 60 in saved_at
    assert len(saved_at) >= 2  # two that fall due at once, on a busy machine, are one
    for step in saved_at:
        saved = torch.load(tmp_path / "checkpoints" / f"step={step}.ckpt", weights_only=False)
        assert saved["global_step"] == step
        then, weight = first["saved"][str(step)], saved["state_dict"]["net.0.weight"]
        assert torch.equal(weight, then["seen"]["net.0.weight"]), "hooks see the global model"
        assert not torch.equal(weight, then["own"]["net.0.weight"])
    last = torch.load(tmp_path / "checkpoints" / "step=60.ckpt", weights_only=False)["state_dict"]
    assert all(torch.equal(last[name], first["state"][name]) for name in last)
    assert all(other["saved"] == {} for other in others)
