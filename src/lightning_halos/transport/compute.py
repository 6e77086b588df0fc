"""The threads in which the servers of a process compute: one pool, however many links and servers the process has.

Each thread computes another piece of a model. torch's own threads inside an operation are not used: they wait for each
other after every operation, which takes long on a busy machine, and each thread that calls torch would get its own.
Their number, which ``OMP_NUM_THREADS`` sets and ``torchrun`` sets to 1, therefore does not matter here.
"""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

_MOST = 16
"""Largest number of threads. They mostly move memory, and a few cores can use all of its speed."""


def usable_cores() -> int:
    """Returns the number of cores that this process may use, which may be fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_beside(processes: int) -> int:
    """Returns the number of threads for the servers of a process: its share of the cores that it may use.

    Args:
        processes: Processes on this machine that compute.
    """
    return max(1, min(_MOST, usable_cores() // max(1, processes)))


class ComputeThreads:
    """A pool of threads. They are daemons, and end when nobody refers to the pool any more.

    Args:
        number: Number of threads.

    Attributes:
        number: Number of threads.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        of_others, started = torch.get_num_threads(), threading.Barrier(number + 1)
        for index in range(number):
            work = partial(_work, self._jobs, started)
            threading.Thread(target=work, name=f"halos compute {index}", daemon=True).start()
        started.wait()
        # What a thread sets is also what later threads begin with, which may train.
        torch.set_num_threads(of_others)
        weakref.finalize(self, _end, self._jobs, number)

    def map(self, function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
        """Calls a function for each item in these threads. Yields the results in the order of the items.

        If a call raises, so does this, when no other call runs any more.
        """
        futures: list[Future[R]] = []
        for item in items:
            futures.append(Future())
            self._jobs.put(partial(_call, futures[-1], function, item))
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in [future for future in futures if not future.cancel()]:
                future.exception()  # waits for a call that has begun


def _work(jobs: queue.SimpleQueue[Callable[[], None] | None], started: threading.Barrier) -> None:
    torch.set_num_threads(1)
    started.wait()
    while (job := jobs.get()) is not None:
        job()
        del job  # it refers to a model


def _call(future: Future[Any], function: Callable[[Any], Any], item: Any) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function(item))
    except BaseException as error:
        future.set_exception(error)


def _end(jobs: queue.SimpleQueue[Callable[[], None] | None], number: int) -> None:
    for _ in range(number):
        jobs.put(None)
