"""The Trainer's other flags and callbacks mean what they mean under DDP."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, Callback, GradientAccumulationScheduler

from tests.integration.conftest import Run
from tests.integration.harness import Result
from tests.integration.toys import (
    LOCAL_STEPS,
    PAUSE,
    Toy,
    Watching,
    assert_no_step_lost,
    assert_same_model,
    assert_trained,
    fit,
    halos,
    loader,
    make_trainer,
    outcome,
)


def flagged(flags: dict[str, Any]) -> Result:
    return fit(Toy(), **flags)


# An epoch has 16 batches. The last number is the global steps that DDP takes.
@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ({"fast_dev_run": 3}, 3),
        ({"max_epochs": 2, "limit_train_batches": 5}, 10),
        pytest.param({"max_epochs": 3, "overfit_batches": 2}, 6, marks=pytest.mark.slow),
        ({"max_epochs": 2, "max_steps": 20}, 20),
        ({"max_epochs": 1, "max_steps": 20}, 16),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, 11),  # 64 batches in steps of 3; DDP fills up each worker's
        ({"max_steps": 20, "max_epochs": 10**9, "use_distributed_sampler": False}, 20),
        ({"max_steps": 20, "reload_dataloaders_every_n_epochs": 1}, 20),
        pytest.param({"max_steps": 20, "profiler": "simple", "detect_anomaly": True}, 20, marks=pytest.mark.slow),
        pytest.param(
            {"max_steps": 20, "enable_progress_bar": True, "enable_model_summary": True}, 20, marks=pytest.mark.slow
        ),
        ({"max_steps": 20, "enable_checkpointing": True, "logger": True}, 20),
        pytest.param({"max_steps": 20, "log_every_n_steps": 0}, 20, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_steps(run: Run, flags: dict[str, Any], steps: int) -> None:
    assert_trained(run(flagged, flags), max_steps=steps)


def with_a_slow_worker(flags: dict[str, Any]) -> Result:
    module, watching = Toy(), Watching()
    module.slow = 0
    strategy = halos(local_steps=8, dynamic_local_steps=False)
    return {
        **fit(module, strategy=strategy, callbacks=watching, enable_checkpointing=True, **flags),
        "seen": watching.seen,
    }


@pytest.mark.parametrize("flags", [{"max_epochs": 3}, {"max_steps": 48}], ids=str)
def test_the_global_step_never_runs_past_the_end(run: Run, flags: dict[str, Any]) -> None:
    """A slow worker's global step grows by several per batch, and more slowly when the others run out of data."""
    result = run(with_a_slow_worker, flags)[0]
    assert result["seen"] == sorted(result["seen"])
    assert result["seen"][-1] == result["global_step"] == 48


def accumulating_later() -> Result:
    return fit(Toy(), max_epochs=3, callbacks=GradientAccumulationScheduler({0: 1, 1: 2, 2: 4}))


def test_accumulation_that_changes(run: Run) -> None:
    assert_trained(run(accumulating_later), max_steps=16 + 8 + 4)


def timed() -> Result:
    return fit(Toy(), max_time={"seconds": 1})


@pytest.mark.alone
def test_max_time_ends_all(run: Run) -> None:
    results = run(timed)
    assert len({result["global_step"] for result in results}) == 1
    assert max(result["optimizer_steps"] for result in results) < 1 / PAUSE + 2 * LOCAL_STEPS
    assert_no_step_lost(results)
    assert_same_model(results)


class Unfreezing(BaseFinetuning):
    """Unfreezes the first layer in the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            pl_module.frozen = pl_module.net[0].weight.detach().clone()
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=1e-2)


def unfreezing() -> Result:
    module = Toy()
    result = fit(module, max_epochs=3, callbacks=Unfreezing())
    return {**result, "frozen": module.frozen}


def test_parameters_that_are_unfrozen_while_training(run: Run) -> None:
    results = run(unfreezing)
    assert_trained(results, max_steps=48)
    start, end = results[0]["start"]["net.0.weight"], results[0]["state"]["net.0.weight"]
    assert any(torch.equal(result["frozen"], start) for result in results), "as the first one saw it that unfroze it"
    assert not torch.equal(start, end)


class Hooks(Callback):
    """Records the order of the hooks that other callbacks rely on."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        self.called.append(f"train start {trainer.global_step}")

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        self.called.append(f"epoch end {trainer.current_epoch}")

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        self.called.append(f"train end {trainer.global_step}")

    def on_fit_end(self, trainer: Any, *_: Any) -> None:
        self.called.append(f"fit end {trainer.global_step}")


def hooked() -> Result:
    module, hooks = Toy(), Hooks()
    trainer = make_trainer(max_epochs=2, callbacks=hooks)
    before = [type(callback).__name__ for callback in trainer.callbacks]
    trainer.fit(module, loader())
    after = [type(callback).__name__ for callback in trainer.callbacks]
    return outcome(trainer, module, called=hooks.called, before=before, after=after)


def test_hooks_see_the_final_step_and_callbacks_are_given_back(run: Run) -> None:
    results = run(hooked)
    assert_trained(results, max_steps=32)
    for result in results:
        assert result["called"] == ["train start 0", "epoch end 0", "epoch end 1", "train end 32", "fit end 32"]
        assert result["before"] == result["after"]


class Prolonging(Toy):
    """Raises a limit of the Trainer while it trains."""

    def __init__(self, limit: str) -> None:
        super().__init__()
        self.limit = limit

    def on_train_epoch_end(self) -> None:
        loop = self.trainer.fit_loop
        if self.limit == "max_epochs":
            loop.max_epochs = 4
        else:
            loop.epoch_loop.max_steps = 32


def prolonged() -> Result:
    found: Result = {}
    for limit, flags in (("max_epochs", {"max_epochs": 2}), ("max_steps", {"max_steps": 16})):
        module, trainer = Prolonging(limit), make_trainer(halos(regions=1), devices=2, **flags)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(module, loader(64))
        said = [str(warning.message) for warning in caught]
        found[limit] = outcome(trainer, module, said=said, limit=getattr(trainer, limit))
    return found


class Shortening(Toy):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.trainer.fit_loop.epoch_loop.max_steps = 12


def shortened() -> Result:
    module, trainer = Shortening(), make_trainer(halos(regions=1), devices=2, max_epochs=4)
    trainer.fit(module, loader(64))
    return outcome(trainer, module, limit=trainer.max_steps)


def test_a_run_ends_early_if_a_hook_lowers_max_steps(run: Run) -> None:
    results = run(shortened, workers=2)
    assert_same_model(results)
    for result in results:
        assert result["limit"] == 12
        assert 12 <= result["global_step"] < 12 + 2 * LOCAL_STEPS  # of 32


def test_a_run_ends_as_it_was_ordered_if_a_hook_raises_a_limit(run: Run) -> None:
    """The budget of the run is divided when it starts. Workers that went on would train alone."""
    results = run(prolonged, workers=2)
    for limit, ordered, raised in (("max_epochs", 2, 4), ("max_steps", 16, 32)):
        of_limit = [result[limit] for result in results]
        assert_same_model(of_limit)
        assert_no_step_lost(of_limit)
        for result in of_limit:
            assert result["global_step"] == 16
            assert result["limit"] == raised, "a later fit goes on to the new limit"
            assert not [text for text in result["said"] if "differed between the workers" in text]
        (said,) = [text for text in of_limit[0]["said"] if f"{limit} was raised" in text]
        assert f"from {ordered} to {raised} during the fit" in said
