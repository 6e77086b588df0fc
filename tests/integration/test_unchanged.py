"""What modules and scripts do under DDP works here, without a line changed."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from tests.integration.conftest import Run
from tests.integration.harness import Result
from tests.integration.toys import Toy, assert_same_model, halos, loader, make_trainer, outcome


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


def growing() -> Result:
    module = Growing()
    trainer = make_trainer(
        halos(regions=1),
        devices=2,
        max_epochs=3,
        reload_dataloaders_every_n_epochs=1,
        val_check_interval=timedelta(seconds=0.05),
    )
    trainer.fit(module, val_dataloaders=loader(8))
    return outcome(trainer, module)


def test_a_dataset_that_grows_and_validation_by_time(run: Run) -> None:
    results = run(growing, workers=2)
    assert_same_model(results)
    used = sorted(index for result in results for index in result["trained_on"])
    assert used == sorted([*range(32), *range(64), *range(96)])
    assert all(result["global_step"] == 4 + 8 + 12 for result in results)
    assert len(results[0]["validated_on"]) > 1  # a batch takes 0.02 s
    assert results[1]["validated_on"] == []
