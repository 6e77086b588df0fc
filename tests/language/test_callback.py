"""The callback in real fits: what it logs, and that the training does not notice it."""

from __future__ import annotations

import csv
import os
import signal
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import lightning_halos
from lightning_halos import HuggingFaceCheckpoint, LMEvalCallback
from lightning_halos.callbacks.evaluation import flatten
from lightning_halos.checkpoint.manifest import NAME
from lightning_halos.language.export import export_checkpoint
from tests.integration.conftest import Run
from tests.integration.harness import Result
from tests.integration.toys import assert_same_model, halos, make_trainer, state
from tests.language.models import TASKS, LanguageModule, loader

FEW: dict[str, Any] = {"include_path": TASKS, "limit": 3}


EVALUATING = Path("evaluating")  # exists while rank 0 evaluates and the run goes on
OWED = "rank {} has to train a step during this evaluation"


class Timed(LMEvalCallback):
    """Records when it evaluated. No evaluation but the last one ends before all others have trained a step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spans: list[tuple[float, float]] = []

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        start, owed = time.monotonic(), []
        if trainer.is_global_zero and trainer.global_step < trainer.max_steps:
            owed = [Path(OWED.format(rank)) for rank in range(1, trainer.world_size)]
            for path in (*owed, EVALUATING):
                path.touch()
        super()._evaluate(trainer, pl_module)
        wait_until(lambda: not any(path.exists() for path in owed))
        self.spans.append((start, time.monotonic()))
        if owed:
            EVALUATING.unlink()


class TimedModule(LanguageModule):
    """Records when it trained. While rank 0 evaluates it trains one step, so that the run does not end meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def training_step(self, tokens: Tensor, batch_idx: int) -> Any:
        owed = Path(OWED.format(self.trainer.global_rank))
        # An evaluation may begin between any two looks: then the step is owed, too, and must not be waited for.
        wait_until(lambda: owed.exists() or not EVALUATING.exists())
        is_owed = owed.exists()
        self.times.append(time.monotonic())
        if is_owed:
            owed.unlink()
        return super().training_step(tokens, batch_idx)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def evaluating(folder: str, tokenizer: str) -> Result:
    module = TimedModule()
    callback = Timed("local_lambada", every_n_steps=20, tokenizer=tokenizer, **FEW)
    trainer = make_trainer(
        halos(),
        max_steps=60,
        logger=CSVLogger(folder, version=0),
        callbacks=[callback, HuggingFaceCheckpoint(tokenizer)],
    )
    trainer.fit(module, loader(2048))
    trainer.save_checkpoint(Path(folder) / "last.ckpt")
    after = {}
    if trainer.is_global_zero:
        results = lightning_halos.evaluate(module.lm, "local_lambada", tokenizer=tokenizer, **FEW)
        after = {name: value for name, value in flatten(results).items() if not name.endswith("_stderr")}
    metrics = {name: float(trainer.callback_metrics[name]) for name in after}
    return {"state": state(module), "times": module.times, "spans": callback.spans, "after": after, "metrics": metrics}


def test_under_halos_the_others_train_on_while_rank_0_evaluates(run: Run, tmp_path: Path, tokenizer: str) -> None:
    results = run(evaluating, str(tmp_path), tokenizer)
    assert_same_model(results)
    spans = results[0]["spans"]
    assert len(spans) == 3  # after 20 and 40 steps, and at the end
    for start, end in spans[:-1]:
        for other in results[1:]:
            assert any(start < moment < end for moment in other["times"])
    assert results[0]["metrics"] == pytest.approx(results[0]["after"])
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["lm_eval/local_lambada/perplexity"]]
    steps = [int(row["step"]) for row in rows]
    assert steps[-1] == 60
    assert [step // 20 for step in steps] == [1, 2, 3]
    assert float(rows[-1]["lm_eval/local_lambada/acc"]) == results[0]["after"]["lm_eval/local_lambada/acc"]
    loaded = AutoModelForCausalLM.from_pretrained(export_checkpoint(tmp_path / "last.ckpt", tmp_path / "out"))
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, results[0]["state"][f"lm.{name}"])
    card = (tmp_path / "out" / "README.md").read_text()
    for row in ("| Regions | 0: 2 worker(s), 1: 2 worker(s) |", "| local_steps | 4 |", "| accumulate_updates | 4 |"):
        assert row in card
    for row in (
        "| Defaults | for 60 global steps |",
        "| merge_weight | 0.5 (default) |",
        "| local_optimizer | lr=0.5, momentum=0, delay=1 (default) |",
        "| global_optimizer | lr=0.7, momentum=0, delay=1 (default) |",
    ):
        assert row in card
    assert "| default |" not in card


def evaluating_in_two_processes(tokenizer: str) -> Result:
    callback = LMEvalCallback("local_lambada", every_n_steps=4, at_end=False, tokenizer=tokenizer, **FEW)
    found: list[float] = []
    trainer = make_trainer(
        halos(regions=1, worker=2),
        devices=2,
        max_steps=6,
        callbacks=[callback, LambdaCallback(on_train_epoch_end=lambda trainer, _: found.append(metric_of(trainer)))],
    )
    trainer.fit(module := LanguageModule(), loader())
    return {"state": state(module), "found": found, "has_results": callback.results is not None}


def metric_of(trainer: pl.Trainer) -> float:
    return float(trainer.callback_metrics["lm_eval/local_lambada/perplexity"])


def test_in_a_worker_of_several_processes_one_evaluates_and_all_know_the_results(run: Run, tokenizer: str) -> None:
    results = run(evaluating_in_two_processes, tokenizer, workers=2)
    assert_same_model(results)
    assert [result["has_results"] for result in results] == [True, False]
    assert len(results[0]["found"]) == 1
    assert results[0]["found"] == results[1]["found"]


class Terminated(LMEvalCallback):
    """SIGTERM comes while it evaluates."""

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        super()._evaluate(trainer, pl_module)


def terminated(folder: str, tokenizer: str) -> Result:
    module = TimedModule()
    callback = Terminated("local_lambada", every_n_steps=20, tokenizer=tokenizer, **FEW)
    trainer = make_trainer(
        halos(), callbacks=[callback, ModelCheckpoint(folder)], max_steps=10_000, enable_checkpointing=True
    )
    try:
        trainer.fit(module, loader())
    except SystemExit as end:
        return {"code": end.code, "hooks": len(module.lm._forward_pre_hooks)}
    return {}


def test_sigterm_does_not_wait_for_the_end_of_an_evaluation(run: Run, tmp_path: Path, tokenizer: str) -> None:
    results = run(terminated, str(tmp_path), tokenizer)
    assert results == [{"code": 143, "hooks": 0}] * 4
    assert list((tmp_path / "last-preempted").glob(f"*/{NAME}"))


def train(folder: Path, *callbacks: pl.Callback) -> tuple[dict[str, Tensor], pl.Trainer, LanguageModule]:
    pl.seed_everything(5)
    module = LanguageModule()
    module.lm.gpt_neox.layers[1].eval()  # as users do with frozen parts
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=8,
        logger=CSVLogger(folder, version=0),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, loader())
    return state(module), trainer, module


def test_the_training_is_bitwise_the_same_with_and_without_it(tmp_path: Path, tokenizer: str) -> None:
    callback = LMEvalCallback("local_lambada", every_n_steps=3, tokenizer=tokenizer, **FEW)
    plain, _, module = train(tmp_path / "plain")
    evaluated, trainer, other = train(tmp_path / "evaluated", callback)
    assert plain.keys() == evaluated.keys()
    assert all(torch.equal(plain[name], evaluated[name]) for name in plain)
    assert [part.training for part in module.modules()] == [part.training for part in other.modules()]
    with (tmp_path / "evaluated" / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["lm_eval/local_lambada/acc"]]
    assert steps == [3, 6, 8]
    assert trainer.callback_metrics["lm_eval/local_lambada/perplexity"] > 1


def test_the_tokenizer_of_the_datamodule_is_found(tokenizer: str) -> None:
    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader()

    data = Data()
    callback = LMEvalCallback("local_lambada", **FEW)
    trainer = make_trainer("auto", devices=1, max_steps=1, callbacks=[callback])
    with pytest.raises(MisconfigurationException, match="needs a tokenizer"):
        trainer.fit(LanguageModule(), data)
    data.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    trainer = make_trainer("auto", devices=1, max_steps=1, callbacks=[callback])
    trainer.fit(LanguageModule(), data)
    assert callback.results is not None


def test_the_final_model_is_evaluated_where_it_was_trained(tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = LanguageModule()
    device = torch.device("cpu", 0)  # is the CPU, by a name that nothing else uses
    done: list[str] = []
    to = module.lm.to
    monkeypatch.setattr(module.lm, "to", lambda device: (done.append(str(device)), to(device)))
    callback = LMEvalCallback("local_lambada", tokenizer=tokenizer, **FEW)
    trainer = make_trainer(SingleDeviceStrategy(device), devices=1, max_steps=1, callbacks=[callback])
    module.lm.register_forward_hook(lambda *_: done.append("forward") if trainer.global_step == 1 else None)
    trainer.fit(module, loader())
    assert [key for key, _ in groupby(done)] == ["cpu:0", "forward", "cpu"]


def test_arguments_that_evaluate_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="every_n_steps=0"):
        LMEvalCallback("hellaswag", every_n_steps=0)
    with pytest.raises(ValueError, match="nothing is ever evaluated"):
        LMEvalCallback("hellaswag", at_end=False)
    with pytest.raises(TypeError, match="at_end='no' must be True or False"):
        LMEvalCallback("hellaswag", at_end="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tasks=None must be names of tasks"):
        LMEvalCallback(None)  # type: ignore[arg-type]


def test_a_model_that_is_divided_inside_a_worker_is_refused(tokenizer: str) -> None:
    callback = LMEvalCallback("local_lambada", tokenizer=tokenizer, **FEW)
    trainer = make_trainer(halos(regions=1, worker=2, inner="fsdp2"), callbacks=[callback])
    with pytest.raises(MisconfigurationException, match="ModelParallelStrategy shards it"):
        callback.setup(trainer, LanguageModule(), "fit")


def test_a_task_that_does_not_exist_is_missed_before_the_training(tokenizer: str) -> None:
    callback = LMEvalCallback("local_lambada,missing.yaml", tokenizer=tokenizer, include_path=TASKS)
    module = LanguageModule()
    before = state(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.tasks.manager.TaskIndex.build", lambda self, paths: {})
        with pytest.raises(ValueError, match=r"no task called .*missing\.yaml"):
            make_trainer("auto", devices=1, max_steps=1, callbacks=[callback]).fit(module, loader())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
