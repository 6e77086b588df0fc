"""A worker of several processes computes what one process with all of its samples would, whatever is inside."""

from __future__ import annotations

import re
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_sharded_data_parallel

from lightning_halos.core.sharding import complete
from lightning_halos.training.compat import average_of
from lightning_halos.training.optimizer_shards import join_pieces
from tests.fsdp2 import divides_on_cpus, fully_shard
from tests.integration.conftest import Run
from tests.integration.harness import Result
from tests.integration.test_several_processes import Unfreezing
from tests.integration.toys import FEATURES, LOCAL_STEPS, WORKERS, Toy, halos, loader, make_trainer

ROUNDS = 20
BATCH = 8  # samples of a worker


class Plain(Toy):
    """A model whose layers have fewer rows than there are processes, or a number that they do not divide."""

    pause = 0.0
    lr = 1e-2

    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__(nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 1)))
        self.moments: list[Tensor] = []
        self.random: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        torch.rand(1)
        return super().training_step(batch, batch_idx)

    def on_save_checkpoint(self, checkpoint: Any) -> None:
        self.random.append(torch.get_rng_state())

    def on_train_start(self) -> None:
        """Notes what the optimizers begin with."""
        (optimizer,) = self.trainer.optimizers
        values = [own["exp_avg"] for own in optimizer.state_dict()["state"].values()]
        self.moments = [complete(value).clone() for value in values]


class Divided(Plain):
    """The same with FSDP2."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        if not hasattr(self.net[0].weight, "placements"):
            fully_shard(self.net[0], mesh=mesh)
            fully_shard(self.net, mesh=mesh)


def strategy(kind: str, worker: int, **kwargs: Any) -> Any:
    inner = {"FSDP2": ModelParallelStrategy, "FSDP": FSDPStrategy}.get(kind, DDPStrategy)
    return halos(worker=worker, inner=inner(), **{"regions": 1, **kwargs})


def module_for(kind: str) -> Plain:
    return Divided() if kind == "FSDP2" else Plain()


def complete_state(trainer: pl.Trainer, module: Plain) -> dict[str, Tensor]:
    model = trainer.strategy.model
    with FullyShardedDataParallel.summon_full_params(model) if model is not module else nullcontext():
        return {name: complete(tensor).detach().clone() for name, tensor in module.state_dict().items()}


def trained(kind: str, processes: int, worker: int, **flags: Any) -> dict[str, Tensor]:
    module = module_for(kind)
    made = strategy(kind, worker) if worker > 1 else halos(regions=1)
    trainer = make_trainer(made, devices=processes, **{"max_steps": ROUNDS * LOCAL_STEPS, **flags})
    trainer.fit(module, loader(batch_size=BATCH // worker), loader(32))
    return complete_state(trainer, module)


def allow_fsdp_on_cpus() -> None:
    """Lets ``FullyShardedDataParallel`` train without a GPU, for which Lightning gives it no device.

    It cannot collect its state there: the tensors share memory that it frees.
    """
    make = fully_sharded_data_parallel._init_device_handle

    def on_cpus(state: Any, module: nn.Module, ignored: Any, device_id: Any) -> Any:
        return make(state, module, ignored, torch.device("cpu") if device_id is None else device_id)

    fully_sharded_data_parallel._init_device_handle = on_cpus


CLIPPED = {"gradient_clip_val": 0.5}
ACCUMULATED = {"accumulate_grad_batches": 2, "max_steps": 10 * LOCAL_STEPS}


def unfrozen() -> dict[str, Any]:
    """Flags of a fit in which the first layer is trained from the second epoch on."""
    return {"callbacks": [Unfreezing()], "max_steps": 10 * LOCAL_STEPS}


def in_two_processes() -> Result:
    allow_fsdp_on_cpus()
    return {
        "plain": {"FSDP": trained("FSDP", 2, 2)},
        "clipped": {kind: trained(kind, 2, 2, **CLIPPED) for kind in ("DDP", "FSDP2")},
        "accumulated": {kind: trained(kind, 2, 2, **ACCUMULATED) for kind in ("DDP", "FSDP2")},
        "unfrozen": {kind: trained(kind, 2, 2, **unfrozen()) for kind in ("DDP", "FSDP2")},
    }


def in_one_process() -> Result:
    flags: dict[str, dict[str, Any]] = {"plain": {}, "clipped": CLIPPED, "accumulated": ACCUMULATED}
    flags["unfrozen"] = unfrozen()
    return {gradients: trained("one", 1, 1, **own) for gradients, own in flags.items()}


@divides_on_cpus
def test_a_worker_of_two_processes_computes_what_one_process_does(run: Run) -> None:
    (single,) = run(in_one_process, workers=1)
    for result in run(in_two_processes, workers=2):
        for gradients, kinds in result.items():
            for kind, found in kinds.items():
                for name, expected in single[gradients].items():
                    assert torch.allclose(found[name], expected, rtol=0, atol=1e-6), (kind, name)


def goes_on(kind: str, worker: int, max_steps: int, path: Path | None, folder: str, every: int = 20) -> Result:
    module = module_for(kind)
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    trainer = make_trainer(strategy(kind, worker), max_steps=max_steps, enable_checkpointing=True, callbacks=[saving])
    trainer.fit(module, loader(batch_size=BATCH // worker), loader(32), ckpt_path=None if path is None else str(path))
    state = complete_state(trainer, module)
    return {"state": state, "moments": module.moments, "random": module.random, "global_step": trainer.global_step}


def saves_and_resumes() -> Result:
    result: Result = {"FSDP2": goes_on("FSDP2", 2, 20, None, "first")}
    path = Path("first") / "step=20.ckpt"
    result["FSDP2, other lanes"] = goes_on("FSDP2", 4, 40, path, "second")
    result["DDP"] = goes_on("DDP", 2, 40, path, "third")
    result["FSDP2 from DDP"] = goes_on("FSDP2", 2, 60, Path("third") / "step=40.ckpt", "fourth", every=7)
    trainer = make_trainer(strategy("FSDP2", 2), max_steps=LOCAL_STEPS)
    trainer.fit(module_for("FSDP2"), loader())
    (found,) = trainer.validate(module_for("FSDP2"), loader(32), ckpt_path=str(path), verbose=False)
    return {**result, "val_loss": found["val_loss"]}


def shards_of(folder: Path) -> Path:
    (manifest,) = folder.glob("*/*/manifest.json")
    return manifest.parent


def moments_in(states: list[Any]) -> list[Tensor]:
    joined = join_pieces([state["optimizer_states"][0] for state in states])
    return [own["exp_avg"] for own in joined["state"].values()]


@divides_on_cpus
def test_a_divided_model_is_saved_and_resumed_with_other_lanes_and_strategies(run: Run, tmp_path: Path) -> None:
    results = run(saves_and_resumes)
    for kind in ("FSDP2", "FSDP2, other lanes", "DDP", "FSDP2 from DDP"):
        for result in results:
            for name, tensor in result[kind]["state"].items():
                assert torch.isfinite(tensor).all()
                assert torch.equal(tensor, results[0][kind]["state"][name]), (kind, name)

    contents = torch.load(tmp_path / "first" / "step=20.ckpt", weights_only=True)
    plain = Plain()
    plain.load_state_dict(contents["state_dict"])  # an ordinary file with the global model
    losses = [plain.loss(batch).item() for batch in loader(32)]
    for result in results:
        assert result["val_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)

    saved = [manifest.parent for manifest in (tmp_path / "fourth").glob("*/*/manifest.json")]
    assert saved
    for shards in saved:  # in all processes of the worker that saves, the state is that of the same batch
        numbers = []
        for result, lane in zip(results[:2], ("", ".lane-1"), strict=True):
            state = torch.load(shards / f"worker-0{lane}.pt", weights_only=True)["random"]["torch"]
            seen = result["FSDP2 from DDP"]["random"]
            numbers.append([number for number, random in enumerate(seen) if torch.equal(state, random)])
        assert len(numbers[0]) == 1
        assert numbers[0] == numbers[1]

    first, third = shards_of(tmp_path / "first"), shards_of(tmp_path / "third")
    names = {path.name for path in first.iterdir()}
    assert {"worker-0.pt", "worker-0.lane-1.pt", "worker-1.pt", "worker-1.lane-1.pt"} < names
    of_rank_0 = moments_in([contents])
    of_worker_1 = moments_in([torch.load(first / f"worker-1{lane}.pt", weights_only=True) for lane in ("", ".lane-1")])
    from_ddp = moments_in([torch.load(third / "worker-1.pt", weights_only=True)])
    expected = {
        "FSDP2, other lanes": [of_rank_0] * 4,
        "DDP": [of_rank_0, of_rank_0, of_worker_1, of_worker_1],
        "FSDP2 from DDP": [None, None, from_ddp, from_ddp],
    }
    for kind, by_rank in expected.items():
        for result, moments in zip(results, by_rank, strict=True):
            for found, wanted in zip(result[kind]["moments"], moments or result[kind]["moments"], strict=True):
                assert torch.equal(found, wanted), kind


def averaged() -> Result:
    average = callbacks.EMAWeightAveraging(decay=0.8, update_starting_at_step=3)
    module, trainer = Plain(), make_trainer(strategy("DDP", 2), max_steps=24, callbacks=[average])
    trainer.fit(module, loader(batch_size=BATCH // 2), loader(32))
    return {"average": average_of(average).state_dict(), "state": complete_state(trainer, module)}


@pytest.mark.skipif(not hasattr(callbacks, "EMAWeightAveraging"), reason="since Lightning 2.6")
def test_weights_are_averaged_from_the_global_model_of_all_lanes(run: Run) -> None:
    first, *others = run(averaged)
    assert first["average"]["n_averaged"] == 24 - 3
    for name, tensor in first["state"].items():
        average = first["average"][f"module.{name}"]
        assert torch.equal(average, tensor), "the average is the final model"
        assert torch.isfinite(average).all()
        assert all(torch.equal(result["state"][name], tensor) for result in others)


class Everywhere(Plain):
    """Divided among the processes of all workers."""

    def configure_model(self) -> None:
        fully_shard(self.net, mesh=init_device_mesh("cpu", (WORKERS,)))


def refused() -> Result:
    trainer = make_trainer(strategy("FSDP2", 2), max_steps=4)
    with pytest.raises(ValueError, match="divided") as error:
        trainer.fit(Everywhere(), loader())
    Path(f"refused{trainer.global_rank}").touch()
    while len(list(Path().glob("refused*"))) < WORKERS:  # others may still need this process's connections
        time.sleep(0.05)
    return {"error": str(error.value)}


def test_a_module_that_is_divided_among_all_workers_is_refused(run: Run) -> None:
    for result in run(refused):
        assert re.search(r"net.0.weight is divided among workers that.* mesh=self.device_mesh", result["error"])
