"""Jobs whose workers have different numbers of processes train together: the global server knows no lanes."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.integration.harness import free_port
from tests.star.processes import Starter
from tests.star.roles import Task
from tests.star.star import Star

LIMIT = 120.0


def test_jobs_with_one_and_with_two_processes_per_worker_train_one_model(starter: Starter, tmp_path: Path) -> None:
    port = free_port()
    star = Star(starter, tmp_path / "star", Task(epochs=2, samples=512), ["localhost"], ["us", "eu"])
    server = star.server("--min-regions", "2", "--liveness", "5", listen=f"127.0.0.1:{port}")
    jobs = [star.job("us", f"localhost:{port}", worker=2), star.job("eu", f"localhost:{port}")]
    for party in (server, *jobs):
        party.start()
    evidence = star.wait(server, jobs, LIMIT)
    model = evidence.assert_same_model([process for job in jobs for process in job.workers])
    final = torch.load(star.directory / "final.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(final[name], tensor) for name, tensor in model.items())
