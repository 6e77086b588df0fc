"""The server moves to another machine: its directory is copied, and its name gets another address."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.integration.harness import free_port
from tests.star import roles
from tests.star.moving import FILE, HOST, moving_region
from tests.star.processes import Starter, wait_until
from tests.star.roles import Task
from tests.star.star import PREEMPTED, Star
from tests.star.test_members import LIMIT, SLOW, batches

HERE, THERE = "127.0.0.2", "127.0.0.3"


def test_regions_find_a_server_that_has_moved_by_its_name_and_the_run_ends_as_ordered(
    starter: Starter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roles, "region", moving_region)
    task, port = Task(pause=SLOW), free_port()
    star = Star(starter, tmp_path / "star", task, [HOST], ["us", "eu"])
    address = star.evidence / FILE
    address.write_text(HERE)
    server = star.server("--min-regions", "2", listen=f"{HERE}:{port}")
    jobs = [star.job(name, f"{HOST}:{port}") for name in star.regions]
    for party in (server, *jobs):
        party.start()
    wait_until(lambda: all(batches(star, name) > 20 for name in star.regions), LIMIT, starter.logs)

    server.terminate()
    wait_until(server.has_ended, LIMIT, starter.logs)
    assert server.codes() == [PREEMPTED]
    machine = tmp_path / "another machine"
    shutil.copytree(star.directory, machine / "run")
    shutil.copy(star.keys / "server.pem", machine)
    shutil.rmtree(star.directory)
    moved = star.server(
        *("--min-regions", "2", "--directory", str(machine / "run"), "--keys", str(machine / "server.pem")),
        listen=f"{THERE}:{port}",
    )
    moved.start()
    wait_until(lambda: f"listens on {THERE}:{port}" in starter.log("server"), LIMIT, starter.logs)
    wait_until(lambda: f"{HERE}:{port}" in starter.log("us-0"), LIMIT, starter.logs)  # where it looks in vain
    address.write_text(THERE)
    star.hurry()

    evidence = star.wait(moved, jobs, LIMIT)
    workers = [worker for job in jobs for worker in job.workers]
    evidence.assert_used_once(task.epochs, task.samples)
    evidence.assert_same_step(workers, task.steps // len(workers))
    model = evidence.assert_same_model(workers)
    final = torch.load(machine / "run" / "final.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(final[name], tensor) for name, tensor in model.items())
    assert "goes on from global step" in starter.log("server")
    assert not star.directory.exists()
    for name in star.regions:
        assert starter.log(f"{name}-0").count("is connected again") == 1
