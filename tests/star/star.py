"""A star of jobs for tests: its keys, its server and its region jobs of two workers, started and watched.

Where the processes run, ``network`` and ``processes`` know; what they have to have done at the end, ``evidence``.
"""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass, field
from pathlib import Path

from lightning_halos import cli
from tests.integration.harness import free_port
from tests.star import roles
from tests.star.evidence import Evidence
from tests.star.hand import _signal
from tests.star.network import Place
from tests.star.processes import Process, Starter, wait_until
from tests.star.roles import Task

WORKERS = 2
PREEMPTED = 128 + signal.SIGTERM


@dataclass
class Job:
    """A region's job: two workers, started as torchrun or SLURM would start them. A party that the hand may strike.

    Attributes:
        name: Of the region, which is that of its certificate.
        star: To which it belongs.
        address: The server's, as this region sees it.
        place: Where it runs; this machine's own network by default.
        ranks: Its present processes.
        codes: Exit codes of all processes that have ended, in order of their starts.
    """

    name: str
    star: Star
    address: str
    place: Place | None = None
    ranks: list[Process] = field(default_factory=list)
    lives: list[list[Process]] = field(default_factory=list)

    def start(self) -> None:
        shared = {
            **self.star.task.environment(),
            "HALOS_SERVER": self.address,
            "HALOS_KEYS": str(self.star.keys / f"{self.name}.pem"),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        self.ranks = [
            self.star.starter.start(
                roles.region,
                str(self.star.evidence),
                self.name,
                name=f"{self.name}-{rank}",
                place=self.place,
                environment={**shared, "LOCAL_RANK": str(rank)},
            )
            for rank in range(WORKERS)
        ]
        self.lives.append(self.ranks)

    def pids(self) -> list[int]:
        return [rank.pid for rank in self.ranks if rank.code is None]

    def terminate(self) -> None:
        _signal(self.pids(), signal.SIGTERM)

    def cut(self) -> None:
        assert self.place is not None
        self.place.cut()

    def unplug(self) -> None:
        assert self.place is not None
        self.place.unplug()

    def mend(self) -> None:
        assert self.place is not None
        self.place.mend()

    def codes(self) -> list[int | None]:
        """Exit codes of the present life."""
        return [rank.code for rank in self.ranks]

    def is_done(self) -> bool:
        return self.codes() == [0] * WORKERS

    def has_ended(self) -> bool:
        return None not in self.codes()

    @property
    def workers(self) -> list[str]:
        return [f"{self.name}-{rank}" for rank in range(WORKERS)]


@dataclass
class Server:
    """``lightning-halos serve``. A party that the hand may strike."""

    star: Star
    listen: str
    options: list[str]
    place: Place | None = None
    process: Process | None = None

    def start(self) -> None:
        self.process = self.star.starter.start(
            roles.serve,
            *("--listen", self.listen),
            *("--keys", str(self.star.keys / "server.pem")),
            *("--directory", str(self.star.directory)),
            *self.options,
            name="server",
            place=self.place,
        )

    def pids(self) -> list[int]:
        return [self.process.pid] if self.process is not None and self.process.code is None else []

    def terminate(self) -> None:
        _signal(self.pids(), signal.SIGTERM)

    def cut(self) -> None:
        assert self.place is not None
        self.place.cut()

    def unplug(self) -> None:
        assert self.place is not None
        self.place.unplug()

    def mend(self) -> None:
        assert self.place is not None
        self.place.mend()

    def is_done(self) -> bool:
        return self.process is not None and self.process.code == 0

    def has_ended(self) -> bool:
        return not self.pids()


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
        return Server(self, listen, list(options), place)

    def job(self, name: str, address: str, place: Place | None = None) -> Job:
        return Job(name, self, address, place)

    def wait(self, server: Server, jobs: list[Job], limit: float) -> Evidence:
        """Waits until all have ended with 0, and no process is left. Returns what the workers wrote."""
        parties = [server, *jobs]
        wait_until(lambda: all(party.has_ended() for party in parties), limit, self.starter.logs)
        assert all(party.is_done() for party in parties), self.starter.logs()
        wait_until(lambda: not self.starter.left(), 5, lambda: f"left: {self.starter.left()}")
        return Evidence.read(self.evidence)

    def hides_keys(self) -> bool:
        """Whether no log shows a private key."""
        return not re.search(r"PRIVATE KEY", self.starter.logs(last=10**9)) and "HALOS_KEYS" not in os.environ
