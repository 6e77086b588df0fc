"""Who may end a run before its time, and where a job goes on that starts from a checkpoint or joins late."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from tests.integration.harness import free_port
from tests.star import roles, stopping
from tests.star.processes import Starter, wait_until
from tests.star.roles import Task, samples
from tests.star.star import Job, Server, Star
from tests.star.stopping import CHECKPOINT, RATE, STOP, STOP_EARLY, Scheduled, fading, one_cycle
from tests.star.test_members import LIMIT, batches

TASK = Task(epochs=10, samples=9600)  # more than it trains before it is stopped
STEPS = TASK.steps // 2  # global steps: a run begins with the two workers of one region


def begins(star: Star, name: str) -> list[dict[str, Any]]:
    """How the processes of a region began, in order of time."""
    path = star.evidence / "begins"
    lines = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    return [line for line in lines if line["worker"].startswith(name)]


def begin_of(star: Star, worker: str) -> dict[str, Any]:
    """The weights with which a worker's last process began."""
    loaded: dict[str, Any] = torch.load(star.evidence / f"{worker}.begin", weights_only=True)
    return loaded


def weights(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, weights_only=True)["state_dict"]
    return loaded


def is_same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first | second)


def make(starter: Starter, folder: Path, *names: str) -> tuple[Star, Server, list[Job]]:
    port = free_port()
    star = Star(starter, folder, TASK, ["localhost"], list(names))
    server = star.server("--liveness", "5", listen=f"127.0.0.1:{port}")
    return star, server, [star.job(name, f"localhost:{port}") for name in names]


def scheduled(kind: Any, step: int) -> tuple[float, float]:
    """The rate and the beta at a global step, in a training of one process."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    schedule = kind(optimizer, STEPS)
    for _ in range(step):
        optimizer.step()
        schedule.step()
    return optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][0]


def test_jobs_start_from_a_checkpoint_join_late_leave_and_stop_the_run(
    starter: Starter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roles, "region", stopping.stopping_region)

    # A run of one region saves checkpoints, until a worker of the region, which decides, sets trainer.should_stop.
    star, server, (us,) = make(starter, tmp_path / "first", "us")
    checkpoint = star.evidence / "checkpoints-us" / "last.ckpt"
    server.start()
    us.start()
    wait_until(checkpoint.exists, LIMIT, starter.logs)
    (star.evidence / STOP.format("us-1")).touch()
    evidence = star.wait(server, [us], LIMIT)
    stopped = evidence.assert_same_model(us.workers)
    assert is_same(stopped, weights(star.directory / "final.ckpt"))
    assert len(evidence.batches) < TASK.steps
    assert [line["step"] for line in begins(star, "us")] == [0, 0]
    first = checkpoint

    # A checkpoint of a run of jobs is one of Lightning's: a training of one process goes on from it.
    step = torch.load(first, weights_only=True)["global_step"]
    assert step > 0
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=TASK.epochs, max_steps=step + 1, accelerator="cpu", logger=False, **quiet)
    trainer.fit(Scheduled(0.0, tmp_path), DataLoader(samples(TASK.samples), TASK.batch), ckpt_path=first)
    assert trainer.global_step == step + 1

    # A new run begins with the weights of the first job's checkpoint, at global step 0.
    star, server, (us, eu) = make(starter, tmp_path / "second", "us", "eu")
    shutil.copy(first, star.evidence / CHECKPOINT)
    server.start()
    us.start()
    wait_until(lambda: len(begins(star, "us")) == 2 and batches(star, "us") > 20, LIMIT, starter.logs)
    assert [line["step"] for line in begins(star, "us")] == [0, 0]
    assert is_same(begin_of(star, "us-0"), weights(first))
    assert is_same(begin_of(star, "us-1"), weights(first))
    wait_until(lambda: star.status(us)["run"]["version"] > 0, LIMIT, starter.logs)

    # A job that joins it later has the same script, and gets the run's model and position instead.
    eu.start()
    wait_until(lambda: len(begins(star, "eu")) == 2 and batches(star, "eu") > 10, LIMIT, starter.logs)
    assert "only its weights are used, and only if the run is new" in starter.log("eu-0")
    assert not is_same(begin_of(star, "eu-0"), weights(first))
    for line in begins(star, "eu"):
        assert line["step"] > 0
        kind = one_cycle if line["worker"] == "eu-0" else fading
        assert (line["rate"], line["beta"]) == pytest.approx(scheduled(kind, line["step"])), line

    # It does not decide, so it leaves if one of its workers sets trainer.should_stop, and the run goes on.
    (star.evidence / STOP.format("eu-1")).touch()
    wait_until(eu.has_ended, LIMIT, starter.logs)
    assert eu.codes() == [0, 0]
    assert "eu leaves the run." in starter.log("server")
    before = batches(star, "us")
    wait_until(lambda: batches(star, "us") > before + 10, LIMIT, starter.logs)
    assert not server.has_ended()

    # The deciding job's EarlyStopping stops the run for all.
    (star.evidence / STOP.format("eu-1")).unlink()
    before = batches(star, "eu")
    eu.start()
    wait_until(lambda: batches(star, "eu") > before + 10, LIMIT, starter.logs)
    (star.evidence / STOP_EARLY).touch()
    evidence = star.wait(server, [us, eu], LIMIT)
    workers = [*us.workers, *eu.workers]
    assert is_same(evidence.assert_same_model(workers), weights(star.directory / "final.ckpt"))
    assert len({evidence.results[worker]["global_step"] for worker in workers}) == 1
    assert len(evidence.batches) < TASK.steps
