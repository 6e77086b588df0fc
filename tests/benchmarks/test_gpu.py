"""The GPU benchmark on the CPU, with a tiny model: it works, and says what it leaves out. Its numbers mean nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import run
from tests.integration.harness import Result

__all__ = ["run"]

ROOT = Path(__file__).parents[2]
BENCHMARK = ROOT / "benchmarks" / "gpu.py"
KINDS = ["plain", "halos", "overlap"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    for folder in ("benchmarks", "examples"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    import gpu

    return gpu


def test_what_does_not_fit_or_is_too_late_is_left_out(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    huge = gpu.Bench({"huge": gpu.Size(2**20, 100, 1)}, "cpu", 60.0)
    gpu.round_(huge)
    huge.finish()
    late = gpu.Bench({"tiny": gpu.SIZES["tiny"]}, "cpu", 0.0)
    gpu.training(late)
    late.finish()
    printed = capsys.readouterr().out
    assert re.search(r"Left out: round of huge, which needs about \d+ GB of host memory\.", printed)
    for kind in KINDS:
        assert f"Left out: training-{kind} of tiny, because the time is up." in printed
    assert not huge.has_failed
    assert not late.has_failed


def test_the_sizes_are_those_of_their_names(gpu: Any) -> None:
    for name, parameters in {"70m": 70.4e6, "410m": 405e6, "1.4b": 1.41e9}.items():  # of the Pythia suite
        assert gpu.SIZES[name].parameters == pytest.approx(parameters, rel=0.01)


def measured(folder: Path) -> Result:
    sys.path[:0] = [str(BENCHMARK.parent)]
    import gpu

    return {
        kind: gpu.training_process(folder, gpu.SIZES["tiny"], "cpu", kind) for kind in ("plain", "halos", "overlap")
    }


@pytest.mark.slow
def test_a_worker_is_compared_with_a_plain_trainer(run: Any, tmp_path: Path) -> None:
    (result,) = run(measured, tmp_path, workers=1)  # three fits, and an import of transformers
    assert all(found["rate"] > 0 and found["host"] > 0 for found in result.values())


@pytest.mark.slow
@pytest.mark.timeout(960)
def test_the_command() -> None:
    # Its default of 5 minutes is for a machine with nothing else to do. When the time is up it leaves things out.
    command = [sys.executable, str(BENCHMARK), "--accelerator", "cpu", "--sizes", "tiny", "--minutes", "15"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=930)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Left out" not in done.stdout
    tables = re.findall(r"^## (.*)\n\n((?:\|.*\n)+)", done.stdout, flags=re.MULTILINE)
    assert [len(rows.splitlines()) - 2 for _, rows in tables] == [1, 3, 1, 1, 1], done.stdout
    in_the_fit, on_device, on_host = re.split(r" *\| *", tables[-1][1].splitlines()[-1])[2:5]
    assert in_the_fit == on_device == on_host
