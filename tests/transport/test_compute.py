"""A process's servers compute in one pool of threads, whatever torch's number of threads is."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from lightning_halos.transport import compute
from lightning_halos.transport.compute import ComputeThreads, threads_beside, usable_cores

LIMIT = 60.0
NUMBER = 1000  # of jobs, which would take 50 s


@pytest.fixture(autouse=True)
def _number_of_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_jobs_run_at_the_same_time_with_one_torch_thread_each() -> None:
    torch.set_num_threads(1)  # as torchrun does
    pool, both = ComputeThreads(2), threading.Barrier(2)

    def job(number: int) -> tuple[int, int]:
        both.wait(LIMIT)
        return number, torch.get_num_threads()

    assert list(pool.map(job, range(4))) == [(number, 1) for number in range(4)]


def test_other_threads_keep_their_number_of_torch_threads() -> None:
    torch.set_num_threads(3)
    pool, seen = ComputeThreads(2), []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join(LIMIT)
    assert (pool.number, torch.get_num_threads(), seen) == (2, 3, [3])


def test_a_failure_is_raised_when_no_job_runs_any_more() -> None:
    pool, done = ComputeThreads(2), []

    def job(number: int) -> None:
        if number == 1:
            raise ValueError("it failed")
        time.sleep(0.1)
        done.append(number)

    with pytest.raises(ValueError, match="it failed"):
        list(pool.map(job, range(NUMBER)))
    finished = list(done)
    time.sleep(0.3)
    assert done == finished
    assert len(done) < NUMBER / 2


def test_the_threads_end_with_the_pool() -> None:
    pool = ComputeThreads(2)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("halos compute")]
    assert list(pool.map(abs, [-1])) == [1]
    del pool
    gc.collect()
    threads[-1].join(LIMIT)
    threads[-2].join(LIMIT)
    assert not threads[-1].is_alive()
    assert not threads[-2].is_alive()


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute.os, "sched_getaffinity", lambda pid: range(64), raising=False)
    assert [threads_beside(processes) for processes in (0, 1, 8, 24, 100)] == [16, 16, 8, 2, 1]


def test_without_a_set_of_cores_all_of_the_machine_are_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(compute.os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(compute.os, "cpu_count", lambda: 3)
    assert usable_cores() == 3
