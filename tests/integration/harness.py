"""Runs a scenario in worker processes that are forked from a server which has imported everything already.

Every worker runs the whole scenario, as under ``start_method="popen"`` or torchrun. Nothing here outlives a test: every
wait has a limit, and what is left of a worker (its DataLoader's processes too) is killed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import secrets
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch.distributed import run

from tests.groups import is_left, kill_group

# A fork of this process, which has threads, may hang: they may hold locks that nobody in the child releases.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.preload"])

Result = dict[str, Any]
Scenario = Callable[..., Result]

LIMIT = 240.0
"""Seconds that a scenario may take, on the busiest machine. Pytest ends a test after 300."""

_PORTS = range(10_000, 20_000)  # below those that systems give to connections
_MOST_TAKEN = 30
_taken: deque[socket.socket] = deque()


@dataclass(frozen=True)
class End:
    """How a worker process ended.

    Attributes:
        code: Its exit code, negative if that was a signal; ``None`` if it had to be killed.
        at: When it ended, by ``time.monotonic``.
        log: What it printed.
        left: Whether processes of its are left, without it.
    """

    code: int | None
    at: float
    log: str
    left: bool


def run_workers(
    scenario: Scenario, *args: Any, folder: Path, environments: list[dict[str, str]], timeout: float = LIMIT
) -> list[Result]:
    """Runs ``scenario(*args)`` in a process for each environment. Returns what it returned there, in their order."""
    ends = end_workers(scenario, *args, folder=folder, environments=environments, timeout=timeout)
    if any(end.code != 0 for end in ends):
        logs = "\n".join(f"--- process {number}\n{end.log[-4000:]}" for number, end in enumerate(ends))
        codes = [end.code for end in ends]
        raise AssertionError(f"The processes ended with {codes} (None: not within {timeout:g} s).\n{logs}")
    return load_results(folder, len(environments))


def end_workers(
    scenario: Scenario,
    *args: Any,
    folder: Path,
    environments: list[dict[str, str]],
    timeout: float = LIMIT,
    patience: float = 10,
    stopped: Collection[int] = (),
    meanwhile: Callable[[list[int]], object] = lambda pids: None,
) -> list[End]:
    """Runs ``scenario(*args)`` in a process for each environment, until all have ended. Returns how they did.

    What ``scenario`` returned is saved; see :func:`load_results`.

    Args:
        scenario: What to run.
        args: Its arguments.
        folder: Where it runs.
        environments: What to set in the environment of each process.
        timeout: Seconds that it may take.
        patience: Seconds that the others have when one has failed.
        stopped: Processes that are not waited for, since they will be stopped.
        meanwhile: Called again and again with the processes' ids.
    """
    workers = range(len(environments))
    processes = [
        context.Process(target=_work, args=(number, environment, folder, timeout, scenario, args))
        for number, environment in enumerate(environments)
    ]
    codes: dict[int, int] = {}
    ended: dict[int, float] = {}
    try:
        for process in processes:
            process.start()
        pids = [process.pid for process in processes if process.pid is not None]
        deadline = time.monotonic() + timeout
        while set(workers) - codes.keys() - set(stopped) and time.monotonic() < deadline:
            for number in workers:
                if number not in codes and (code := processes[number].exitcode) is not None:
                    codes[number], ended[number] = code, time.monotonic()
                    if code != 0:
                        deadline = min(deadline, time.monotonic() + patience)
            meanwhile(pids)
            time.sleep(0.02)
    finally:
        left = {number for number in codes if is_left(processes[number].pid or 0)}
        for process in processes:
            if process.pid is not None:
                kill_group(process.pid, process.exitcode is not None)
                process.kill()
                process.join()
    now = time.monotonic()
    return [End(codes.get(number), ended.get(number, now), _log(folder, number), number in left) for number in workers]


def load_results(folder: Path, workers: int) -> list[Result]:
    """What :func:`save_result` saved, by rank."""
    return [torch.load(folder / f"result{rank}.pt", weights_only=True) for rank in range(workers)]


def save_result(folder: Path, rank: int, result: Result) -> None:
    torch.save(result, folder / f"result{rank}.pt")


def lightning_environments(workers: int) -> list[dict[str, str]]:
    """The environment that Lightning's own launcher would set in each worker process."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**shared, "LOCAL_RANK": str(rank)} for rank in range(workers)]


def torchrun_environments(*processes: int) -> list[dict[str, str]]:
    """The environment that torchrun would set in each process, given the number of processes on each node."""
    size, port, environments = sum(processes), free_port(), list[dict[str, str]]()
    for node, here in enumerate(processes):
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none"}
        shared |= {"GROUP_RANK": str(node), "GROUP_WORLD_SIZE": str(len(processes))}
        shared |= {"LOCAL_WORLD_SIZE": str(here), "WORLD_SIZE": str(size)}
        for local in range(here):
            environments.append({**shared, "LOCAL_RANK": str(local), "RANK": str(len(environments))})
    return environments


def torchrun(*arguments: str) -> Result:
    """A scenario: torchrun with these arguments, the last ones a script's path and what it gets.

    Its processes are forked: they have imported everything already.
    """
    run.main(["--run-path", "--start-method=fork", *arguments])
    return {}


@contextlib.contextmanager
def ending(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Kills what is left of the process's group at the end."""
    try:
        yield process
    finally:
        kill_group(process.pid, process.returncode is not None)
        process.wait()


def free_port() -> int:
    """A free port, which no connection gets by itself, and no other test, until somebody listens there.

    Other tests see that it is taken by a UDP socket with the same number, which lives as long as this process, or until
    many more have been taken.
    """
    while True:
        port, mark = secrets.choice(_PORTS), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with socket.socket() as probe:
            try:
                mark.bind(("127.0.0.1", port))
                probe.bind(("", port))
            except OSError:
                mark.close()
                continue
        _taken.append(mark)
        if len(_taken) > _MOST_TAKEN:
            _taken.popleft().close()
        return port


def _work(
    number: int, environment: dict[str, str], folder: Path, timeout: float, scenario: Scenario, args: tuple[Any, ...]
) -> None:
    os.setsid()
    log = os.open(folder / f"log{number}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    faulthandler.dump_traceback_later(max(1.0, timeout - 3))
    multiprocessing.set_start_method("fork", force=True)  # for DataLoader workers
    os.environ.update(environment)
    os.chdir(folder)
    rank_zero_only.rank = number  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    torch.manual_seed(number)
    save_result(folder, number, scenario(*args))


def _log(folder: Path, number: int) -> str:
    path = folder / f"log{number}"
    return path.read_text(errors="replace") if path.exists() else "(no log)"
