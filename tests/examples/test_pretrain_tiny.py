"""The tutorial: from text to a language model that lm-eval finds better than an untrained one, in five minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.conftest import EXAMPLES
from tests.integration.harness import ending

METRICS = {
    "local_hellaswag": {"acc", "acc_norm"},
    "local_lambada": {"acc", "perplexity"},
    "local_winogrande": {"acc"},
    "local_mmlu": {"acc"},
}


@pytest.mark.slow
@pytest.mark.timeout(330)
def test_the_tutorial_trains_a_model_that_is_better_beyond_noise(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "pretrain_tiny.py")]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
        with ending(process):
            status = process.wait(timeout=300)
    printed = (tmp_path / "log").read_text(errors="replace")
    assert status == 0, printed[-4000:]

    tiny = tmp_path / "tiny"
    assert {path.name for path in (tiny / "trained").iterdir()} >= {"config.json", "model.safetensors", "README.md"}
    rows = json.loads((tiny / "evaluation/comparison.json").read_text())["comparisons"]
    for task, metrics in METRICS.items():
        assert {row["metric"] for row in rows if row["task"] == task} == metrics
    for row in rows:
        if row["task"] == "local_lambada":
            difference = row["minus untrained"]["trained"]
            assert difference["better"]
            assert abs(difference["value"]) > 3 * difference["stderr"] > 0
    header, *_ = (tiny / "run/metrics.csv").read_text().splitlines()
    assert {"val_perplexity", "val_bits_per_byte", "tokens_per_second", "halos/staleness"} <= set(header.split(","))
