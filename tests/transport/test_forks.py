"""Forked processes, such as DataLoader workers, of a process that has had process groups."""

from __future__ import annotations

import gc
import multiprocessing
import signal
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore

from lightning_halos.core.compat import gloo_group
from lightning_halos.transport.forks import noting_sockets

context = multiprocessing.get_context("forkserver")
LIMIT = 60


class Cycle:
    """Refers to itself, as much of a Trainer does, so that only the garbage collector ends it."""

    def __init__(self, held: Any) -> None:
        self.itself, self.held = self, held


def collecting() -> None:
    """A fit that has ended, and a DataLoader worker of the next one."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    gc.disable()
    with noting_sockets():
        Cycle([store, gloo_group(store, 0, 1, timedelta(seconds=LIMIT), "127.0.0.1")])
    forked = multiprocessing.get_context("fork").Process(target=collect)
    forked.start()
    forked.join()
    assert forked.exitcode == 0


def collect() -> None:
    signal.alarm(LIMIT // 2)
    gc.collect()


def test_a_group_that_is_garbage_does_not_hang_a_forked_process() -> None:
    process = context.Process(target=collecting)
    process.start()
    process.join(LIMIT)
    process.kill()
    assert process.exitcode == 0
