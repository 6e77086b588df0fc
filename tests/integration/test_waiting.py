"""Fast workers do not wait for a slow one, in real time; the same on the virtual clock, where it can be counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torchmetrics import MeanSquaredError

from tests.integration.conftest import Run
from tests.integration.harness import Result
from tests.integration.toys import (
    HoldingBack,
    Toy,
    assert_no_step_lost,
    assert_same_model,
    assert_trained,
    halos,
    loader,
    make_trainer,
    outcome,
)
from tests.integration.virtual import simulate


class Logging(Toy):
    """All workers log as users do under DDP."""

    def __init__(self) -> None:
        super().__init__()
        self.measure = MeanSquaredError()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.measure(self.net(batch[0]), batch[1])
        self.log("mse", self.measure, on_step=True, on_epoch=True)
        self.log("loss", loss, sync_dist=True, on_step=True, on_epoch=True)
        return loss


class HeldBack(HoldingBack, Logging):
    """In real time."""


def held_back() -> Result:
    module, trainer = HeldBack(), make_trainer(max_steps=40)
    trainer.fit(module, loader())
    return outcome(trainer, module)


def test_fast_workers_do_not_wait_for_a_slow_one(run: Run) -> None:
    assert_trained(run(held_back), max_steps=40)


@pytest.mark.parametrize("dynamic", [True, False])
def test_fast_workers_take_more_steps_by_their_speed(tmp_path: Path, dynamic: bool) -> None:
    strategy = {"dynamic_local_steps": dynamic}
    results = simulate(tmp_path, Logging(), loader(), slow=3, strategy=strategy, max_steps=80)
    steps = [result["optimizer_steps"] for result in results]
    assert sum(steps) == 80 * 4, "a simulation hands out the ordered steps exactly"
    # Four times as many while all have work, but every worker finishes the round that it is in.
    assert min(steps[:3]) >= 3 * steps[3]
    assert_no_step_lost(results)
    assert_same_model(results)


def even(regions: Any, servers: int) -> Result:
    module = Toy()
    trainer = make_trainer(halos(regions=regions, servers_per_region=servers), max_steps=20)
    trainer.fit(module, loader())
    return outcome(trainer, module)


@pytest.mark.parametrize(("regions", "servers"), [(1, 1), (4, 1), (1, 2), ([[0, 3, 2], [1]], 1)], ids=str)
def test_any_topology(run: Run, regions: Any, servers: int) -> None:
    assert_trained(run(even, regions, servers), max_steps=20)
