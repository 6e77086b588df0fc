"""Masked language modeling: the model learns, and all workers end with the same one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.examples.conftest import Example
from tests.integration.toys import assert_same_model


@pytest.mark.slow
def test_it_learns_from_a_tokenizer_of_its_own(example: Example, tmp_path: Path) -> None:
    results = example("pretrain_masked_lm.py", "--max-steps=60", "--val-every=30", "--batch-size=8")

    assert_same_model(results)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "demo" / "tokenizer")
    assert tokenizer.decode(tokenizer("naïve = lambda: 0")["input_ids"]) == "naïve = lambda: 0"
    metrics = results[0]["metrics"]
    assert metrics["val_loss"] < math.log(len(tokenizer)) - 0.7
    assert math.exp(metrics["val_loss"]) / 1.1 < metrics["val_perplexity"] < math.exp(metrics["val_loss"]) * 1.1
    assert metrics["val_masked_accuracy"] > 0.03
    printed = (tmp_path / "log0").read_text()
    assert "val_masked_accuracy: " in printed
    assert "import ___" in printed
