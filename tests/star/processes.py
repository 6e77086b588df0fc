"""Starts the processes of a star of jobs, in the network namespaces where they belong, and watches them.

A process is either forked from a server that has imported everything already, which takes a tenth of a second, or
started as a script. Nothing outlives :func:`ending`. What the processes do is in ``roles``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tests.groups import is_left, kill_group
from tests.star import network
from tests.star.network import Place

ROOT = Path(__file__).parents[2]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


class Process(Protocol):
    """A process that leads a group of its own."""

    pid: int

    @property
    def code(self) -> int | None:
        """Its exit code, negative if it was a signal; ``None`` as long as it runs."""

    def wait(self, limit: float) -> int | None:
        """Its exit code; ``None`` if it still runs after ``limit`` seconds."""


class _Spawned:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.pid = process.pid

    @property
    def code(self) -> int | None:
        return self._process.poll()

    def wait(self, limit: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(limit)
        return self.code


class _Forked:
    def __init__(self, process: Any) -> None:
        self._process = process
        self.pid = process.pid

    @property
    def code(self) -> int | None:
        return self._process.exitcode  # type: ignore[no-any-return]

    def wait(self, limit: float) -> int | None:
        self._process.join(limit)
        return self.code


@dataclass
class Starter:
    """Starts processes, and knows all that it started.

    Attributes:
        folder: Where their logs are, one for each name.
        as_scripts: Whether they are started as scripts; else they are forked.
        started: All processes so far.
    """

    folder: Path
    as_scripts: bool = False
    started: list[Process] = field(default_factory=list)

    def start(
        self,
        role: Callable[..., None],
        *arguments: str,
        name: str,
        place: Place | None = None,
        environment: dict[str, str] | None = None,
    ) -> Process:
        """Starts ``role(*arguments)``.

        Args:
            role: A function of ``roles``.
            arguments: Its arguments.
            name: Of the file with what it prints, to which it is appended.
            place: Where it runs; this machine's own network by default.
            environment: What to set in its environment.
        """
        variables = {**(environment or {}), "OMP_NUM_THREADS": "1"}
        if self.as_scripts:
            return self.spawn(
                sys.executable, "-m", role.__module__, role.__name__, *arguments,
                name=name, place=place, environment=variables,
            )  # fmt: skip
        namespace = place.namespace if place else ""
        forked = _context.Process(target=_work, args=(role, arguments, self.log_of(name), namespace, variables))
        forked.start()
        process = _Forked(forked)
        self.started.append(process)
        return process

    def spawn(
        self, *command: str, name: str, place: Place | None = None, environment: dict[str, str] | None = None
    ) -> Process:
        """Starts a command. The arguments are those of :meth:`start`."""
        inside = ["ip", "netns", "exec", place.namespace] if place else []
        with self.log_of(name).open("ab") as log:
            process = _Spawned(
                subprocess.Popen(
                    [*inside, *command],
                    env={**os.environ, **(environment or {})},
                    cwd=ROOT,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
        self.started.append(process)
        return process

    def log_of(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def log(self, name: str) -> str:
        """What the processes of that name have printed."""
        path = self.log_of(name)
        return path.read_text(errors="replace") if path.exists() else ""

    def logs(self, last: int = 3000) -> str:
        """The end of every log, for the message of a failed test."""
        paths = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {path.stem}\n{path.read_text(errors='replace')[-last:]}" for path in paths)

    def left(self) -> list[int]:
        """Process groups whose first process has ended, and that still have others."""
        return [process.pid for process in self.started if process.code is not None and is_left(process.pid)]


class Party:
    """A server or a job, whose processes live and die together; ``hand`` may strike it.

    Attributes:
        place: Where it runs; this machine's own network if ``None``.
        processes: Those of its present life.
    """

    def __init__(self, place: Place | None = None) -> None:
        self.place = place
        self.processes: list[Process] = []

    def start(self) -> None:
        """Starts it (again). Waits for nothing."""
        self.processes = self.launch()

    def launch(self) -> list[Process]:
        """Starts its processes."""
        raise NotImplementedError

    def codes(self) -> list[int | None]:
        """Exit codes of the present life."""
        return [process.code for process in self.processes]

    def pids(self) -> list[int]:
        """Its processes that run."""
        return [process.pid for process in self.processes if process.code is None]

    def has_ended(self) -> bool:
        """Whether none of its processes runs."""
        return None not in self.codes()

    def is_done(self) -> bool:
        """Whether its work is done and it has ended as it should."""
        return bool(self.processes) and all(code == 0 for code in self.codes())

    def terminate(self) -> None:
        """Sends SIGTERM to all of it, as its scheduler would."""
        signal_all(self.pids(), signal.SIGTERM)

    def cut(self) -> None:
        """Loses all packets from and to it, silently."""
        assert self.place is not None
        self.place.cut()

    def unplug(self) -> None:
        """Takes its network cable out."""
        assert self.place is not None
        self.place.unplug()

    def mend(self) -> None:
        """Connects it again."""
        assert self.place is not None
        self.place.mend()


def signal_all(pids: Sequence[int], number: int) -> None:
    """Sends a signal to processes, of which some may have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@contextlib.contextmanager
def starting(folder: Path, as_scripts: bool = False) -> Iterator[Starter]:
    """Gives a :class:`Starter`, and kills what is left of its processes, and of their groups, at the end."""
    starter = Starter(folder, as_scripts)
    try:
        yield starter
    finally:
        for process in starter.started:
            kill_group(process.pid, process.code is not None)
        for process in starter.started:
            process.wait(10)


def wait_until(condition: Callable[[], object], limit: float, what: Callable[[], str] = str) -> None:
    """Waits until a condition holds.

    Raises:
        AssertionError: If it does not within ``limit`` seconds, with what ``what`` returns.
    """
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"Not within {limit:g} s.\n{what()}"
        time.sleep(0.05)


def _work(
    role: Callable[..., None],
    arguments: tuple[str, ...],
    log: Path,
    namespace: str,
    environment: dict[str, str],
) -> None:
    os.setsid()
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    faulthandler.register(signal.SIGUSR1)
    if namespace:
        network.enter(namespace)
    multiprocessing.set_start_method("fork", force=True)  # for DataLoader workers
    os.environ.update(environment)
    os.chdir(ROOT)
    role(*arguments)
