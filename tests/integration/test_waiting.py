"""Nobody waits for a straggler, no finished step is lost, and the end comes where it was ordered."""

from __future__ import annotations

from typing import Any

import pytest
from torchmetrics import MeanSquaredError

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
)

pytestmark = pytest.mark.alone


class Straggling(Toy):
    """One worker is 4 times slower. All log as users do who know DDP."""

    pause = 0.12
    slow = 3

    def __init__(self) -> None:
        super().__init__()
        self.measure = MeanSquaredError()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.measure(self.net(batch[0]), batch[1])
        self.log("mse", self.measure, on_step=True, on_epoch=True)
        self.log("loss", loss, sync_dist=True, on_step=True, on_epoch=True)
        return loss


def straggling(dynamic: bool) -> Result:
    module = Straggling()
    trainer = make_trainer(halos(dynamic_local_steps=dynamic), max_steps=40)
    trainer.fit(module, loader())
    return outcome(trainer, module)


@pytest.mark.parametrize("dynamic", [True, False])
def test_fast_workers_do_not_wait_for_a_slow_one(run: Run, dynamic: bool) -> None:
    results = run(straggling, dynamic)
    assert_trained(results, max_steps=40)
    steps = [result["optimizer_steps"] for result in results]
    assert min(steps[:3]) >= 2.5 * steps[3]


class Even(Toy):
    pause = 0.06


def even(regions: Any, servers: int) -> Result:
    module = Even()
    trainer = make_trainer(halos(regions=regions, servers_per_region=servers), max_steps=20)
    trainer.fit(module, loader())
    return outcome(trainer, module)


@pytest.mark.parametrize(("regions", "servers"), [(2, 1), (1, 1), (4, 1), (1, 2), ([[0, 3, 2], [1]], 1)], ids=str)
def test_at_most_one_round_per_worker_too_many(run: Run, regions: Any, servers: int) -> None:
    results = run(even, regions, servers)
    assert 20 * 4 <= sum(result["optimizer_steps"] for result in results) <= (20 + LOCAL_STEPS) * 4
    assert all(result["global_step"] == 20 for result in results)
    assert_no_step_lost(results)
    assert_same_model(results)
