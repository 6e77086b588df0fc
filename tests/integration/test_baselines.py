"""The baselines in real processes: the same Trainer flags and promises, with other algorithms."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from lightning_halos import AsyncLocalSGDStrategy, DilocoStrategy
from lightning_halos.training.stopwatch import Stopwatch
from tests.integration.conftest import Run
from tests.integration.harness import Result
from tests.integration.toys import (
    LOCAL_STEPS,
    SAMPLES,
    WORKERS,
    HoldingBack,
    Toy,
    assert_no_step_lost,
    assert_same_model,
    loader,
    make_trainer,
    meet,
    outcome,
    state,
)

STRATEGIES: dict[str, Any] = {
    "async_local_sgd": partial(AsyncLocalSGDStrategy, regions=2, local_steps=LOCAL_STEPS, timeout=60),
    "diloco": partial(DilocoStrategy, local_steps=LOCAL_STEPS, timeout=60),
    "diloco_dynamic": partial(DilocoStrategy, local_steps=LOCAL_STEPS, dynamic_local_steps=True, timeout=60),
}
every_strategy = pytest.mark.parametrize(
    "name", ["async_local_sgd", pytest.param("diloco", marks=pytest.mark.slow), "diloco_dynamic"]
)


class Scheduled(Toy):
    pause = 0.06
    slow = 3
    statistics: Sequence[dict[str, Any]] = ()  # of the servers, on rank 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.optimizer_steps == 0:
            meet("first batch", self.global_rank, WORKERS)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = self.counted(torch.optim.AdamW(self.parameters()))
        scheduler = OneCycleLR(optimizer, 1e-2, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_end(self, *_: Any) -> None:
        servers = getattr(self.trainer.strategy, "servers", None)
        self.statistics = self.statistics if servers is None else servers.statistics()


def trained(name: str, flags: dict[str, Any]) -> Result:
    module, trainer = Scheduled(), make_trainer(STRATEGIES[name](), **flags)
    trainer.fit(module, loader(), loader(16))
    return {**outcome(trainer, module), "statistics": module.statistics}


@every_strategy
def test_steps_schedule_and_validation(run: Run, name: str) -> None:
    results = run(trained, name, {"max_steps": 40, "val_check_interval": 20, "check_val_every_n_epoch": None})
    total = sum(result["optimizer_steps"] for result in results)
    assert 40 * 4 <= total <= (40 + LOCAL_STEPS) * 4
    assert all(result["global_step"] == 40 for result in results)
    if name == "async_local_sgd":  # its only server is in rank 0's process; half of the workers are in region 1
        (server,) = results[0]["statistics"]
        assert server["bytes_within_regions"] > 0
        assert server["bytes_between_regions"] > 0
    assert all(result["schedules"] == [40] for result in results)
    first, *others = [result["validated_on"] for result in results]
    assert first in ([[*range(16)]] * 2, [[*range(16)]])  # two that fall due at once, on a busy machine, are one
    assert others == [[], [], []]
    assert all(result["metrics"]["val_loss"] == results[0]["metrics"]["val_loss"] for result in results)
    assert_no_step_lost(results)
    assert_same_model(results)


def held_back() -> Result:
    module, trainer = HoldingBack(), make_trainer(STRATEGIES["async_local_sgd"](), max_steps=40)
    trainer.fit(module, loader())
    return outcome(trainer, module)


def test_nobody_waits_for_a_slow_worker_without_synchronous_rounds(run: Run) -> None:
    results = run(held_back)
    assert all(result["global_step"] == 40 for result in results)
    assert_no_step_lost(results)


class Clock:
    """The time by which workers measure their speeds: it passes in batches only."""

    time = 0.0


class Timed(Toy):
    pause = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        Clock.time += 4.0 if self.global_rank == 3 else 1.0
        return super().training_step(batch, batch_idx)


def timed(name: str) -> Result:
    Stopwatch.now = lambda self: Clock.time  # type: ignore[method-assign]
    module, trainer = Timed(), make_trainer(STRATEGIES[name](), max_steps=40)
    trainer.fit(module, loader())
    return outcome(trainer, module)


def test_a_slow_worker_has_shorter_rounds_if_they_are_dynamic(run: Run) -> None:
    steps = [result["optimizer_steps"] for result in run(timed, "diloco_dynamic")]
    assert len(set(steps[:3])) == 1
    assert steps[0] >= 3 * steps[3]


def test_all_rounds_are_equal_if_they_are_not(run: Run) -> None:
    assert len({result["optimizer_steps"] for result in run(timed, "diloco")}) == 1


@every_strategy
def test_max_epochs_uses_every_sample_once_per_epoch(run: Run, name: str) -> None:
    results = run(trained, name, {"max_epochs": 2})
    used = sorted(index for result in results for index in result["trained_on"])
    assert used == sorted([*range(SAMPLES)] * 2)
    assert all(result["epoch"] == 2 for result in results)
    # On a busy machine the others may take all data of an epoch; then rank 0 has no new model to validate after it.
    assert len(results[0]["validated_on"]) in ((1, 2) if name == "async_local_sgd" else (2,))
    assert_no_step_lost(results)
    assert_same_model(results)


def test_a_round_of_diloco_with_a_rate_of_1_averages_the_workers(run: Run) -> None:
    results = run(averaged)
    for name, final in results[0]["state"].items():
        mean = torch.stack([result["own"][name] for result in results]).mean(0)
        torch.testing.assert_close(final, mean)
    assert_same_model(results)


def averaged() -> Result:
    module = Remembering()
    strategy = DilocoStrategy(local_steps=LOCAL_STEPS, outer_optimizer=partial(torch.optim.SGD, lr=1.0))
    trainer = make_trainer(strategy, max_steps=LOCAL_STEPS)
    trainer.fit(module, loader())
    return outcome(trainer, module, own=module.own)


class Remembering(Toy):
    """Keeps its own weights as the optimizer left them."""

    own: dict[str, torch.Tensor]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.own = state(self)


class Failing(Scheduled):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 2 and batch_idx == 6:
            raise RuntimeError("the cat sat on the keyboard")
        return super().training_step(batch, batch_idx)


def failing(name: str) -> Result:
    module, trainer = Failing(), make_trainer(STRATEGIES[name](), max_steps=400)
    trainer.fit(module, loader())
    return {}


@every_strategy
def test_a_worker_that_raises_ends_the_run(run: Run, name: str) -> None:
    with pytest.raises(AssertionError, match="the cat sat on the keyboard"):
        run(failing, name)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="local_steps=0 must be a whole number of at least 1"):
        DilocoStrategy(local_steps=0)
    with pytest.raises(TypeError, match="dynamic_local_steps='yes' must be True or False"):
        DilocoStrategy(dynamic_local_steps="yes")  # type: ignore[arg-type]


class Stopped(Toy):
    def on_train_epoch_start(self) -> None:
        self.trainer.should_stop = True


def stopped(name: str) -> Result:
    module, trainer = Stopped(), make_trainer(STRATEGIES[name](), max_steps=40)
    trainer.fit(module, loader())
    return outcome(trainer, module)


@every_strategy
def test_a_fit_without_a_step_keeps_the_model(run: Run, name: str) -> None:
    results = run(stopped, name)
    assert sum(result["optimizer_steps"] for result in results) == 0
    torch.manual_seed(0)
    first = Toy()
    assert all(torch.equal(first.state_dict()[key], value) for key, value in results[0]["state"].items())
    assert_same_model(results)
