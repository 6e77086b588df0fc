"""A run that was stopped goes on with all its state."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_halos.checkpoint.manifest import NAME, Manifest
from tests.integration.conftest import Run
from tests.integration.harness import Result
from tests.integration.toys import Toy, assert_same_model, halos, loader, make_trainer, outcome

WHOLE = {"global.pt", NAME, *(f"worker-{rank}.pt" for rank in range(4)), *(f"server-{index}.pt" for index in range(2))}


def manifest_of(path: Path) -> Manifest:
    """The manifest of a checkpoint, which has one save in its folder."""
    (folder,) = path.with_suffix("").iterdir()
    assert {file.name for file in folder.iterdir()} == WHOLE
    return Manifest.read((folder / NAME).read_text(), folder / NAME)


class Noting(Toy):
    """Takes note of the epoch of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[int] = []
        self.first_state: dict[str, Any] = {}
        self.first_lr = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if not self.first_state:
            (adam,) = self.trainer.optimizers
            self.first_state = {"steps": [int(state["step"]) for state in adam.state.values()]}
        self.epochs += [self.current_epoch] * len(batch[2])
        return super().training_step(batch, batch_idx)


def saving(folder: Path, every: int, **kwargs: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1, **kwargs)


def interrupted_and_resumed(folder: Path, step: int, flags: dict[str, Any]) -> Result:
    trainer = make_trainer(callbacks=saving(folder, step), enable_checkpointing=True, **flags)
    first = Noting()
    trainer.fit(first, loader(shuffle=True))
    module, trainer = Noting(), make_trainer(**flags)
    trainer.fit(module, loader(shuffle=True), ckpt_path=folder / f"step={step}.ckpt")
    return outcome(trainer, module, epochs=module.epochs, first=module.first_state, steps=first.optimizer_steps)


def test_a_run_resumes_where_it_was_saved(run: Run, tmp_path: Path) -> None:
    results = run(interrupted_and_resumed, tmp_path, 24, {"max_epochs": 3})
    manifest = manifest_of(tmp_path / "step=24.ckpt")
    done = sum(stop - start for start, stop in manifest.done)
    assert 0 < done == manifest.total
    assert abs(done - 24 * 4) <= 2 * 4 * 4
    used = Counter(index for result in results for index in result["trained_on"])
    assert sum(used.values()) == 4 * (3 * 64 - done)  # what was in flight is run again, and nothing else
    assert max(used.values()) <= 3
    for result in results:
        assert (result["global_step"], result["epoch"]) == (48, 3)
        assert all(steps > 0 for steps in result["first"]["steps"])
    assert_same_model(results)


def saved_with(folder: Path, flags: dict[str, Any]) -> Result:
    module, trainer = Noting(), make_trainer(callbacks=saving(folder, 24), enable_checkpointing=True, **flags)
    trainer.fit(module, loader(shuffle=True))
    return outcome(trainer, module)


def resumed_with(folder: Path, regions: Any, flags: dict[str, Any]) -> Result:
    module = Noting()
    workers = sum(map(len, regions))
    trainer = make_trainer(halos(regions=regions), devices=workers, **flags)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader(shuffle=True), ckpt_path=folder / "step=24.ckpt")
    said = [str(warning.message) for warning in caught if "are kept" in str(warning.message)]
    return outcome(trainer, module, first=module.first_state, said=said)


@pytest.mark.parametrize("regions", [[[0, 1, 2, 3]], [[0], [1, 2]], [[0, 1], [2], [3, 4]]], ids=str)
def test_a_run_resumes_with_other_workers_and_regions(run: Run, tmp_path: Path, regions: list[list[int]]) -> None:
    run(saved_with, tmp_path, {"max_epochs": 2})
    done = sum(stop - start for start, stop in manifest_of(tmp_path / "step=24.ckpt").done)
    workers = sum(map(len, regions))
    results = run(resumed_with, tmp_path, regions, {"max_epochs": 2}, workers=workers)
    used = Counter(index for result in results for index in result["trained_on"])
    assert sum(used.values()) == 4 * (2 * 64 - done)
    assert max(used.values()) <= 2
    for rank, result in enumerate(results):
        assert bool(result["first"]["steps"]) == (rank < 4)  # new workers begin afresh
        assert len(result["said"]) == (rank == 0)
    assert "not kept: the local servers' momentum" in results[0]["said"][0]
    assert_same_model(results)
