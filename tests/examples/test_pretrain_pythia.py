"""The settings for GPUs, as far as a CPU can test them: small models, in this process, with the real strategy."""

from __future__ import annotations

import csv
import math
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock, patch

import lightning as L
import numpy as np
import pytest
import torch

from lightning_halos import cli
from lightning_halos.data import IndexedTokensWriter
from tests.examples.conftest import EXAMPLES
from tests.integration.harness import Result, lightning_environments, run_workers
from tests.language.models import VOCABULARY, train_tokenizer

CONTEXT = 8
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
ARCHITECTURE = {**SMALL, "vocab_size": VOCABULARY, "max_position_embeddings": 32}

Fit = Callable[..., list[dict[str, str]]]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module. What it sets for its process does not stay."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import pretrain_pythia

    precision = torch.get_float32_matmul_precision()
    with patch.dict(os.environ):
        yield pretrain_pythia
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """The folder with the data, in which the script runs."""
    chance = np.random.default_rng(0)
    with IndexedTokensWriter(tmp_path / "tokens") as writer:
        for _ in range(48):
            writer.add(chance.integers(VOCABULARY, size=CONTEXT + 1))
    train_tokenizer([__file__]).save_pretrained(tmp_path / "tokens-tokenizer")
    return tmp_path


def command(model: str, *options: str) -> list[str]:
    """The arguments that train a model for two steps with the paper's settings."""
    files = ("--config", str(EXAMPLES / "pythia/paper.yaml"), "--config", str(EXAMPLES / f"pythia/{model}.yaml"))
    machine = ("--trainer.accelerator=cpu", "--trainer.num_nodes=1", "--trainer.devices=1")
    short = ("--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1")
    data = ("prefix=tokens", "tokenizer=tokens-tokenizer", f"context={CONTEXT}", "batch_size=2", "val_sequences=4")
    given = (f"--data.{option}" for option in (*data, "num_workers=0"))
    return ["pretrain_pythia.py", "fit", *files, *machine, *short, *given, *options]


def logged(folder: Path) -> list[dict[str, str]]:
    """The rows of the latest ``metrics.csv``."""
    with max((folder / "runs").rglob("metrics.csv")).open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def fit(script: ModuleType, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """Runs ``pretrain_pythia.py fit`` with the paper's settings and a model's. Returns the rows of ``metrics.csv``."""
    monkeypatch.chdir(prepared)

    def run(model: str, *options: str) -> list[dict[str, str]]:
        monkeypatch.setattr("sys.argv", command(model, *options))
        script.main()
        return logged(prepared)

    return run


def values(rows: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row.get(name)]


def small() -> list[str]:
    return [f"--model.architecture.{name}={value}" for name, value in SMALL.items()]


@pytest.mark.parametrize("model", ["14m", pytest.param("70m", marks=pytest.mark.slow), "160m"])
def test_each_model_trains_with_the_papers_settings(fit: Fit, model: str) -> None:
    rows = fit(model, *small())
    assert len(values(rows, "train_loss")) == 2
    for name in ("val_loss", "val_perplexity", "val_bits_per_byte", "tokens_per_second"):
        assert values(rows, name)


def in_a_worker(options: list[str]) -> Result:
    sys.argv = options
    runpy.run_path(str(EXAMPLES / "pretrain_pythia.py"), run_name="__main__")
    return {}


@pytest.mark.parametrize("inner", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_a_worker_of_two_processes_trains_with_the_papers_settings(
    script: ModuleType, prepared: Path, inner: str
) -> None:
    worker = ("--trainer.devices=2", "--trainer.strategy.worker=2", f"--trainer.strategy.inner={inner}")
    options = command("70m", *small(), *worker)
    environments = lightning_environments(2)
    run_workers(in_a_worker, options, folder=prepared, environments=environments)
    rows = logged(prepared)
    assert len(values(rows, "train_loss")) == 2
    assert all(values(rows, name) for name in ("val_loss", "val_perplexity", "tokens_per_second"))
    checkpoint, exported = prepared / "runs/checkpoints/last.ckpt", prepared / "model"
    module = script.Pythia.load_from_checkpoint(checkpoint)  # an ordinary one
    assert cli.main(["export", str(checkpoint), str(exported)]) == 0
    state = script.Pythia(pretrained=str(exported)).state_dict()
    for name, tensor in module.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_a_run_that_is_started_again_goes_on(fit: Fit, tmp_path: Path) -> None:
    fit("70m", *small(), "--ckpt_path=last")
    assert (tmp_path / "runs/checkpoints/last.ckpt").is_file()
    rows = fit("70m", *small(), "--ckpt_path=last", "--trainer.max_steps=3")
    assert len(values(rows, "train_loss")) == 1
    assert [path.name for path in (tmp_path / "runs/checkpoints").glob("*.ckpt")] == ["last.ckpt"]


def test_a_pretrained_model_trains_on_with_gradient_checkpointing(fit: Fit, script: ModuleType, tmp_path: Path) -> None:
    script.Pythia(ARCHITECTURE).model.save_pretrained(tmp_path / "model")
    options = ("architecture=null", "pretrained=model", "gradient_checkpointing=true", "attention=eager")
    rows = fit("14m", *(f"--model.{option}" for option in options))
    assert len(values(rows, "train_loss")) == 2
    assert all(part.training for part in script.Pythia(pretrained=str(tmp_path / "model")).model.modules())


def test_gradient_checkpointing_computes_the_same_gradients(script: ModuleType) -> None:
    tokens = torch.randint(VOCABULARY, (4, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    gradients = []
    for gradient_checkpointing in (False, True):
        L.seed_everything(0)
        module = script.Pythia(ARCHITECTURE, gradient_checkpointing=gradient_checkpointing)
        module.log = Mock()
        called = Mock(return_value=None)
        module.model.gpt_neox.layers[0].attention.register_forward_hook(called)
        module.training_step(tokens, 0).backward()
        assert called.call_count == (2 if gradient_checkpointing else 1)
        gradients.append([parameter.grad for parameter in module.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def configured(script: ModuleType, steps: int, **options: Any) -> tuple[L.LightningModule, Any, Any]:
    module = script.Pythia(ARCHITECTURE, **options)
    module.trainer = Mock(estimated_stepping_batches=steps)
    made = module.configure_optimizers()
    return module, made["optimizer"], made["lr_scheduler"]["scheduler"]


def test_only_matrices_decay(script: ModuleType) -> None:
    module, optimizer, _ = configured(script, 100, weight_decay=0.3)
    decay = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in module.named_parameters():
        is_matrix = name.endswith("weight") and "layernorm" not in name and "layer_norm" not in name
        assert decay[id(parameter)] == (0.3 if is_matrix else 0.0), name


def rates(script: ModuleType, steps: int, **options: Any) -> list[float]:
    """The learning rate of each step."""
    _, optimizer, scheduler = configured(script, steps, lr=2.0, **options)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_the_rate_rises_to_its_peak_and_falls_by_a_cosine(script: ModuleType) -> None:
    found = rates(script, 20, warmup_steps=4, final_lr=0.1)
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert found[11] == pytest.approx(2.0 * (1 + 0.1) / 2)  # half-way between the peak and the end
    assert found[-1] == pytest.approx(0.2)
    assert found[3:] == sorted(found[3:], reverse=True)


def test_the_warm_up_is_a_hundredth_unless_it_is_none_at_all(script: ModuleType) -> None:
    assert rates(script, 200)[:2] == pytest.approx([1.0, 2.0])
    first, *_ = rates(script, 200, warmup_steps=0)
    assert first == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi / 200)) / 2))


def test_compiling_keeps_the_names_of_the_weights(script: ModuleType) -> None:
    plain, compiled = (script.Pythia(ARCHITECTURE, compile=compiling) for compiling in (False, True))
    assert plain.state_dict().keys() == compiled.state_dict().keys()


def test_either_an_architecture_or_a_model(script: ModuleType) -> None:
    with pytest.raises(ValueError, match="give one of them"):
        script.Pythia()
    with pytest.raises(ValueError, match="give one of them"):
        script.Pythia(ARCHITECTURE, pretrained="model")
