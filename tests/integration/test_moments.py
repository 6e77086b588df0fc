"""Regression tests for unusual modules and unusual moments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from tests.integration.conftest import Run
from tests.integration.harness import Result, free_port
from tests.integration.toys import (
    FEATURES,
    Toy,
    assert_same_model,
    assert_trained,
    halos,
    loader,
    make_trainer,
    outcome,
)


class OddBuffers(Toy):
    """Buffers that are not in the state, are complex, or are replaced by new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.ones(3), persistent=False)
        self.register_buffer("rotation", torch.full((2,), 1j))
        self.register_buffer("average", torch.zeros(1))

    def loss(self, batch: Any) -> torch.Tensor:
        loss = super().loss(batch)
        self.average = 0.9 * self.average + 0.1 * loss.detach()
        return loss


def saved_inside_a_round() -> Result:
    module = OddBuffers()
    checkpoint = ModelCheckpoint("checkpoints", filename="{step}", every_n_train_steps=10, save_top_k=-1)
    trainer = make_trainer(max_steps=20, callbacks=[checkpoint], enable_checkpointing=True)
    trainer.fit(module, loader())
    saved = torch.load("checkpoints/step=10.ckpt", weights_only=True)["state_dict"] if trainer.is_global_zero else {}
    return {**outcome(trainer, module), "saved": saved}


def test_odd_buffers_travel_and_checkpoints_have_the_modules_keys_only(run: Run) -> None:
    results = run(saved_inside_a_round)
    assert_trained(results, max_steps=20)
    assert results[0]["saved"].keys() == OddBuffers().state_dict().keys()
    assert results[0]["state"]["average"] > 0
    assert all(torch.equal(result["state"]["average"], results[0]["state"]["average"]) for result in results)


class Scheduled(Toy):
    def configure_optimizers(self) -> Any:
        optimizer = self.counted(torch.optim.SGD(self.parameters(), lr=0.01))
        steps = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": OneCycleLR(optimizer, 0.01, total_steps=steps), "interval": "step"}]


def resumed_from_inside_a_round(folder: str) -> Result:
    checkpoint = ModelCheckpoint("checkpoints", filename="{step}", every_n_train_steps=5, save_top_k=-1)
    make_trainer(
        halos(local_steps=7, dynamic_local_steps=False), max_steps=30, callbacks=[checkpoint], enable_checkpointing=True
    ).fit(Scheduled(), loader())
    module = Scheduled()
    trainer = make_trainer(halos(local_steps=7, dynamic_local_steps=False), max_steps=30)
    trainer.fit(module, loader(), ckpt_path=f"{folder}/checkpoints/step=5.ckpt")  # of 7 steps of the first round
    return outcome(trainer, module)


def test_a_schedule_resumes_from_a_checkpoint_inside_a_round(run: Run, tmp_path: Path) -> None:
    results = run(resumed_from_inside_a_round, str(tmp_path))
    assert_same_model(results)
    for result in results:
        assert result["global_step"] == 30
        assert result["schedules"] == [30]


class FailsToValidate(Toy):
    fails = True

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.fails and self.trainer.training is False and self.global_step:
            raise KeyError("validation")
        super().validation_step(batch, batch_idx)


def test_one_worker_fits_again_after_a_failed_validation(run: Run) -> None:
    (result,) = run(one_worker, workers=1)
    assert result == {"global_step": 8, "is_over": True}


def one_worker() -> Result:
    module = FailsToValidate(nn.Linear(FEATURES, 1))
    trainer = make_trainer(halos(regions=1), devices=1, max_steps=8, val_check_interval=4)
    with pytest.raises(KeyError):
        trainer.fit(module, loader(), loader(8))
    module.fails = False
    again = make_trainer(halos(regions=1), devices=1, max_steps=8)
    again.fit(module, loader(), loader(8))
    return {"global_step": again.global_step, "is_over": trainer.strategy.round is None}


def any_fit() -> Result:
    module, trainer = Toy(), make_trainer(halos(regions=None), max_steps=4)
    try:
        trainer.fit(module, loader())
    except ValueError as error:
        return {"error": str(error)}
    return {"error": ""}


def test_a_region_that_some_processes_do_not_name_is_an_error_on_all(run: Run) -> None:
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environments = [{**shared, "LOCAL_RANK": str(rank)} for rank in range(4)]
    environments[1]["HALOS_REGION"] = "here"
    for result in run(any_fit, environments=environments):
        assert "HALOS_REGION is set in some processes but not in rank(s) [0, 2, 3]" in result["error"]
