"""Everything that a script does with Trainers besides one fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import LambdaLR

from lightning_halos.checkpoint.manifest import NAME, Manifest
from tests.integration.conftest import Run
from tests.integration.harness import Result
from tests.integration.toys import (
    LOCAL_STEPS,
    SAMPLES,
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


class Predicting(Toy):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch[2], self.net(batch[0])


def predicted() -> Result:
    module, trainer = Predicting(), make_trainer(max_steps=20)
    trainer.fit(module, loader())
    predictions: Any = trainer.predict(module, loader(60))
    indices, outputs = zip(*predictions, strict=True)
    return outcome(trainer, module, indices=torch.cat(indices).tolist(), outputs=torch.cat(outputs))


def test_predict_after_fit(run: Run) -> None:
    results = run(predicted)
    module = Predicting()
    module.load_state_dict(results[0]["state"])
    expected = module.net(samples(60).tensors[0])
    for rank, result in enumerate(results):
        assert result["indices"] == list(range(rank, 60, 4))
        assert torch.allclose(result["outputs"], expected[result["indices"]], rtol=1e-5)


def untrained() -> Result:
    module, trainer = Toy(), make_trainer()
    start = state(module)
    (found,) = trainer.validate(module, loader(60), verbose=False)
    return {"state": state(module), "start": start, "val_loss": found["val_loss"]}


def test_validate_without_fit_takes_the_model_of_rank_0(run: Run) -> None:
    results = run(untrained)
    assert_same_model(results)
    module = Toy()
    module.load_state_dict(results[0]["start"])
    inputs, targets, _ = samples(60).tensors
    whole = float(mse_loss(module.net(inputs), targets).detach())
    assert [result["val_loss"] for result in results] == [pytest.approx(whole, rel=1e-5)] * 4


class Decaying(Toy):
    def configure_optimizers(self) -> Any:
        optimizer = self.counted(torch.optim.AdamW(self.parameters(), lr=1e-2))
        scheduler = LambdaLR(optimizer, lambda step: 1 - step / 100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fitted_twice() -> Result:
    module, trainer = Decaying(), make_trainer(max_steps=20)
    trainer.fit(module, loader())
    first = outcome(trainer, module)
    trainer.fit_loop.epoch_loop.max_steps = 50
    trainer.fit(module, loader())
    return outcome(trainer, module, first=first)


def test_the_same_trainer_fits_on(run: Run) -> None:
    results = run(fitted_twice)
    assert_trained([result["first"] for result in results], max_steps=20)
    assert all(result["global_step"] == 50 for result in results)
    second = sum(result["optimizer_steps"] - result["first"]["optimizer_steps"] for result in results)
    assert 30 * 4 <= second <= (30 + 2 * LOCAL_STEPS) * 4
    assert_no_step_lost(results)
    assert_same_model(results)


def epochs_twice() -> Result:
    module, trainer = Toy(), make_trainer(max_epochs=1)
    trainer.fit(module, loader())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader())
    return outcome(trainer, module)


def test_the_same_trainer_fits_more_epochs(run: Run) -> None:
    results = run(epochs_twice)
    for result in results:
        assert (result["epoch"], result["global_step"]) == (3, 48)
    assert sum(result["optimizer_steps"] for result in results) == 48 * 4
    assert_no_step_lost(results)
    assert_same_model(results)


def in_two_fits(module: Toy, first: int, second: int, epochs: int) -> Result:
    """Fits an epoch, and then up to a number of epochs, of which the result has the later ones' data."""
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader(first))
    module.trained_on = []
    trainer.fit_loop.max_epochs = epochs
    trainer.fit(module, loader(second))
    return outcome(trainer, module)


def test_the_same_trainer_fits_other_data(run: Run) -> None:
    results = run(in_two_fits, Toy(), SAMPLES, 64, 3)
    used = sorted(index for result in results for index in result["trained_on"])
    assert used == sorted([*range(64)] * 2)


def two_trainers() -> Result:
    first, second = Toy(), Toy()
    trainers = [make_trainer(max_steps=20), make_trainer(halos(regions=1), max_steps=10)]
    trainers[0].fit(first, loader())
    trainers[1].fit(second, loader())
    return {"first": outcome(trainers[0], first), "second": outcome(trainers[1], second)}


def test_two_trainers_in_one_script(run: Run) -> None:
    results = run(two_trainers)
    assert_trained([result["first"] for result in results], max_steps=20)
    assert_trained([result["second"] for result in results], max_steps=10)


class Asking(Toy):
    """Combines its rank with those of the others, in every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        rank = torch.tensor([float(self.global_rank)])
        torch.distributed.all_reduce(rank)
        self.sums.append(float(rank))
        return super().training_step(batch, batch_idx)


def one_trainer_after_another() -> Result:
    module, trainer = Asking(), make_trainer(max_epochs=1)
    trainer.fit(module, loader())
    make_trainer().validate(Toy(), loader(16), verbose=False)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    return outcome(trainer, module, sums=module.sums)


@pytest.mark.filterwarnings("ignore:all_reduce")
def test_a_trainer_that_fits_again_after_another_one_has_run_trains_at_its_own_pace(run: Run) -> None:
    results = run(one_trainer_after_another)
    assert_same_model(results)
    for rank, result in enumerate(results):
        assert set(result["sums"]) == {4.0 * rank}


class TwoSteps(Toy):
    """Steps its optimizer twice in every batch, as a GAN steps one for each of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss, optimizer = super().training_step(batch, batch_idx), self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        optimizer.step()


def test_a_later_fit_with_several_steps_per_batch_trains_on_its_complete_epoch(run: Run) -> None:
    results = run(in_two_fits, TwoSteps(), 64, 64, 2)
    assert sorted(index for result in results for index in result["trained_on"]) == [*range(64)]


def resumed(folder: Path) -> Result:
    before, trainer = Decaying(), make_trainer(max_steps=20)
    trainer.fit(before, loader())
    path = folder / "last.ckpt"
    trainer.save_checkpoint(path)
    first = outcome(trainer, before)
    module, trainer = Decaying(), make_trainer(max_steps=50)
    trainer.fit(module, loader(), ckpt_path=path)
    (adam,) = trainer.optimizers
    return outcome(trainer, module, first=first, adam=[int(adam.state[p]["step"]) for p in module.parameters()])


def test_resuming_keeps_the_step_budget(run: Run, tmp_path: Path) -> None:
    results = run(resumed, tmp_path)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    firsts = [result["first"] for result in results]
    assert_trained(firsts, max_steps=20)
    assert saved["global_step"] == 20
    assert all(torch.equal(saved["state_dict"][name], firsts[0]["state"][name]) for name in saved["state_dict"])
    assert sum(result["optimizer_steps"] for result in results) <= (30 + 2 * LOCAL_STEPS) * 4
    for result in results:
        assert result["global_step"] == 50
        assert result["schedules"] == [50]
        assert result["lrs"] == [pytest.approx(1e-2 * 0.5)]
        assert set(result["adam"]) == {result["first"]["optimizer_steps"] + result["optimizer_steps"]}
    assert_no_step_lost(results)
    assert_same_model(results)


def resumed_epochs(folder: Path) -> Result:
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=24, save_top_k=-1)
    trainer = make_trainer(max_epochs=3, callbacks=saving, enable_checkpointing=True)
    trainer.fit(Toy(), loader())
    module, trainer = Toy(), make_trainer(max_epochs=3)
    trainer.fit(module, loader(), ckpt_path=folder / "step=24.ckpt")
    return outcome(trainer, module)


def test_resuming_inside_an_epoch_uses_the_rest_of_it(run: Run, tmp_path: Path) -> None:
    results = run(resumed_epochs, tmp_path)
    (manifest,) = (tmp_path / "step=24").glob(f"*/{NAME}")
    done = sum(stop - start for start, stop in Manifest.read(manifest.read_text(), manifest).done)
    for result in results:
        assert (result["epoch"], result["global_step"]) == (3, 48)
    # The servers' state is copied after rank 0 has seen step 24: on a busy machine other workers push meanwhile.
    assert done + LOCAL_STEPS * 4 >= 24 * 4
    assert sum(result["optimizer_steps"] for result in results) == 3 * 64 - done > 0
    assert_same_model(results)


def alone() -> Result:
    module = Decaying()
    trainer = make_trainer(halos(regions=1), devices=1, max_steps=20, val_check_interval=10)
    trainer.fit(module, loader(), loader(16))
    return outcome(trainer, module)


def test_one_device(run: Run) -> None:
    results = run(alone, workers=1)
    assert_trained(results, max_steps=20)
    assert len(set(results[0]["trained_on"])) == len(results[0]["trained_on"]) == 80
    assert results[0]["validated_on"] == [[*range(16)]] * 2


def importing_the_other_package_later() -> Result:
    import sys

    assert "lightning_halos" in sys.modules
    assert "pytorch_lightning" not in sys.modules
    import pytorch_lightning

    with pytest.raises(TypeError, match=r"The strategies of lightning_halos are for the Trainer of lightning\.pytorch"):
        pytorch_lightning.Trainer(strategy="halos", accelerator="cpu")
    return {}


def test_the_order_of_imports_does_not_matter_to_the_refusal_of_pytorch_lightning(run: Run) -> None:
    """The other order is in ``tests/training/test_strategy_arguments.py``."""
    run(importing_the_other_package_later, workers=1)
