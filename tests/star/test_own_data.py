"""Regions whose workers do not share data: each reads its own, ``max_epochs`` times."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch

from lightning_halos import cli
from tests.integration.harness import free_port
from tests.star import own_data, roles
from tests.star.evidence import Evidence
from tests.star.processes import Starter, wait_until
from tests.star.roles import Task
from tests.star.star import Star
from tests.star.test_members import LIMIT

TASK = Task(epochs=3, samples=96)
BATCHES = TASK.samples // TASK.batch  # of an epoch of a worker


def test_a_late_job_and_one_that_returns_train_the_rest_of_the_epochs(
    starter: Starter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(roles, "region", own_data.own_data_region)
    port = free_port()
    star = Star(starter, tmp_path / "star", TASK, ["localhost"], ["us", "eu"])
    server = star.server("--workers", "4", listen=f"127.0.0.1:{port}")
    us, eu = jobs = [star.job(name, f"localhost:{port}") for name in star.regions]

    def steps_of_us() -> int:
        """Those that the server knows."""
        capsys.readouterr()
        where = ["--server", f"localhost:{port}", "--keys", str(star.keys / "us.pem")]
        assert cli.main(["status", *where, "--json"]) == 0
        return int(json.loads(capsys.readouterr().out)["members"]["us"]["steps"])

    def trained(name: str) -> Counter[tuple[str, int]]:
        """Batches of each process in each epoch."""
        return Counter(
            (batch.worker, batch.epoch) for batch in Evidence.read(star.evidence).batches if name in batch.worker
        )

    server.start()
    us.start()
    # Both workers have trained for two epochs, and wait at the gate. The server knows of all rounds but the last ones.
    wait_until(lambda: sum(trained("us").values()) == 4 * BATCHES, LIMIT, starter.logs)
    wait_until(lambda: steps_of_us() >= 4 * BATCHES - 2 * TASK.local_steps, LIMIT, starter.logs)
    eu.start()
    wait_until(lambda: sum(trained("eu").values()) == 2 * BATCHES, LIMIT, starter.logs)
    assert {epoch for _, epoch in trained("eu")} == {1}
    for pid in eu.pids():
        os.kill(pid, signal.SIGKILL)
    wait_until(eu.has_ended, LIMIT)
    eu.start()
    wait_until(lambda: sum(trained("eu").values()) == 4 * BATCHES, LIMIT, starter.logs)
    assert {epoch for _, epoch in trained("eu")} == {1}
    (star.evidence / own_data.GATE).touch()
    evidence = star.wait(server, jobs, LIMIT)
    assert list(trained("us").values()) == [BATCHES] * 6
    assert Counter(epoch for _, epoch in trained("eu")) == {1: 4, 2: 2}  # processes
    model = evidence.assert_same_model([worker for job in jobs for worker in job.workers])
    final = torch.load(star.directory / "final.ckpt", weights_only=True)
    assert all(torch.equal(final["state_dict"][name], tensor) for name, tensor in model.items())
    assert {result["epoch"] for result in evidence.results.values()} == {TASK.epochs}
    assert final["epoch"] == TASK.epochs - 1
