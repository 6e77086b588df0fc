"""What counts as a step, and which schedules follow the run, where a module steps optimizers and schedulers itself."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim.lr_scheduler import LinearLR, OneCycleLR, SequentialLR

from lightning_halos import DelayedNesterov, DilocoStrategy
from tests.integration.conftest import Run
from tests.integration.harness import Result
from tests.integration.test_modules import Gan
from tests.integration.test_schedules import learning_rate
from tests.integration.toys import (
    FEATURES,
    Toy,
    Watching,
    assert_same_model,
    assert_trained,
    fit,
    halos,
    loader,
    make_trainer,
    outcome,
    samples,
)
from tests.integration.virtual import simulate

STEPS = 24


class Raw(Toy):
    """Steps an optimizer that Lightning does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.optimizer = self.counted(torch.optim.AdamW(self.parameters(), lr=1e-2))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        self.optimizer.zero_grad()
        self.manual_backward(loss)
        self.step(batch)

    def step(self, batch: Any) -> None:
        self.optimizer.step()

    def configure_optimizers(self) -> Any:
        return None


class Unwrapped(Raw):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        self.optimizer = optimizer
        super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return self.counted(torch.optim.AdamW(self.parameters(), lr=1e-2))


class SharpnessAware(torch.optim.Optimizer):
    """SAM, as its well-known implementation has it: the second step calls another optimizer."""

    def __init__(self, params: Any, base: torch.optim.Optimizer) -> None:
        super().__init__(params, {"rho": 0.05})
        self.base = base

    @torch.no_grad()
    def first_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["climb"] = p.grad * 0.05 / (p.grad.norm() + 1e-12)
            p.add_(self.state[p]["climb"])

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(self.state[p]["climb"])
        self.base.step()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class Sam(Raw):
    def __init__(self) -> None:
        super().__init__()
        self.sam = SharpnessAware(self.parameters(), self.optimizer)

    def step(self, batch: Any) -> None:
        self.sam.first_step()
        self.closure(batch)
        self.sam.second_step()

    def closure(self, batch: Any) -> None:
        self.sam.zero_grad()
        self.manual_backward(self.loss(batch))


class SamWithClosure(Sam):
    def step(self, batch: Any) -> None:
        self.sam.step(lambda: self.closure(batch))


class ByHand(Raw):
    """Changes its parameters without an optimizer."""

    def step(self, batch: Any) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                assert parameter.grad is not None
                parameter.sub_(1e-2 * parameter.grad)
        self._count()


KINDS: list[type[Raw]] = [Raw, Unwrapped, Sam, SamWithClosure, ByHand]


def stepped_by_the_module() -> Result:
    return {kind.__name__: fit(kind(), max_steps=STEPS) for kind in KINDS}


def test_steps_that_lightning_does_not_see_count(run: Run) -> None:
    results = run(stepped_by_the_module)
    for kind in KINDS:
        of_kind = [result[kind.__name__] for result in results]
        assert_trained(of_kind, max_steps=STEPS)
        assert not torch.equal(of_kind[0]["start"]["net.0.weight"], of_kind[0]["state"]["net.0.weight"]), kind


class Idle(Raw):
    def step(self, batch: Any) -> None:
        """Forgets to step the optimizer."""


def idle(folder: Path) -> Result:
    with pytest.raises(RuntimeError, match="no optimizer made a step") as error:
        fit(Idle(), max_epochs=1)
    short, start = ByHand(), ByHand().state_dict()
    short.load_state_dict(start)
    make_trainer(max_epochs=1).fit(short, loader(48))
    assert not torch.equal(short.state_dict()["net.0.weight"], start["net.0.weight"])
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=30, save_top_k=-1)
    trainer = make_trainer(max_epochs=2, callbacks=[saving], enable_checkpointing=True)
    module = Gan()
    trainer.fit(module, loader())
    return {"error": str(error.value), **outcome(trainer, module)}


def test_a_fit_without_steps_is_an_error_and_several_steps_per_batch_count_as_under_ddp(
    run: Run, tmp_path: Path
) -> None:
    results = run(idle, tmp_path)
    for result in results:
        assert "64 batches" in result["error"]
        assert result["global_step"] == 2 * 16 * 3
    assert_same_model(results)
    names = {path.name for path in tmp_path.glob("*.ckpt")}
    assert len(names) >= 2  # two that fall due at once, on a busy machine, are one
    assert names <= {f"step={step}.ckpt" for step in (30, 60, 90, 96)}
    assert not names >= {"step=90.ckpt", "step=96.ckpt"}, "the final step has what fell due while rank 0 waited"


class NotANumber(Toy):
    """Has a loss of NaN, from some batch of the fit on."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def loss(self, batch: Any) -> Any:
        return super().loss(batch) * (torch.nan if self.optimizer_steps >= self.first else 1.0)


def not_a_number(name: str) -> Result:
    strategies = {
        "halos": halos,
        "one region": partial(halos, regions=1),
        "diloco": partial(DilocoStrategy, local_steps=4),
    }
    flags = {"devices": 2, "max_epochs": 1}
    with pytest.raises(RuntimeError, match="servers rejected all") as error:
        fit(NotANumber(first=0), strategy=strategies[name](timeout=60), **flags)
    later = fit(NotANumber(first=2 * 4), strategy=strategies[name](timeout=60), **flags)
    return {"error": str(error.value), "later": later}


@pytest.mark.parametrize("name", ["halos", "one region", "diloco"])
def test_a_fit_in_which_the_servers_rejected_everything_is_an_error(run: Run, name: str) -> None:
    """Under DDP the model would be NaN. Here it would be the initial one, and look as if it had been trained."""
    results = run(not_a_number, name, workers=2)
    for result in results:
        assert "the final model is the initial one" in result["error"]
    assert_same_model([result["later"] for result in results])


class OneCycle(Toy):
    """Steps its schedule in every batch, as a run of one process does."""

    def __init__(self, is_returned: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.is_returned = is_returned
        self.other_things = [np.zeros(3), torch.zeros(3)]  # which cannot be compared with a scheduler

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        optimizer, scheduler, warm_up = self.parts
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        scheduler.step()
        warm_up.step()
        if self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self.by_epoch.step()

    def configure_optimizers(self) -> Any:
        optimizer = self.counted(torch.optim.SGD(self.parameters(), lr=1e-2))
        other = torch.optim.SGD(self.parameters(), lr=1e-2)
        first, second = LinearLR(other, 0.1, 1.0, 4), LinearLR(other, 1.0, 0.5, 8)
        self.inner = [first, second]
        self.parts = (optimizer, OneCycleLR(optimizer, 1e-2, total_steps=32), SequentialLR(other, [first, second], [4]))
        self.by_epoch = LinearLR(torch.optim.SGD(self.parameters(), lr=1e-2))
        if self.is_returned:
            return [optimizer], [{"scheduler": self.parts[1]}]
        return None

    def more(self) -> Result:
        return {"steps": [s.last_epoch for s in (*self.parts[1:], self.by_epoch)], "lr": self.parts[1].get_last_lr()}


@pytest.mark.parametrize("is_returned", [True, False])
def test_a_schedule_that_the_module_steps_follows_the_run(tmp_path: Path, is_returned: bool) -> None:
    results = simulate(tmp_path, OneCycle(is_returned), loader(), slow=3, max_epochs=2)
    own_steps = [result["optimizer_steps"] for result in results]
    assert own_steps[3] < 32 * 2 / 3 < 32 < max(own_steps)
    for result in results:
        assert result["global_step"] == 32
        assert result["steps"] == [32, 32, 2]
        assert result["lr"] == [pytest.approx(learning_rate("one cycle", 32))]
    assert_same_model(results)


class Freezing(Toy):
    """Freezes its first layer in the middle of training, without a callback that Lightning knows."""

    at: list[float] | None = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step >= 16 and self.at is None:
            self.net[0].requires_grad_(False)
            self.at = self.net[0].weight.flatten().tolist()

    def more(self) -> Result:
        return {"frozen_at": torch.tensor(self.at)}


def test_a_layer_that_is_frozen_while_training_stays_where_it_is(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "These parameters differed")
        results = simulate(tmp_path, Freezing(), loader(), slow=3, max_steps=60)
    assert_trained(results, max_steps=60)
    weight = results[0]["state"]["net.0.weight"].flatten()
    assert torch.equal(weight, results[0]["frozen_at"])


class Warned(Toy):
    """Records the warnings about a model that grows without bound."""

    def on_fit_start(self) -> None:
        self.caught: Any = warnings.catch_warnings(record=True).__enter__()
        warnings.simplefilter("always")

    def more(self) -> Result:
        inputs, targets, _ = samples().tensors
        growth = [caught for caught in self.caught if "grows without bound" in str(caught.message)]
        return {"loss": float(self.loss((inputs, targets))), "warnings": len(growth)}


class Newton(Warned):
    """Comes close to the minimum in every round."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(FEATURES, 1))

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class TooFast(Warned):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.2)


def test_lbfgs_trains_with_the_defaults(tmp_path: Path) -> None:
    results = simulate(tmp_path, Newton(), loader(batch_size=64), max_steps=48)
    assert [result["warnings"] for result in results] == [0] * 4
    assert results[0]["loss"] < 5e-3, "with momentum it is 0.026"


def test_a_model_that_grows_without_bound_is_noticed_once(tmp_path: Path) -> None:
    momentum = {"local_optimizer": partial(DelayedNesterov, lr=2.0, momentum=0.9, delay=8)}
    results = simulate(tmp_path, TooFast(), loader(batch_size=64), max_steps=160, strategy=momentum)
    assert [result["warnings"] for result in results] == [1, 0, 0, 0]


class Accumulating(Toy):
    """Accumulates gradients by hand."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.batches = batches

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx) / self.batches)
        if (batch_idx + 1) % self.batches == 0:
            optimizer.step()
            optimizer.zero_grad()


def test_batches_without_a_step_are_none_also_when_the_round_has_one_already(tmp_path: Path) -> None:
    """In a round of 4 steps, 15 batches at a time have none, and 10 of them are left when the run ends."""
    results = simulate(tmp_path, Accumulating(16), loader(2 * 2 * 90 * 4), regions=(1, 1), max_epochs=1)
    assert [result["local_steps"] for result in results] == [result["optimizer_steps"] for result in results]
    assert results[0]["global_step"] == results[0]["optimizer_steps"]


class Later(Raw):
    """Uses its optimizer in the first batches only."""

    def step(self, batch: Any) -> None:
        if self.optimizer_steps < 10:
            self.optimizer.step()
        else:
            ByHand.step(self, batch)  # type: ignore[arg-type]


def test_steps_by_hand_count_in_a_round_that_has_steps_of_an_optimizer_too(tmp_path: Path) -> None:
    """The rounds have 4 steps, and the optimizer makes 10 of them; the batches before they are noticed count, too."""
    results = simulate(tmp_path, Later(), loader(2 * 80 * 4), regions=(1, 1), max_epochs=1)
    assert [result["optimizer_steps"] for result in results] == [80, 80]
    for result in results:
        assert 80 - 8 <= result["local_steps"] <= 80


def accumulating_and_resumed(folder: Path) -> Result:
    """Resumes at the last quarter of a run of 256 batches per worker, four of which make a step."""
    for dirpath, path in (("first", None), ("second", folder / "first" / "step=48.ckpt")):
        watching = Watching()
        saving = ModelCheckpoint(folder / dirpath, "{step}", every_n_train_steps=48, save_top_k=-1)
        callbacks = [saving, watching]
        trainer = make_trainer(
            halos(regions=1), devices=2, max_epochs=2, callbacks=callbacks, enable_checkpointing=True
        )
        module = Accumulating(4)
        module.pause = 0.01
        trainer.fit(module, loader(1024), ckpt_path=path)
    return {**outcome(trainer, module), "seen": watching.seen}


def test_the_global_step_moves_in_a_resumed_run_with_several_batches_per_step(run: Run, tmp_path: Path) -> None:
    seen = run(accumulating_and_resumed, tmp_path, workers=2)[0]["seen"]
    assert seen == sorted(seen)
    assert len(set(seen[:-1])) > 2, "it stands still until the end"
