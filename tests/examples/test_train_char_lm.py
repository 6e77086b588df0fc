"""The demo's comparison: it names a factor only if the machine kept the pace that the workers stand for."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.examples.conftest import EXAMPLES, Example
from tests.integration.toys import assert_same_model

# 4 workers with 0.1, 0.1, 0.1 and 0.4 s per batch: without anything but batches, HALoS takes 49.2 s and DDP 160 s.
SETTINGS = {"slowdown": [1, 1, 1, 4], "devices": 4, "regions": 2, "max_steps": 400, "pace": 0.1, "link": 0.0}
demo = SimpleNamespace(**runpy.run_path(str(EXAMPLES / "train_char_lm.py")))


@pytest.fixture
def compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Compares two straight loss curves of given durations. Returns what the demo prints."""

    def compare(halos: float, ddp: float, **changes: object) -> str:
        for name, seconds in (("halos", halos), ("ddp", ddp), ("link-halos", 40.0), ("link-ddp", 200.0)):
            points = [{"step": 400 * p, "seconds": seconds * p, "val_loss": 3 - p} for p in (0.1, 0.5, 1.0)]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, points)))
        demo.compare(Namespace(output=tmp_path, **{**SETTINGS, **changes}))
        assert (tmp_path / "val_loss.png").read_bytes().startswith(b"\x89PNG")
        return capsys.readouterr().out

    return compare


def test_a_machine_that_keeps_the_pace_gives_a_factor(compare: Callable[..., str]) -> None:
    out = compare(halos=50, ddp=165)
    assert "HALoS is 3.30 times as fast as DDP to the half-way loss" in out
    assert "(batches alone: 49.2 s)" in out
    assert "(batches alone: 160.0 s)" in out


def test_a_machine_that_does_not_gives_none(compare: Callable[..., str]) -> None:
    out = compare(halos=150, ddp=165)
    assert "HALoS cannot be compared with DDP, because this machine was too slow or too busy" in out
    assert "With halos, batches alone take 49 s at --pace 0.1" in out
    assert "With ddp" not in out
    assert "times as fast" not in out


def test_without_a_pace_there_is_none_to_keep(compare: Callable[..., str]) -> None:
    assert "HALoS is 2.00 times as fast" in compare(halos=5, ddp=10, pace=0.0)


def test_the_race_over_a_slow_link_is_compared_by_the_virtual_clock(compare: Callable[..., str]) -> None:
    slow_worker, slow_link = compare(halos=150, ddp=165, link=50.0).split("4 equal workers, 50 Mbit/s")
    assert "too slow or too busy" in slow_worker
    assert "HALoS is 5.00 times as fast as DDP" in slow_link, "however busy the machine is"
    assert "batches alone" not in slow_link


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Starts the demo, whose runs only write a curve each. The run of the given name fails."""

    def start(failing: str = "none") -> None:
        script = tmp_path / "run.py"
        script.write_text(RUN.format(folder=str(tmp_path / "demo"), failing=failing))
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))
        monkeypatch.setattr(sys, "argv", ["train_char_lm.py", "--output", str(tmp_path / "demo")])
        demo.main()

    return start


RUN = """
import json, pathlib, sys, time
strategy, link = sys.argv[sys.argv.index("--strategy") + 1], float(sys.argv[sys.argv.index("--link") + 1])
name = f"link-{{strategy}}" if link else strategy
folder = pathlib.Path({folder!r})
folder.mkdir(exist_ok=True)
deadline = time.monotonic() + 240
while name == "ddp" and not all((folder / f"link-{{one}}.jsonl").exists() for one in ("halos", "ddp")):
    assert time.monotonic() < deadline, "no simulation runs beside it"
    time.sleep(0.02)
if name == {failing!r}:
    (folder / f"{{name}}.jsonl").touch()
    sys.exit("what went wrong")
seconds = 30 if strategy == "halos" else 90
points = [{{"step": 150 * p, "seconds": seconds * p, "val_loss": 5 - p}} for p in (0.2, 0.6, 1.0)]
(folder / f"{{name}}.jsonl").write_text("\\n".join(map(json.dumps, points)))
print(f"the output of {{name}}")
"""


def test_the_simulations_run_while_ddp_does(start: Callable[..., None], capfd: pytest.CaptureFixture[str]) -> None:
    start()
    lines = [line for line in capfd.readouterr().out.splitlines() if line]
    first, second, third = (lines.index(f"the output of {name}") for name in ("ddp", "link-halos", "link-ddp"))
    assert lines.index("the output of halos") < first < second < third
    assert lines[second - 1] == "--- Training with halos, 50 Mbit/s between the regions, simulated ---"
    assert sum("times as fast as DDP to the half-way loss" in line for line in lines) == 2


def test_a_simulation_that_fails_ends_the_demo(start: Callable[..., None], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        start("link-halos")
    assert "what went wrong" in capfd.readouterr().out


def test_a_simulation_has_the_virtual_time_of_its_model(tmp_path: Path) -> None:
    curve = demo.LossCurve(tmp_path / "curve.jsonl")
    curve.start = -math.inf
    assert curve._seconds(SimpleNamespace(cluster="described", model_seconds=0.3)) == 0.3
    assert curve._seconds(SimpleNamespace(cluster=None, model_seconds=0.0)) == math.inf
    assert curve._seconds("another of Lightning's strategies") == math.inf


def test_the_slow_link_is_between_all_workers() -> None:
    args = SimpleNamespace(link=50.0, devices=3, regions=2, pace=0.1)
    assert [len(speeds) for speeds in demo.slow_link(args, "ring").worker_speeds] == [2, 1]


def test_a_region_without_a_worker_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_char_lm.py", "--devices", "1"])
    with pytest.raises(SystemExit):
        demo.main()
    assert "--devices 1 is less than --regions 2" in capsys.readouterr().err


def test_a_batch_lasts_as_long_as_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = [10.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("time.sleep", slept.append)
    pace = demo.Pace(0.1, [1, 4])
    for rank, computed in ((0, 0.03), (1, 0.03), (2, 0.03), (0, 0.2)):
        trainer = SimpleNamespace(global_rank=rank)
        pace.on_train_batch_start(trainer, None, None, 0)
        now[0] += computed
        pace.on_train_batch_end(trainer, None, None, None, 0)
    assert slept == pytest.approx([0.07, 0.37, 0.07, 0])


@pytest.mark.slow
def test_two_workers_of_two_processes_train_one_model(example: Example) -> None:
    options = ["--strategy", "halos", "--worker", "2", "--pace", "0", "--max-steps", "60", "--val-every", "30"]
    results = example("train_char_lm.py", *options, processes=4)
    assert_same_model(results)
    for first, second in (results[:2], results[2:]):
        assert first["local_steps"] == second["local_steps"], "the processes of a worker are in step"
    assert results[0]["local_steps"] + results[2]["local_steps"] >= 2 * 60
    start = math.log(256)  # nats per byte of a model that knows nothing
    assert all(result["metrics"]["val_loss"] < 0.75 * start for result in results)
