"""The state dict of a checkpoint that is made while training: the global model, on the host, with no detour."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_halos.core.vector import ModelVector
from tests.integration.conftest import Run
from tests.integration.harness import Result
from tests.integration.toys import Toy, halos, loader, make_trainer, state


class Looking(pl.Callback):
    """Takes the state dict at the end of a batch, and counts how often the module is read meanwhile."""

    def __init__(self) -> None:
        self.reads = 0
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        read, before = ModelVector.read, self.reads

        def counted(vector: ModelVector, out: torch.Tensor) -> torch.Tensor:
            self.reads += 1
            return read(vector, out)

        ModelVector.read = counted  # type: ignore[method-assign]
        try:
            self.seen.append(state_of(trainer.strategy))
        finally:
            ModelVector.read = read  # type: ignore[method-assign]
        assert self.reads == before


def state_of(strategy: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in strategy.lightning_module_state_dict().items()}


def looking() -> Result:
    module, look = Toy(), Looking()
    trainer = make_trainer(halos(regions=1), devices=1, max_steps=8, callbacks=[look])
    trainer.fit(module, loader())
    return {"seen": look.seen, "state": state(module)}


def test_the_module_is_not_copied_for_it(run: Run) -> None:
    (result,) = run(looking, workers=1)
    assert len(result["seen"]) == 8
    for seen in result["seen"]:
        assert seen.keys() == result["state"].keys()
        assert all(torch.isfinite(tensor).all() for tensor in seen.values())


class Renamed(Toy):
    """Its checkpoints have other keys."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {f"exported/{name}": tensor for name, tensor in super().state_dict(*args, **kwargs).items()}


class Halved(Toy):
    """Its checkpoints have half precision, so they share no memory with the module."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: tensor.half() for name, tensor in super().state_dict(*args, **kwargs).items()}


class Comparing(pl.Callback):
    """Takes the state dicts of the strategy, the global model and the worker's model, at the end of each batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, torch.Tensor], ...]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        strategy: Any = trainer.strategy
        with strategy.global_model():
            model = state(pl_module)
        self.seen.append((state_of(strategy), model, state(pl_module)))


def comparing(module_type: type[Toy]) -> Result:
    compare = Comparing()
    trainer = make_trainer(halos(regions=1), devices=1, max_steps=8, callbacks=[compare])
    trainer.fit(module_type(), loader())
    return {"seen": compare.seen}


@pytest.mark.parametrize("module_type", [Renamed, Halved])
def test_a_module_with_a_state_dict_of_its_own_saves_the_global_model(run: Run, module_type: type[Toy]) -> None:
    (result,) = run(comparing, module_type, workers=1)
    assert len(result["seen"]) == 8
    for saved, model, _ in result["seen"]:
        assert saved.keys() == model.keys()
        assert all(torch.equal(tensor, model[name]) for name, tensor in saved.items())
    assert any(not torch.equal(own[name], model[name]) for _, model, own in result["seen"] for name in model)


class Exporting(Toy):
    """Adds its net to checkpoints."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["exported"] = {"net": self.net.state_dict(), "bias": self.net[1].bias}


class Adding(pl.Callback):
    """Adds the first weight to checkpoints."""

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["added"] = pl_module.net[0].weight


def exporting(module_type: type[Toy], callbacks: list[pl.Callback]) -> Result:
    module = module_type()
    saving = ModelCheckpoint(dirpath="saved", filename="{step}", every_n_train_steps=6, save_top_k=-1)
    flags: dict[str, Any] = {"callbacks": [*callbacks, saving], "enable_checkpointing": True, "max_steps": 7}
    trainer = make_trainer(halos(regions=1, local_steps=4), devices=1, **flags)
    start = state(module)
    trainer.fit(module, loader())
    return {"saved": torch.load("saved/step=6.ckpt", weights_only=False), "start": start}


def test_hooks_that_add_to_a_checkpoint_see_the_global_model(run: Run) -> None:
    """In the middle of a round, where the worker's model is another."""
    (result,) = run(exporting, Exporting, [Adding()], workers=1)
    saved = result["saved"]
    for name, tensor in saved["exported"]["net"].items():
        assert torch.equal(tensor, saved["state_dict"][f"net.{name}"])
    assert torch.equal(saved["exported"]["bias"], saved["state_dict"]["net.1.bias"])
    assert torch.equal(saved["added"], saved["state_dict"]["net.0.weight"])
    assert not torch.equal(saved["added"], result["start"]["net.0.weight"])
