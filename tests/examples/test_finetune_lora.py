"""LoRA fine-tuning: only the adapters are trained, travel and are saved."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from peft import PeftModel

from tests.examples.conftest import EXAMPLES, Example
from tests.integration.toys import assert_same_model

SCRIPT = "finetune_lora.py"
LOCAL_STEPS = 4


def test_only_adapters_are_trained_travel_and_are_saved(example: Example, tmp_path: Path) -> None:
    results = example(SCRIPT, "--regions=1", "--max-steps=32", "--val-every=16", "--batch-size=4", "--output=adapters")

    assert_same_model(results)
    start, end = results[0]["start"], results[0]["state"]
    adapters = {name for name in end if ".lora_" in name}
    for name in end:
        assert torch.equal(start[name], end[name]) == (name not in adapters), name
    assert results[0]["metrics"]["val_loss"] < 5.3  # log(256), of a model that knows nothing, is 5.55

    # Rank 1 pushed to rank 0's server and got a model back, over the network, in every round. On a busy machine it may
    # have had few.
    (servers,) = results[0]["servers"]
    adapter_bytes, model_bytes = (4 * sum(end[name].numel() for name in names) for names in (adapters, end))
    rounds = results[1]["local_steps"] / LOCAL_STEPS
    assert model_bytes > 20 * adapter_bytes
    least = 2 * adapter_bytes * max(rounds - 1, 0.5)
    assert least < servers["bytes_within_regions"] < 2.2 * adapter_bytes * servers["updates"]
    assert servers["bytes_between_regions"] == 0
    printed = (tmp_path / "log0").read_text()
    assert f"Trained: {adapter_bytes // 4:,} of {model_bytes // 4:,} parameters" in printed
    assert "Traveled inside regions: " in printed

    # The adapters fit onto the same frozen model again.
    L.seed_everything(0)
    base, _ = runpy.run_path(str(EXAMPLES / SCRIPT))["load_model"](None)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapters").state_dict()
    assert {f"lm.{name}" for name in loaded} == set(end)
    assert all(torch.equal(tensor, end[f"lm.{name}"]) for name, tensor in loaded.items())


@pytest.mark.slow
def test_a_model_that_cannot_be_fetched_needs_the_network(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / SCRIPT, "--model", "EleutherAI/pythia-70m"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1
    assert "--model EleutherAI/pythia-70m: " in done.stderr
    assert "needs the network" in done.stderr
