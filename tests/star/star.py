"""A star of jobs for tests: its keys, its server and its region jobs of two workers, started and watched.

Where the processes run, ``network`` and ``processes`` know; what they have to have done at the end, ``evidence``.
"""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_halos import cli
from lightning_halos.serving.inquiry import ask_status
from tests.integration.harness import free_port
from tests.star import roles
from tests.star.evidence import Evidence
from tests.star.network import Place
from tests.star.processes import Party, Process, Starter, wait_until
from tests.star.roles import Task

WORKERS = 2
PREEMPTED = 128 + signal.SIGTERM


class Job(Party):
    """A region's job: two workers, whose processes are started as torchrun or SLURM would start them.

    Args:
        star: To which it belongs.
        name: Of the region, which is that of its certificate.
        address: The server's, as this region sees it.
        place: Where it runs; this machine's own network by default.
        worker: Number of processes of a worker.

    Attributes:
        address: The server's.
        workers: Names of its processes.
    """

    def __init__(self, star: Star, name: str, address: str, place: Place | None = None, worker: int = 1) -> None:
        super().__init__(place)
        self._worker = worker
        self._star = star
        self.address = address
        self.name = name
        self.workers = [f"{name}-{rank}" for rank in range(WORKERS * worker)]

    def launch(self) -> list[Process]:
        shared = {
            **self._star.task.environment(),
            "HALOS_SERVER": self.address,
            "HALOS_KEYS": str(self._star.keys / f"{self.name}.pem"),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "TASK_WORKER": str(self._worker),
        }
        return [
            self._star.starter.start(
                roles.region,
                str(self._star.evidence),
                self.name,
                name=worker,
                place=self.place,
                environment={**shared, "LOCAL_RANK": str(rank)},
            )
            for rank, worker in enumerate(self.workers)
        ]


class Server(Party):
    """``lightning-halos serve``.

    Args:
        star: To which it belongs.
        listen: Where it listens.
        options: Further arguments of the command.
        place: Where it runs; this machine's own network by default.
    """

    def __init__(self, star: Star, listen: str, options: tuple[str, ...], place: Place | None = None) -> None:
        super().__init__(place)
        self._star = star
        self._listen = listen
        self._options = options

    def launch(self) -> list[Process]:
        files = ["--keys", str(self._star.keys / "server.pem"), "--directory", str(self._star.directory)]
        arguments = ["--listen", self._listen, *files, *self._options]
        return [self._star.starter.start(roles.serve, *arguments, name="server", place=self.place)]


@dataclass
class Star:
    """A server and its region jobs.

    Attributes:
        starter: Starts its processes.
        folder: Where its keys, the server's directory and the workers' evidence are.
        task: What it trains.
        hosts: Names and addresses in the server's certificate.
        regions: Names of the regions that get keys.
    """

    starter: Starter
    folder: Path
    task: Task
    hosts: list[str]
    regions: list[str]

    def __post_init__(self) -> None:
        self.evidence.mkdir(parents=True)
        hosts = [word for host in self.hosts for word in ("--host", host)]
        assert cli.main(["keys", "init", str(self.keys), *hosts]) == 0
        for name in self.regions:
            self.make_keys(name)

    def make_keys(self, name: str) -> None:
        """Makes a region's keys."""
        assert cli.main(["keys", "region", str(self.keys), name]) == 0

    @property
    def keys(self) -> Path:
        return self.folder / "keys"

    @property
    def directory(self) -> Path:
        return self.folder / "run"

    @property
    def evidence(self) -> Path:
        return self.folder / "evidence"

    def server(self, *options: str, listen: str, place: Place | None = None) -> Server:
        return Server(self, listen, options, place)

    def job(self, name: str, address: str, place: Place | None = None, worker: int = 1) -> Job:
        return Job(self, name, address, place, worker)

    def status(self, job: Job) -> dict[str, Any]:
        """What the server says of the run to a job."""
        found: dict[str, Any] = json.loads(ask_status(job.address, self.keys / f"{job.name}.pem", timeout=30.0))
        return found

    def wait(self, server: Server, jobs: list[Job], limit: float) -> Evidence:
        """Waits until all have ended with 0, and no process is left. Returns what the workers wrote."""
        parties: list[Party] = [server, *jobs]
        wait_until(lambda: all(party.has_ended() for party in parties), limit, self.starter.logs)
        assert all(party.is_done() for party in parties), self.starter.logs()
        wait_until(lambda: not self.starter.left(), 30, lambda: f"left: {self.starter.left()}")
        return Evidence.read(self.evidence)

    def hurry(self) -> None:
        """Lets all train as fast as they can, because nothing more has to happen before the end."""
        (self.evidence / roles.HURRY).touch()

    def assert_counters_add_up(self, evidence: Evidence) -> int:
        """The server's last snapshot agrees with what the workers wrote. Returns the global step."""
        snapshot = torch.load(max(self.directory.glob("snapshot-*.pt")), weights_only=True)
        assert snapshot["state"] == "finished"
        assert list(snapshot["done"]) == [(0, self.task.steps)]
        # A repeated batch is a step, too, if its first time counted. It does not if it was lost with its worker.
        again = snapshot["total"] - self.task.steps
        repeated = len(evidence.batches) - evidence.useful_steps()
        assert 0 <= again <= repeated, f"{again} steps too many, {repeated} batches repeated"
        assert not any(member["counters"]["rejected"] for member in snapshot["members"])
        return int(snapshot["total"]) // int(snapshot["workers"])

    def assert_keys_are_hidden(self) -> None:
        """No log shows a private key."""
        assert "PRIVATE KEY" not in self.starter.logs(last=10**9)
