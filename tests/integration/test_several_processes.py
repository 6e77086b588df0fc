"""Training with workers of several processes: data, validation, stops, signals and simulations."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint, OnExceptionCheckpoint
from lightning_utilities.core.imports import RequirementCache
from torchmetrics import SumMetric

from lightning_halos import DilocoStrategy, HalosStrategy
from lightning_halos.transport import alarm
from tests.integration.conftest import Run
from tests.integration.harness import Result, end_workers, lightning_environments, torchrun_environments
from tests.integration.toys import SAMPLES, Toy, assert_same_model, halos, loader, make_trainer, meet, outcome, state
from tests.integration.virtual import simulate

VALIDATED = 64
NEVER = 100_000  # epochs: more than a run has time for
STOPPED_BY = {"on_train_epoch_start": 1, "on_train_epoch_end": 3, "on_validation_end": 1, "on_train_batch_end": 1}


class Asking(Toy):
    """Combines values and metrics in every training step, and keeps the last results. All workers train."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = SumMetric()
        self.samples_before = 0
        self.found: dict[str, Any] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if not self.found:
            meet("asking", self.global_rank, 4)
        rank = torch.tensor(float(self.global_rank))
        summed = rank.clone()
        dist.all_reduce(summed)
        gathered = self.all_gather(rank)
        self.seen.update(len(batch[0]))
        self.log("rank", rank, sync_dist=True)
        self.log("seen", self.seen, on_epoch=True)
        self.found = {"sum": summed.item(), "gathered": gathered.tolist(), "world": self.trainer.world_size}
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.found["samples"], self.samples_before = len(self.trained_on) - self.samples_before, len(self.trained_on)
        self.found |= {"seen": self.seen.compute().item(), "rank": self.trainer.callback_metrics["rank"].item()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.found["validating"] = [dist.get_rank(), dist.get_world_size(), self.trainer.world_size]

    def more(self) -> Result:
        return self.found


class Unfreezing(BaseFinetuning):
    """Unfreezes the first layer in the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=1e-2)


class Unfrozen(Toy):
    """Keeps the gradients and the parameters of each optimizer step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, torch.Tensor]] = []
        self.epochs: list[int] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        gradients = {f"gradient of {n}": p.grad.clone() for n, p in self.named_parameters() if p.grad is not None}
        self.steps.append({**gradients, **state(self)})
        self.epochs.append(self.current_epoch)

    def configure_callbacks(self) -> Any:
        return [Unfreezing()]

    def configure_optimizers(self) -> Any:
        return self.counted(torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2))

    def more(self) -> Result:
        return {"steps": self.steps, "epochs": self.epochs}


class Stopping(Toy):
    """One process stops the run by itself, at its tenth optimizer step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 3 and self.optimizer_steps == 10:
            self.trainer.should_stop = True
        return super().training_step(batch, batch_idx)


class StoppingElsewhere(Stopping):
    """One process stops the run in another hook than ``training_step``."""

    def __init__(self, rank: int, hook: str) -> None:
        super().__init__()
        self.pause = 0.0
        setattr(self, hook, partial(self.stop, rank, getattr(self, hook)))

    def stop(self, rank: int, hook: Callable[..., Any], *args: Any) -> Any:
        if self.global_rank == rank and self.current_epoch >= 1:  # a late worker may have no batch in an epoch
            self.trainer.should_stop = True
        return hook(*args)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return Toy.training_step(self, batch, batch_idx)


class Terminated(Toy):
    """One process gets SIGTERM at its tenth optimizer step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 3 and self.optimizer_steps == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, batch_idx)


def trains(make: Callable[[], Toy], algorithm: str = "halos", max_epochs: int = 2) -> Result:
    module = make()
    strategy = halos(worker=2) if algorithm == "halos" else DilocoStrategy(worker=2, local_steps=4, timeout=60)
    trainer = make_trainer(strategy, max_epochs=max_epochs)
    trainer.fit(module, loader(), loader(VALIDATED))
    return outcome(trainer, module, **module.more())


def assert_workers_in_step(results: list[Result]) -> None:
    """The processes of a worker made the same number of steps, with different samples.

    On a busy machine, one of the workers may be late, and find no step left.
    """
    assert any(result["optimizer_steps"] for result in results)
    for first, second in (results[:2], results[2:]):
        assert first["optimizer_steps"] == second["optimizer_steps"]
        assert first["local_steps"] == second["local_steps"]
        assert len(first["trained_on"]) == len(second["trained_on"])
        assert not set(first["trained_on"][:4]) & set(second["trained_on"][:4])
    assert len({result["global_step"] for result in results}) == 1


def test_all_workers_share_the_data_and_the_first_one_validates(run: Run) -> None:
    results = run(trains, Asking)
    assert_workers_in_step(results)
    used = sorted(index for result in results for index in result["trained_on"])
    assert used == sorted([*range(SAMPLES)] * 2)
    first, second, *others = [result["validated_on"] for result in results]
    assert len(first) == len(second) > 0
    assert all(sorted(mine + its) == list(range(VALIDATED)) for mine, its in zip(first, second, strict=True))
    assert others == [[], []]
    for worker in (0, 1):
        processes = results[2 * worker : 2 * worker + 2]
        ranks = [2.0 * worker, 2.0 * worker + 1]
        for result in processes:
            assert result["sum"] == 2 * sum(ranks), "as if the other worker had the same values"
            assert result["gathered"] == 2 * ranks
            assert result["world"] == 4
            assert result["rank"] == sum(ranks) / 2
            assert result["seen"] == sum(other["samples"] for other in processes)
    assert [result["validating"] for result in results[:2]] == [[0, 2, 2], [1, 2, 2]]
    losses = [result["metrics"]["val_loss"] for result in results]
    assert losses == [losses[0]] * 4


def test_a_process_stops_its_worker_and_the_run(run: Run) -> None:
    results = run(trains, Stopping, "halos", NEVER)
    assert_workers_in_step(results)
    assert all(result["epoch"] < NEVER for result in results)


def stops_elsewhere() -> Result:
    """Fits of which each is stopped in another hook, by a process of either worker."""
    return {hook: trains(partial(StoppingElsewhere, rank, hook), "halos", NEVER) for hook, rank in STOPPED_BY.items()}


def test_a_process_may_stop_the_run_in_any_hook(run: Run) -> None:
    ended = run(stops_elsewhere)
    for hook, rank in STOPPED_BY.items():
        results = [result[hook] for result in ended]
        assert_workers_in_step(results)
        assert all(result["epoch"] < NEVER for result in results), hook
        assert results[rank]["epoch"] >= 1, hook


def test_rounds_in_step_with_all_workers(run: Run) -> None:
    results = run(trains, Toy, "diloco")
    assert_workers_in_step(results)
    used = sorted(index for result in results for index in result["trained_on"])
    assert used == sorted([*range(SAMPLES)] * 2)


def test_the_processes_of_a_worker_train_one_model_when_parameters_are_unfrozen(run: Run) -> None:
    results = run(trains, Unfrozen)
    assert_workers_in_step(results)
    assert_same_model(results)
    for worker in (results[:2], results[2:]):
        steps = [result["steps"] for result in worker]
        for epoch, step in zip(worker[0]["epochs"], steps[0], strict=True):
            assert ("gradient of net.0.weight" in step) == (epoch == 1)
        for first, second in zip(*steps, strict=True):
            assert first.keys() == second.keys()
            assert all(torch.equal(first[name], second[name]) for name in first)
    assert {epoch for result in results for epoch in result["epochs"]} == {0, 1}


def nodes_are_workers() -> Result:
    module, path = Toy(), None
    for epochs in (1, 2):  # the second fit resumes the first
        strategy = HalosStrategy(worker="node", local_steps=4, accumulate_updates=4, timeout=60)
        saving = ModelCheckpoint("saved", save_top_k=-1)
        flags = {"enable_checkpointing": True, "callbacks": [saving], "devices": "auto"}
        trainer = make_trainer(strategy, max_epochs=epochs, **flags)
        trainer.fit(module, loader(), loader(VALIDATED), ckpt_path=path)
        path = trainer.strategy.broadcast(saving.best_model_path)
    site, (optimizer,) = strategy.site, trainer.optimizers
    moments = [state["exp_avg"] for state in optimizer.state_dict()["state"].values()]
    place = [site.rank, site.lane, site.lanes]
    return outcome(trainer, module, place=place, regions=list(strategy.topology.names), moments=moments)


def test_nodes_of_different_sizes_are_workers_that_divide_the_data_by_process(run: Run) -> None:
    results = run(nodes_are_workers, environments=torchrun_environments(2, 1))
    assert [result["place"] for result in results] == [[0, 0, 1], [0, 1, 1], [1, 0, 1]]
    assert results[0]["regions"] == ["0", "1"]
    assert_same_model(results)
    first, second, _ = results
    assert first["optimizer_steps"] == second["optimizer_steps"] > 0
    assert all(torch.equal(mine, its) for mine, its in zip(first["moments"], second["moments"], strict=True))
    share = -(-SAMPLES // 3)  # as under DDP, which repeats samples so that all processes have as many
    assert [len(result["trained_on"]) for result in results] == [2 * share] * 3
    assert {index for result in results for index in result["trained_on"][:share]} == set(range(SAMPLES))
    assert sorted(first["validated_on"][-1] + second["validated_on"][-1]) == list(range(VALIDATED))


class Deserted(Terminated):
    """One process gets SIGTERM, and the other one of its worker ends before it, because it hears of it first."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 2 and self.trainer.strategy._fit.world.alarm.preempted_since is not None:
            os._exit(143)
        return super().training_step(batch, batch_idx)


class TerminatedInValidation(Toy):
    """One process that validates gets SIGTERM in a validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.global_rank == 1 and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        super().validation_step(batch, batch_idx)


class Killed(Toy):
    """One process is killed at its tenth optimizer step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 3 and self.optimizer_steps == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


def test_a_process_that_dies_ends_its_worker_and_the_run_of_one_job(tmp_path: Path) -> None:
    environments = lightning_environments(4)
    ends = end_workers(trains, Killed, "halos", 50, folder=tmp_path, environments=environments, patience=40)
    assert ends[3].code == -signal.SIGKILL
    assert [end.code for end in ends[:3]] == [1, 1, 1], [end.log[-2000:] for end in ends]
    assert not any(end.left for end in ends)


class Silent(Toy):
    """One process is stopped at its tenth optimizer step: it says nothing more, but keeps its connections."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 3 and self.optimizer_steps == 10:
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().training_step(batch, batch_idx)


def waits_for_a_silent_process() -> Result:
    alarm._LIMIT = 2.0  # seconds for a process whose main thread waits inside its worker
    trainer = make_trainer(halos(worker=2, timeout=5), max_epochs=50)
    trainer.fit(Silent(), loader(), loader(VALIDATED))
    return {}


def test_a_process_that_is_stopped_ends_its_worker_and_the_run_within_the_timeout(tmp_path: Path) -> None:
    environments = lightning_environments(4)
    ends = end_workers(waits_for_a_silent_process, folder=tmp_path, environments=environments, patience=40, stopped=[3])
    assert [end.code for end in ends] == [1, 1, 1, None], [end.log[-2000:] for end in ends]
    assert re.search(r"rank 3 of worker 1 \(region 1\).* did not say anything for 5 s", ends[2].log)
    assert all("rank 3 of worker 1 (region 1)" in end.log for end in ends[:2]), "they are told why"
    assert not any(end.left for end in ends[:3])


class Failing(Toy):
    """One process of the first worker raises an exception at its tenth optimizer step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 1 and self.optimizer_steps == 10:
            raise ZeroDivisionError("mine")
        return super().training_step(batch, batch_idx)


def saves_on_exception(folder: Path) -> Result:
    module = Failing()
    always: dict[str, Any] = {"save_on_exception": True} if RequirementCache("lightning>=2.6") else {}
    saving = [ModelCheckpoint(folder, **always), OnExceptionCheckpoint(folder)]
    trainer = make_trainer(halos(worker=2), max_epochs=50, callbacks=saving, enable_checkpointing=True)
    try:
        trainer.fit(module, loader(), loader(VALIDATED))
    finally:
        assert "save_checkpoint" not in vars(trainer)
        assert not any("on_exception" in vars(callback) for callback in saving)
    return {}


def test_an_exception_in_one_process_saves_nothing_for_which_the_others_would_have_to_go_on(tmp_path: Path) -> None:
    environments, folder = lightning_environments(4), tmp_path / "saved"
    ends = end_workers(saves_on_exception, folder, folder=tmp_path, environments=environments, patience=40)
    assert [end.code for end in ends] == [1] * 4, [end.log[-2000:] for end in ends]
    assert "ZeroDivisionError: mine" in ends[1].log
    assert "No checkpoint is saved because of the exception" in ends[0].log
    assert not (folder / "on_exception.ckpt").exists()


def saves(make: Callable[[], Toy], folder: Path, ckpt_path: str | None) -> Result:
    module = make()
    saving = ModelCheckpoint(folder, every_n_train_steps=8, save_last=True)
    trainer = make_trainer(halos(worker=2), max_epochs=4, callbacks=[saving], enable_checkpointing=True)
    trainer.fit(module, loader(), loader(VALIDATED), ckpt_path=ckpt_path)
    return outcome(trainer, module)


@pytest.mark.parametrize("terminated", [Terminated, TerminatedInValidation])
def test_sigterm_of_one_process_saves_a_checkpoint_from_which_the_run_goes_on(
    tmp_path: Path, run: Run, terminated: Callable[[], Toy]
) -> None:
    environments, folder = lightning_environments(4), tmp_path / "saved"
    ends = end_workers(saves, terminated, folder, None, folder=tmp_path, environments=environments, patience=40)
    assert [end.code for end in ends] == [143] * 4, [end.log[-2000:] for end in ends]
    assert (folder / "last-preempted.ckpt").exists()
    results = run(saves, Toy, folder, "last")
    assert_workers_in_step(results)
    assert_same_model(results)
    assert results[0]["epoch"] == 4


def test_sigterm_of_one_process_ends_all_of_them(tmp_path: Path) -> None:
    ends = end_workers(
        trains,
        Deserted,
        "halos",
        50,
        folder=tmp_path,
        environments=lightning_environments(4),
        patience=30,
    )
    assert [end.code for end in ends] == [143] * 4, [end.log[-2000:] for end in ends]


def test_a_simulated_cluster_has_workers_of_several_processes_and_lanes_change_nothing(tmp_path: Path) -> None:
    runs = []
    for lanes in (4, 1):
        (folder := tmp_path / str(lanes)).mkdir()
        torch.manual_seed(1)
        strategy = {"worker": 4, "accumulate_updates": 2}
        runs.append(
            simulate(folder, Toy(), loader(), regions=(1, 1), strategy=strategy, slow=1, lanes=lanes, max_epochs=2)
        )
    for results in runs:
        used = sorted(index for result in results for index in result["trained_on"])
        assert used == sorted([*range(SAMPLES)] * 2)
        assert_same_model(results)
    for four, one in zip(*runs, strict=True):
        assert four["trained_on"] == one["trained_on"]
        assert all(torch.equal(four["state"][name], one["state"][name]) for name in one["state"])
