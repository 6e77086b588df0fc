"""Regions that come and go: a server and jobs of two workers, each of which is killed, stopped or late."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.harness import free_port
from tests.star import roles
from tests.star.deciding import deciding_region, held_out_loss
from tests.star.processes import Starter, wait_until
from tests.star.roles import Task
from tests.star.star import PREEMPTED, Job, Server, Star

LIMIT = 120
SLOW = 0.15
"""Seconds for a batch that leave the slowest machine time for what has to happen before the end of a run."""


def batches(star: Star, name: str) -> int:
    """How many batches the workers of a region have trained on."""
    return sum(len(path.read_text().splitlines()) for path in star.evidence.glob(f"{name}-*.batches"))


def journal(star: Star, kind: str) -> list[dict[str, Any]]:
    path = star.evidence / "journal"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["kind"] == kind]


def kill(party: Job | Server) -> None:
    for pid in party.pids():
        os.kill(pid, signal.SIGKILL)
    wait_until(party.has_ended, 10)


def test_a_run_survives_late_regions_killed_regions_and_a_killed_server(starter: Starter, tmp_path: Path) -> None:
    task = Task(epochs=3, samples=1536, pause=SLOW)
    port = free_port()
    star = Star(starter, tmp_path / "star", task, ["localhost"], ["us", "eu", "late"])
    server = star.server("--min-regions", "2", listen=f"127.0.0.1:{port}")
    us, eu, late = jobs = [star.job(name, f"localhost:{port}") for name in star.regions]
    for party in (server, us, eu):
        party.start()
    wait_until(lambda: batches(star, "us") > 20 and batches(star, "eu") > 20, LIMIT, starter.logs)
    late.start()
    wait_until(lambda: batches(star, "late") > 10, LIMIT, starter.logs)
    kill(server)
    before = batches(star, "eu")
    wait_until(lambda: batches(star, "eu") > before + 10, LIMIT, starter.logs)
    server.start()
    wait_until(lambda: starter.log("us-0").count("is connected again") == 1, LIMIT, starter.logs)
    kill(us)  # it decides, because it was the first
    us.start()
    star.hurry()
    evidence = star.wait(server, jobs, LIMIT)
    workers = [worker for job in jobs for worker in job.workers]
    model = evidence.assert_same_model(workers)
    final = torch.load(star.directory / "final.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(final[name], tensor) for name, tensor in model.items())
    evidence.assert_same_step(workers, task.steps // 4)  # the two regions that the run began with have 4 workers
    uses = Counter(sample for batch in evidence.batches for sample in batch.samples)
    assert min(uses[sample] for sample in range(task.samples)) >= task.epochs
    # What us had not sent in an update that is on the server's disk when it was killed is trained on again.
    assert sum(uses.values()) < (task.epochs + 0.5) * task.samples


def test_jobs_of_a_finished_run_get_its_final_model_when_it_is_served_again(starter: Starter, tmp_path: Path) -> None:
    port = free_port()
    star = Star(starter, tmp_path / "star", Task(epochs=1, samples=256, pause=0), ["localhost"], ["us", "eu"])
    # So long the server of a finished run waits for jobs that return, on the busiest machine.
    server = star.server("--min-regions", "2", "--liveness", "10", listen=f"127.0.0.1:{port}")
    jobs = [star.job(name, f"localhost:{port}") for name in star.regions]
    for _ in range(2):
        for path in star.evidence.glob("*.pt"):
            path.unlink()
        for party in (server, *jobs):
            party.start()
        evidence = star.wait(server, jobs, LIMIT)
    model = evidence.assert_same_model([worker for job in jobs for worker in job.workers])
    final = torch.load(star.directory / "final.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(final[name], tensor) for name, tensor in model.items())
    assert len(evidence.batches) == star.task.steps  # nobody trained again
    assert "is dialed again" not in starter.logs()
    assert "is lost" not in starter.log("server")


def test_one_job_decides_and_the_next_goes_on_with_what_its_callbacks_know(
    starter: Starter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roles, "region", deciding_region)
    task = Task(epochs=4, samples=1536, pause=0.06)
    port = free_port()
    star = Star(starter, tmp_path / "star", task, ["localhost"], ["us", "eu"])
    server = star.server("--min-regions", "2", listen=f"127.0.0.1:{port}")
    us, eu = jobs = [star.job(name, f"localhost:{port}") for name in star.regions]
    server.start()
    us.start()
    wait_until(lambda: "us (" in starter.log("server"), LIMIT, starter.logs)
    eu.start()
    wait_until(lambda: len(journal(star, "validated")) > 2, LIMIT, starter.logs)
    us.terminate()
    wait_until(us.has_ended, LIMIT, starter.logs)
    assert us.codes() == [PREEMPTED, PREEMPTED]
    wait_until(lambda: journal(star, "validated")[-1]["region"] == "eu", LIMIT, starter.logs)
    us.start()
    wait_until(lambda: len(journal(star, "begin")) == 6, LIMIT, starter.logs)
    star.hurry()
    evidence = star.wait(server, jobs, LIMIT)
    final = evidence.assert_same_model([worker for job in jobs for worker in job.workers])
    evidence.assert_used_once(task.epochs, task.samples)
    validated = journal(star, "validated")
    steps = [line["step"] for line in validated]
    regions = [line["region"] for line in validated]
    assert regions == ["us"] * regions.count("us") + ["eu"] * regions.count("eu")
    # None is done twice. Several that fall due at once, on a busy machine or while nobody decides, are one.
    *numbers, last = [step // 20 for step in steps]
    handover = regions.index("eu")
    assert numbers == sorted(set(numbers))
    assert numbers[-1] <= last == task.steps // 4 // 20  # of which the last validation may be a part
    assert {step % 20 for step in (*steps[:handover], *steps[handover + 1 : -1])} == {0}
    assert [line["rank"] for line in validated] == [0] * len(validated)
    # The patience of EarlyStopping begins with the second validation, in us, and goes on in eu.
    assert [line["waited"] for line in validated] == [0, *range(len(validated) - 1)]
    # A job that joins late is at once where the run is, and so are its schedulers.
    begins = journal(star, "begin")
    assert [line["step"] == line["scheduled"] for line in begins] == [True] * 6
    late = [line for line in begins if line["step"] > 0]
    assert [line["region"] for line in late] == ["us", "us"]
    assert late[0]["step"] >= validated[regions.index("eu")]["step"]
    assert late[0]["epoch"] in (late[0]["step"] * task.epochs // (task.steps // 4) + ahead for ahead in (0, 1))
    ends = journal(star, "end")
    assert len(ends) == 4
    assert {line["estimate"] for line in ends} == {task.steps // 4}
    known = {line["region"]: line["loss"] for line in ends}
    assert known["eu"] == validated[-1]["loss"]
    assert known["us"] in [line["loss"] for line in validated if line["region"] == "eu"]
    # Each validation but the first lowers the rate to a tenth.
    assert max(line["rate"] for line in ends) < 1e-4
    assert sorted(path.name for path in (star.evidence / "checkpoints-us").iterdir())
    assert sorted(path.name for path in (star.evidence / "checkpoints-eu").iterdir())
    # The best file is where it was saved. A job that has none tests the final model.
    tested = {name: [line for line in journal(star, "tested") if line["region"] == name] for name in star.regions}
    assert [len(lines) for lines in tested.values()] == [4, 4]
    assert all(line["loss"] == pytest.approx(min(known["loss"] for known in validated)) for line in tested["eu"])
    assert all(line["loss"] == pytest.approx(held_out_loss(final)) for line in tested["us"])
    assert starter.log("us-0").count("trainer.test() takes the model in memory") == 2
    assert "takes the model in memory" not in starter.log("us-1") + starter.log("eu-0")
