from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, GPTNeoXForCausalLM, PreTrainedTokenizerBase

import lightning_halos
from lightning_halos import HuggingFaceCheckpoint
from lightning_halos.cli import main
from lightning_halos.language.comparison import compare
from lightning_halos.language.evaluation import write_results
from tests.language.models import CONTEXT, TASKS, LanguageModule, config, source
from tests.language.test_export import save

FEW = ["--include-path", str(TASKS), "--limit", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> str:
    """A Hugging Face folder of an untrained model."""
    path: Path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    GPTNeoXForCausalLM(config()).save_pretrained(path)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(path)
    return str(path)


def test_all_four_formats_from_any_folder_with_every_option(
    folder: str, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tasks = "local_hellaswag,local_lambada,local_winogrande,local_mmlu"
    options = ["--num-fewshot", "1", "--batch-size", "2", "--device", "cpu", "--dtype", "bfloat16"]
    options += ["--model-args", "max_length=100", "--tokenizer", tokenizer]
    with patch.object(HFLM, "__init__", autospec=True, side_effect=HFLM.__init__) as loading:
        assert main(["evaluate", folder, "--tasks", tasks, *FEW, *options, "--output", "scores"]) == 0
    given = {"tokenizer": tokenizer, "batch_size": 2, "device": "cpu", "dtype": "bfloat16", "max_length": 100}
    assert given.items() <= loading.call_args.kwargs.items()
    results = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert results["config"]["model_dtype"] == "torch.bfloat16"
    assert set(results["n-shot"].values()) == {1}
    assert {(task, key) for task, values in results["results"].items() for key in values if key.endswith("r,none")} >= {
        ("local_hellaswag", "acc_stderr,none"),
        ("local_hellaswag", "acc_norm_stderr,none"),
        ("local_lambada", "acc_stderr,none"),
        ("local_lambada", "perplexity_stderr,none"),
        ("local_winogrande", "acc_stderr,none"),
        ("local_mmlu_tools", "acc_stderr,none"),
    }
    assert results["groups"]["local_mmlu"]["sample_len"] == 9
    assert len(results["samples"]["local_lambada"]) == 3
    markdown = (tmp_path / "scores" / "results.md").read_text()
    assert "Limited to 3 questions per task" in markdown
    for shown in (markdown, capsys.readouterr().out):
        assert "|local_winogrande|" in shown


def test_a_share_of_the_questions_is_called_one(tmp_path: Path) -> None:
    write_results({"results": {}, "versions": {}, "n-shot": {}, "config": {"limit": 0.1}}, tmp_path)
    assert "Limited to a share of 0.1 of each task's questions" in (tmp_path / "results.md").read_text()


def test_a_checkpoint_a_folder_and_a_model_score_alike(tmp_path: Path, tokenizer: str) -> None:
    module = LanguageModule()
    checkpoint = save(module, tmp_path, HuggingFaceCheckpoint(tokenizer))
    module.lm.save_pretrained(tmp_path / "folder")
    few: dict[str, Any] = {"tasks": ["local_lambada"], "include_path": TASKS, "limit": 5}
    scores = [
        lightning_halos.evaluate(checkpoint, **few),
        lightning_halos.evaluate(tmp_path / "folder", tokenizer=Path(tokenizer), device="cpu", dtype="float32", **few),
        lightning_halos.evaluate(module.lm, tokenizer=tokenizer, **few),
    ]
    for key in ("perplexity,none", "perplexity_stderr,none", "acc,none"):
        values = [one["results"]["local_lambada"][key] for one in scores]
        assert values == pytest.approx([values[0]] * 3, rel=1e-4)


def test_nothing_that_is_given_changes(tokenizer: str) -> None:
    model = GPTNeoXForCausalLM(config()).train()
    model.gpt_neox.layers[0].eval()
    given = AutoTokenizer.from_pretrained(tokenizer)
    modes = [part.training for part in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    numbers = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    lightning_halos.evaluate(model, "local_winogrande", tokenizer=given, include_path=TASKS, limit=2)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == numbers
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert given.pad_token is None


def test_few_shot_examples_come_before_the_question(folder: str) -> None:
    results = lightning_halos.evaluate(folder, "local_mmlu_tools", include_path=TASKS, limit=2, num_fewshot=2)
    prompt = results["samples"]["local_mmlu_tools"][0]["arguments"][0][0]
    assert prompt.startswith("The following are multiple choice questions (with answers) about tools.")
    assert prompt.count("Answer:") == 3
    assert prompt.endswith("Answer:")


def test_a_model_that_was_trained_is_told_from_one_that_was_not(tokenizer: str) -> None:
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(config(width=32))
    few: dict[str, Any] = {"tokenizer": tokenizer, "include_path": TASKS, "limit": 40, "batch_size": 16}
    before = lightning_halos.evaluate(model, "local_lambada", **few)
    train(model, AutoTokenizer.from_pretrained(tokenizer), steps=40)
    after = lightning_halos.evaluate(model, "local_lambada", **few)
    difference = {row.metric: row.differences[0] for row in compare([before, after])}["perplexity"]
    assert difference.paired
    assert difference.better
    assert not difference.within_noise


def train(model: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerBase, steps: int) -> None:
    """Trains on files that the questions are not from."""
    text = "\n".join(Path(path).read_text(encoding="utf-8") for path in source()[::5])
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / steps)
        starts = torch.randint(len(tokens) - CONTEXT, (8,))
        batch = torch.stack([tokens[start : start + CONTEXT] for start in starts])
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": "local_lambda"}, "no task called local_lambda"),
        ({"tasks": 5}, "tasks=5 must be names of tasks"),
        ({"tasks": None}, "tasks=None must be names of tasks"),
        ({"tasks": ["x", 5]}, r"tasks=\['x', 5\] must be names of tasks"),
        ({"include_path": 5}, "include_path=5 must be a folder, or a list of folders"),
        ({"limit": math.nan}, "limit=nan"),
        ({"limit": math.inf}, "limit=inf"),
        ({"seed": "a"}, "seed='a' must be a whole number from 0"),
        ({"tasks": ""}, "must name at least one task"),
        ({"limit": 0}, "limit=0"),
        ({"limit": 2.5}, "limit=2.5"),
        ({"num_fewshot": -1}, "num_fewshot=-1"),
        ({"batch_size": "large"}, "batch_size='large'"),
        ({"bootstrap_iters": 0}, "bootstrap_iters=0"),
        ({"include_path": "nowhere"}, "include_path='nowhere'"),
        ({"dtype": "bfloat"}, "dtype='bfloat'"),
        (
            {"model_args": {"max_lenght": 100}},
            "model_args={'max_lenght': 100} must be arguments of lm-eval's HFLM: .*max_lenght",
        ),
        ({"model_args": {"pretrained": "other", "tokenizer": "t"}}, "must not have pretrained, tokenizer"),
        ({"device": "cpu", "model_args": {"device": "cpu"}}, "must not have device"),
        ({"device": "gpu"}, "device='gpu' must be a device of torch"),
        ({"model_args": {"device": "gpu"}}, "device='gpu' must be a device of torch"),
        ({"device": "cuda:99"}, "device='cuda:99' is not there: torch finds"),
        ({"tokenizer": "./nope"}, r"Cannot load the tokenizer \./nope"),
        ({"model": "./nowhere"}, r"\./nowhere is neither a folder"),
        ({"model": "nowhere.ckpt"}, "does not exist"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: dict[str, Any], message: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "tasks" in arguments:
        monkeypatch.setattr("lm_eval.tasks.manager.TaskIndex.build", lambda self, paths: {})
    right = {"model": folder, "tasks": "local_lambada", "include_path": TASKS}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        lightning_halos.evaluate(**{**right, **arguments})


def test_an_answer_that_is_longer_than_the_context_is_said(folder: str) -> None:
    options: dict[str, Any] = {"include_path": TASKS, "limit": 1, "model_args": {"max_length": 3}}
    with pytest.raises(
        ValueError, match="local_hellaswag: an answer is empty, or longer than the model's context of 3"
    ):
        lightning_halos.evaluate(folder, "local_hellaswag", **options)


def test_a_device_among_the_arguments_of_the_model_counts(folder: str) -> None:
    options: dict[str, Any] = {"include_path": TASKS, "limit": 1, "model_args": {"device": "cpu"}}
    with (
        patch("torch.cuda.is_available", return_value=True),
        patch.object(HFLM, "__init__", autospec=True, side_effect=ValueError("stop")) as loading,
        pytest.raises(ValueError, match="stop"),
    ):
        lightning_halos.evaluate(folder, "local_lambada", **options)
    assert loading.call_args.kwargs["device"] == "cpu"


def test_what_only_the_hub_has_needs_the_network(
    tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "of_the_hub.yaml").write_text(
        "task: of_the_hub\ndataset_path: somebody/questions\noutput_type: loglikelihood\ntest_split: test\n"
        "doc_to_text: text\ndoc_to_target: text\n"
    )
    of_the_hub = ["--include-path", str(tmp_path), "--tasks", "of_the_hub"]
    assert main(["evaluate", folder, *of_the_hub]) == 2
    assert "the data of of_the_hub" in (error := capsys.readouterr().err)
    assert "needs the network" in error
    assert main(["evaluate", "somebody/model", *FEW, "--tasks", "local_lambada"]) == 2
    assert "the model somebody/model" in (error := capsys.readouterr().err)
    assert "needs the network" in error


@pytest.mark.slow
def test_the_package_itself_needs_nothing_of_the_extra() -> None:
    program = """
import sys
for name in ("datasets", "lm_eval", "accelerate", "peft"):
    sys.modules[name] = None
import lightning.pytorch  # imports torchmetrics, which imports transformers where that is installed
before = set(sys.modules)
import lightning_halos, lightning_halos.data
assert not {"transformers", "tokenizers"} & (set(sys.modules) - before)
try:
    lightning_halos.evaluate("model", "hellaswag")
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert 'pip install "lightning-halos[lm]"' in done.stdout
