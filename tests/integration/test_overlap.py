"""Workers that train on while their pushes are answered lose no step, and take no more than were ordered."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_halos import HalosStrategy
from lightning_halos.checkpoint.manifest import NAME, Manifest
from lightning_halos.core.local_server import LocalServer
from tests.integration.conftest import Run
from tests.integration.harness import Result
from tests.integration.toys import LOCAL_STEPS, Toy, assert_same_model, assert_trained, loader, make_trainer, outcome

WORKERS, RATE = 4, 2.0**-10  # whose sums are exact
STEPS, SAVED, SECONDS = 30, 10, 0.06


class Steady(Toy):
    """The gradient is always 1, so each local step moves the weights equally far, wherever they are."""

    pause = 0.01

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4, bias=False))
        nn.init.zeros_(self.net.weight)
        self.unanswered = 0

    def loss(self, batch: Any) -> Tensor:
        assert isinstance(self.trainer.strategy, HalosStrategy)
        round_ = self.trainer.strategy.round
        self.unanswered += round_ is not None and not round_.is_answered
        return self.net.weight.sum()

    def configure_optimizers(self) -> Any:
        return self.counted(torch.optim.SGD(self.parameters(), lr=RATE))


def slow_server(serve: Any) -> Any:
    """A server that needs several batches' time for a push."""

    def wrapped(*args: Any) -> None:
        time.sleep(SECONDS)
        serve(*args)

    return wrapped


def overlapping(folder: Path) -> list[Result]:
    """Trains with checkpoints, and goes on from one of them."""
    LocalServer.apply = slow_server(LocalServer.apply)  # type: ignore[method-assign]
    results = []
    for ckpt_path in (None, folder / f"step={SAVED}.ckpt"):
        module, strategy = Steady(), HalosStrategy(regions=1, local_steps=LOCAL_STEPS, overlap=True, timeout=60)
        saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=SAVED, save_top_k=-1)
        flags = {} if ckpt_path else {"callbacks": saving, "enable_checkpointing": True}
        trainer = make_trainer(strategy, max_steps=STEPS, **flags)
        trainer.fit(module, loader(), ckpt_path=ckpt_path)
        results.append(outcome(trainer, module, unanswered=module.unanswered))
    return results


def test_no_step_is_lost_while_a_push_is_answered(run: Run, tmp_path: Path) -> None:
    fits = run(overlapping, tmp_path)
    first, resumed = ([results[fit] for results in fits] for fit in (0, 1))
    assert_trained(first, max_steps=STEPS)
    taken = sum(result["optimizer_steps"] for result in first)
    # A server adds a worker's progress with the rate 1 / workers.
    assert torch.equal(first[0]["state"]["net.weight"], torch.full((4, 4), -RATE * taken / WORKERS))
    assert sum(result["unanswered"] for result in first) > taken / 20  # most, if batches are faster than the server
    assert taken <= (STEPS + 2 * LOCAL_STEPS) * WORKERS  # an unanswered push and the round after it

    again = sum(result["optimizer_steps"] for result in resumed)
    (manifest,) = (tmp_path / f"step={SAVED}").glob(f"*/{NAME}")
    before = Manifest.read(manifest.read_text(), manifest).total
    assert before > 0
    # What was pushed before the snapshot is not repeated, and what was not is.
    assert torch.equal(resumed[0]["state"]["net.weight"], torch.full((4, 4), -RATE * (before + again) / WORKERS))
    assert STEPS * WORKERS <= before + again <= (STEPS + 2 * LOCAL_STEPS) * WORKERS
    assert {result["global_step"] for result in resumed} == {STEPS}


def overlapping_together() -> list[Result]:
    """Two workers of two processes, of which each has a lane, and then only the first."""
    LocalServer.apply = slow_server(LocalServer.apply)  # type: ignore[method-assign]
    results = []
    for lanes in (2, 1):
        strategy = HalosStrategy(regions=1, local_steps=LOCAL_STEPS, overlap=True, timeout=60, worker=2)
        strategy._lanes = lanes
        module, trainer = Steady(), make_trainer(strategy, max_steps=STEPS)
        trainer.fit(module, loader())
        results.append(outcome(trainer, module, unanswered=module.unanswered))
    return results


def test_the_processes_of_a_worker_load_an_answer_at_the_same_batch(run: Run) -> None:
    fits = run(overlapping_together)
    for fit in (0, 1):
        results = [result[fit] for result in fits]
        assert_same_model(results)
        for one, other in (results[:2], results[2:]):
            assert (one["optimizer_steps"], one["unanswered"]) == (other["optimizer_steps"], other["unanswered"])
        taken = sum(result["optimizer_steps"] for result in results) // 2
        assert torch.equal(results[0]["state"]["net.weight"], torch.full((4, 4), -RATE * taken / 2))
        assert STEPS * 2 <= taken <= (STEPS + 2 * LOCAL_STEPS) * 2
        assert sum(result["unanswered"] for result in results) // 2 > taken / 20
