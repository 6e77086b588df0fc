"""What happens when a worker fails, disappears, falls silent or is interrupted: real processes, real signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("script.py")
STARTUP = 240.0  # seconds for four processes to import torch on a busy machine
LIMIT = 30.0  # seconds within which a failure has to have ended the whole run
SILENCE = 8.0  # the script's HalosStrategy(timeout=...) for a peer that falls silent


class Run:
    """A run of the script in a process group of its own."""

    def __init__(self, folder: Path, start_method: str, rank: int, fault: str, strategy: str) -> None:
        self.folder = folder
        self.output = folder / "output"
        with self.output.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(SCRIPT), str(folder), start_method, str(rank), fault, strategy],
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for_fault(self) -> float:
        """Waits until the rank misbehaves. Returns the time."""
        deadline = time.monotonic() + STARTUP
        while not (self.folder / "fault").exists():
            assert time.monotonic() < deadline, f"The run did not get going:\n{self.text}"
            assert self.process.poll() is None, f"The run ended early:\n{self.text}"
            time.sleep(0.05)
        return time.monotonic()

    def pid(self, rank: int) -> int:
        return int((self.folder / f"pid_{rank}").read_text())

    def wait_until_all_ended(self, since: float) -> None:
        """Waits until no process of the run is left."""
        self.wait_until_ended(range(4), since)
        self.process.wait(max(0.1, since + LIMIT - time.monotonic()))

    def wait_until_ended(self, ranks: Iterable[int], since: float) -> None:
        """Waits until these processes of the run are gone."""
        pids = [self.pid(rank) for rank in ranks]
        while any(_is_running(pid) for pid in pids):
            assert time.monotonic() < since + LIMIT, f"Still running after {LIMIT} s:\n{self.text}"
            self.process.poll()
            time.sleep(0.1)

    @property
    def text(self) -> str:
        return self.output.read_text()

    def end(self) -> None:
        """Ends whatever is left of the run."""
        for signum in (signal.SIGCONT, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, signum)
            except ProcessLookupError:
                return
        self.process.wait(10)


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[object]:
    runs: list[Run] = []

    def start(start_method: str, rank: int, fault: str, strategy: str = "halos") -> Run:
        runs.append(Run(tmp_path, start_method, rank, fault, strategy))
        return runs[-1]

    yield start
    for run in runs:
        run.end()


@pytest.mark.parametrize(
    ("start_method", "rank"),
    [("popen", 0), ("popen", 2), ("popen", 3), ("fork", 3)],
    ids=["rank 0", "the leader of a region", "a worker", "a forked worker"],
)
def test_an_error_in_one_worker_ends_the_run_with_its_traceback_first(start, start_method: str, rank: int) -> None:
    run = start(start_method, rank, "raise")
    run.wait_until_all_ended(since=run.wait_for_fault())
    mistake = run.text.find("ValueError: a mistake in the user's code")
    assert mistake >= 0
    assert run.process.returncode != 0
    others = run.text.find("PeerFailedError")
    assert others == -1 or mistake < others
    assert "PeerLostError" not in run.text


@pytest.mark.parametrize(
    ("rank", "name"), [(2, "rank 2 (region 1)"), (3, "rank 3 (region 1)"), (0, "rank 0 (region 0)")]
)
def test_a_peer_that_disappears_is_named_by_rank_and_region(start, rank: int, name: str) -> None:
    run = start("popen", rank, "SIGKILL")
    since = run.wait_for_fault()
    run.wait_until_all_ended(since)
    assert run.process.returncode != 0
    assert f"{name} disappeared" in run.text or f"{name} failed" in run.text


@pytest.mark.parametrize(
    ("rank", "strategy", "named"),
    [
        (3, "halos", r"rank 3 \(region 1\) did not say anything for 8 s, and rank 2 \(region 1\) waited for it"),
        # Who waits for an answer may notice it first, or who waits for any sign of life.
        (2, "halos", r"server of rank 2 \(region 1\) did not [a-z ]+ for 8 s, and rank [03] \(region [01]\) waited"),
        (0, "halos", r"server of rank 0 \(region 0\) did not [a-z ]+ for 8 s, and rank [12] \(region [01]\) waited"),
        (2, "diloco", r"Did not come, or has ended: rank 2 \(region 0\)\."),
        (0, "diloco", r"rank 0 \(region 0\) has ended or does not run any more"),
    ],
    ids=["a worker", "the leader of a region", "rank 0", "a worker of DiLoCo", "rank 0 of DiLoCo"],
)
def test_a_peer_that_stops_without_a_word_is_named_within_the_time_limit(
    start, rank: int, strategy: str, named: str
) -> None:
    run = start("fork", rank, "SIGSTOP", strategy)
    since = run.wait_for_fault()
    run.wait_until_ended([other for other in range(4) if other != rank], since + SILENCE)
    os.kill(run.pid(rank), signal.SIGCONT)  # else torch.multiprocessing waits 30 s before it kills it
    run.wait_until_all_ended(time.monotonic())
    assert re.search(named, run.text)
    assert re.search(r"[Ll]ast heard of.* s ago, at \d\d:\d\d:\d\d", run.text)


@pytest.mark.parametrize("start_method", ["popen", "fork"])
def test_ctrl_c_ends_all_processes(start, start_method: str) -> None:
    run = start(start_method, 0, "none")
    since = run.wait_for_fault()
    os.killpg(run.process.pid, signal.SIGINT)
    run.wait_until_all_ended(since)


@pytest.mark.parametrize("rank", [0, 3])
def test_sigterm_to_one_process_ends_all(start, rank: int) -> None:
    run = start("popen", rank, "SIGTERM")
    run.wait_until_all_ended(since=run.wait_for_fault())


@pytest.mark.parametrize(
    ("fault", "warning"),
    [
        ("nan", "The update of rank 1 (region 0) was dropped: it has NaN or infinite values."),
        ("huge", "The last 3 updates of rank 1 (region 0) were all dropped, this one because its norm of "),
    ],
)
def test_a_poisonous_update_is_dropped_with_a_warning_and_the_run_goes_on(start, fault: str, warning: str) -> None:
    run = start("popen", 1, fault)
    run.wait_for_fault()
    assert run.process.wait(90) == 0
    assert warning in run.text
    assert sorted(line for line in run.text.splitlines() if line.startswith("END")) == [
        f"END {rank} 60 True" for rank in range(4)
    ]
