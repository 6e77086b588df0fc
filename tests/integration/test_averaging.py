"""Lightning's callbacks that average weights: the average is of the global model, and all ranks end with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import Tensor, nn

from lightning_halos.training.compat import WEIGHT_AVERAGING, average_of
from lightning_halos.training.trainer_adapter import callbacks_of
from tests.integration.conftest import Run
from tests.integration.harness import Result
from tests.integration.toys import BATCH, FEATURES, Toy, assert_same_model, halos, loader, make_trainer
from tests.integration.virtual import simulate

DECAY, START, STEPS = 0.8, 3, 24


class Averaged(Toy):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
        self.differences: dict[str, list[float]] = {"validated": [], "saved": [], "final": []}
        self.keys: list[str] = []

    def more(self) -> Result:
        averages = [average_of(c).state_dict() for c in callbacks_of(self.trainer) if isinstance(c, WEIGHT_AVERAGING)]
        return {"differences": self.differences, "keys": self.keys, "averages": averages}


class Recomputing(Checkpoint):
    """Averages the global model itself, and compares. It comes after the callback, as all that save do."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}
        self.global_step = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        strategy: Any = trainer.strategy
        with strategy.global_model():
            model = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        for step in range(self.global_step, trainer.global_step):
            if step >= START:
                self.average = {
                    name: DECAY * self.average[name] + (1 - DECAY) * p if self.average else p
                    for name, p in model.items()
                }
        self.global_step = trainer.global_step

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.differences["validated"].append(self.difference(dict(pl_module.named_parameters())))

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        pl_module.differences["saved"].append(self.difference(checkpoint["state_dict"]))
        pl_module.keys += [key for key in checkpoint if key in ("current_model_state", "averaging_state")]

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.differences["final"].append(self.difference(dict(pl_module.named_parameters())))

    def difference(self, model: dict[str, Tensor]) -> float:
        return max(float((model[name] - average).detach().abs().max()) for name, average in self.average.items())


@pytest.mark.skipif(not hasattr(callbacks, "EMAWeightAveraging"), reason="since Lightning 2.6")
@pytest.mark.parametrize(("slow", "worker"), [(0, 1), (3, 1), (0, 2)])
def test_the_average_is_of_the_global_model_and_all_ranks_end_with_it(tmp_path: Path, slow: int, worker: int) -> None:
    """Rank 0 is slow in two of them, so that the global step advances by several in its batches."""
    average = callbacks.EMAWeightAveraging(decay=DECAY, update_starting_at_step=START)
    results = simulate(
        tmp_path,
        Averaged(),
        loader(),
        loader(16),
        slow=slow,
        regions=(2 // worker,) * 2,
        strategy={"worker": worker},
        callbacks=[average, Recomputing(), ModelCheckpoint(tmp_path, every_n_train_steps=8, save_top_k=-1)],
        max_steps=STEPS,
        val_check_interval=8,
        check_val_every_n_epoch=None,
        enable_checkpointing=True,
    )
    assert_same_model(results)
    for result in results[:worker]:
        differences = result["differences"]
        assert len(differences["validated"]) == len(differences["saved"]) == 3
        assert len(differences["final"]) == 1
        assert max(*differences["validated"], *differences["saved"], *differences["final"]) < 1e-6
        assert set(result["keys"]) == {"current_model_state", "averaging_state"}
    assert all(not result["keys"] and not result["differences"]["final"] for result in results[worker:])
    assert not torch.equal(results[0]["state"]["net.0.weight"], torch.zeros(4, FEATURES))
    for result in results:  # trainer.validate() puts the callback's average into the module
        (average,) = result["averages"]
        assert average.pop("n_averaged") == STEPS - START
        assert all(torch.equal(tensor, result["state"][key[len("module.") :]]) for key, tensor in average.items())


class Swapping(Toy):
    """Averages a parameter itself, and validates with the average, as many modules do."""

    def __init__(self, begin: str, end: str) -> None:
        super().__init__()
        self.swaps = {begin: self.swap_in, end: self.swap_out}
        self._average: Tensor | None = None
        self._kept: Tensor | None = None
        self._trained: Tensor | None = None
        self.has_average: list[bool] = []
        self.goes_on: list[bool] = []

    @property
    def value(self) -> Tensor:
        return self.net[0].weight.detach()

    def swap_in(self) -> None:
        if self._average is not None:
            self._kept = self.value.clone()
            self.value.copy_(self._average)

    def swap_out(self) -> None:
        if self._kept is not None:
            self.value.copy_(self._kept)

    def swap(self, hook: str) -> None:
        self.swaps.get(hook, lambda: None)()

    def on_validation_model_eval(self) -> None:
        self.eval()
        self.swap("on_validation_model_eval")

    def on_validation_start(self) -> None:
        super().on_validation_start()
        self.swap("on_validation_start")

    def on_validation_epoch_start(self) -> None:
        self.swap("on_validation_epoch_start")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.has_average.append(self._average is not None and torch.equal(self.value, self._average))

    def on_validation_epoch_end(self) -> None:
        self.swap("on_validation_epoch_end")

    def on_validation_end(self) -> None:
        self.swap("on_validation_end")

    def on_validation_model_train(self) -> None:
        self.train()
        self.swap("on_validation_model_train")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self._trained is not None:
            self.goes_on.append(torch.equal(self.value, self._trained))

    def on_train_batch_end(self, *_: Any) -> None:
        self._trained = self.value.clone()
        self._average = self._trained if self._average is None else self._average.lerp(self._trained, 1 - DECAY)

    def more(self) -> Result:
        return {"has_average": self.has_average, "goes_on": self.goes_on}


@pytest.mark.parametrize("hook", ["model_eval model_train", "start end", "epoch_start epoch_end"])
def test_hooks_validate_with_an_average_and_training_goes_on_from_the_workers_model(tmp_path: Path, hook: str) -> None:
    begin, end = (f"on_validation_{name}" for name in hook.split())
    results = simulate(
        tmp_path,
        Swapping(begin, end),
        loader(),
        loader(16),
        regions=(2,),
        max_steps=STEPS,
        val_check_interval=5,
        check_val_every_n_epoch=None,
    )
    assert len(results[0]["has_average"]) >= 4 * 16 // BATCH
    assert all(results[0]["has_average"])
    for result in results:
        assert len(result["goes_on"]) > STEPS // 2
        assert all(result["goes_on"])
    assert_same_model(results)


def averaged() -> Result:
    saving = ModelCheckpoint(dirpath="saved", filename="{step}", every_n_train_steps=8, save_top_k=-1)
    flags: dict[str, Any] = {"callbacks": [callbacks.EMAWeightAveraging(decay=DECAY), saving], "max_steps": 8}
    trainer = make_trainer(halos(regions=1), devices=1, enable_checkpointing=True, **flags)
    trainer.fit(Averaged(), loader())
    (shard,) = Path("saved").rglob("server-0.pt")
    return {"saved": torch.load("saved/step=8.ckpt", weights_only=True), "server": torch.load(shard, weights_only=True)}


@pytest.mark.skipif(not hasattr(callbacks, "EMAWeightAveraging"), reason="since Lightning 2.6")
def test_a_later_fit_goes_on_from_the_global_model_and_not_from_its_average(run: Run) -> None:
    (result,) = run(averaged, workers=1)
    saved, first = result["saved"], slice(4 * FEATURES)
    server = result["server"]["server"]["model"][first]
    assert torch.equal(server, saved["current_model_state"]["net.0.weight"].flatten())
    assert not torch.equal(server, saved["state_dict"]["net.0.weight"].flatten())
