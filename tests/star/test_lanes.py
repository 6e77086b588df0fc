"""Jobs whose workers have different numbers of processes train together: the global server knows no lanes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

from tests.integration.harness import free_port
from tests.star.processes import Starter, wait_until
from tests.star.roles import Task
from tests.star.star import Star
from tests.star.test_members import SLOW, batches

LIMIT = 120.0


def test_jobs_with_one_and_with_two_processes_per_worker_train_one_model(starter: Starter, tmp_path: Path) -> None:
    """The server is killed and comes back meanwhile, and then a process of a worker dies: its job is lost as one.

    The workers train on while their pushes are answered, and all links carry int8.
    """
    port = free_port()
    task = Task(epochs=3, samples=1536, pause=SLOW, overlap=1, wire="int8", width=1024)
    star = Star(starter, tmp_path / "star", task, ["localhost"], ["us", "eu"])
    server = star.server("--min-regions", "1", "--liveness", "5", listen=f"127.0.0.1:{port}")
    us, _ = jobs = [star.job("us", f"localhost:{port}", worker=2), star.job("eu", f"localhost:{port}")]
    for party in (server, *jobs):
        party.start()
    wait_until(lambda: batches(star, "us") > 40 and batches(star, "eu") > 20, LIMIT, starter.logs)
    os.kill(server.pids()[0], signal.SIGKILL)
    wait_until(server.has_ended, LIMIT)
    server.start()
    wait_until(lambda: "is connected again" in starter.log("us-0"), LIMIT, starter.logs)
    os.kill(us.pids()[3], signal.SIGKILL)
    wait_until(us.has_ended, LIMIT, starter.logs)
    before = batches(star, "us")
    us.start()
    wait_until(lambda: batches(star, "us") > before, LIMIT, starter.logs)  # it trains again before the run ends
    star.hurry()
    evidence = star.wait(server, jobs, LIMIT)
    model = evidence.assert_same_model([process for job in jobs for process in job.workers])
    final = torch.load(star.directory / "final.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(final[name], tensor) for name, tensor in model.items())
    snapshot = torch.load(max(star.directory.glob("snapshot-*.pt")), weights_only=True)
    counters = [member["counters"] for member in snapshot["members"]]
    sent, merges = (sum(counts[name] for counts in counters) for name in ("bytes_between_regions", "merges"))
    in_float32 = 2 * 4 * sum(tensor.numel() for tensor in model.values())  # an update and the answer
    # The first model on each connection and a region's last update are complete.
    assert 0 < sent < 0.5 * in_float32 * merges, counters
