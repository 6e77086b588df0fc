"""What a job hears from the server when it cannot take part, and the error that it ends with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.integration.harness import free_port
from tests.star.processes import Starter, wait_until
from tests.star.roles import Task
from tests.star.star import Star
from tests.star.test_members import LIMIT, batches, kill

TASK = Task(epochs=100)  # longer than any test


def test_a_second_job_with_the_same_key_is_told_at_once_and_ends_after_its_timeout(
    starter: Starter, tmp_path: Path
) -> None:
    """One whose predecessor was killed gets in: see ``test_members``."""
    port = free_port()
    star = Star(starter, tmp_path / "star", TASK, ["localhost"], ["us", "eu"])
    server = star.server("--min-regions", "2", listen=f"127.0.0.1:{port}")
    us, eu = (star.job(name, f"localhost:{port}") for name in star.regions)
    for party in (server, us, eu):
        party.start()
    wait_until(lambda: batches(star, "us") > 0 and batches(star, "eu") > 0, LIMIT, starter.logs)
    star.task = replace(TASK, timeout=5.0)
    double = star.job("us", f"localhost:{port}")
    double.workers = ["double-0", "double-1"]
    double.start()
    wait_until(lambda: "is present already" in starter.log("double-0"), LIMIT, starter.logs)
    told = starter.log("double-0")
    assert "refuses this job now: us is present already, from 127.0.0.1:" in told
    assert "stop one of them, or give it a key of its own." in told
    assert "It is asked again for up to 5 s." in told
    wait_until(double.has_ended, LIMIT, starter.logs)
    assert double.codes() == [1, 1]
    for worker in double.workers:
        assert "has refused this job for timeout=5 s: us is present already" in starter.log(worker), starter.logs()
    for misleading in ("connection with the global server is lost", "is connected again", "waits for the other"):
        assert misleading not in starter.log("double-0")
    assert "us is present already, from 127.0.0.1:" in starter.log("server")

    before = batches(star, "us")
    wait_until(lambda: batches(star, "us") > before, LIMIT, starter.logs)  # the first one trains on


def test_jobs_end_with_the_reason_when_the_server_gives_up(starter: Starter, tmp_path: Path) -> None:
    """They do not dial it until their own limit."""
    port = free_port()
    star = Star(starter, tmp_path / "star", TASK, ["localhost"], ["us", "eu"])
    server = star.server("--min-regions", "2", "--timeout", "1", listen=f"127.0.0.1:{port}")
    us, eu = (star.job(name, f"localhost:{port}") for name in star.regions)
    for party in (server, us, eu):
        party.start()
    wait_until(lambda: batches(star, "us") > 0 and batches(star, "eu") > 0, LIMIT, starter.logs)
    kill(eu)
    wait_until(server.has_ended, LIMIT, starter.logs)
    assert server.codes() == [1]
    wait_until(us.has_ended, LIMIT, starter.logs)
    assert us.codes() == [1, 1]
    reason = "has given up: Fewer than 2 regions took part for longer than 1 s, so the server ends."
    for worker in us.workers:
        assert reason in starter.log(worker), starter.logs()
