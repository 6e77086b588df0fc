"""Queues between threads, one for each key."""

from __future__ import annotations

import queue
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest

from lightning_halos.transport.keyed_queues import KeyedQueues


def test_threads_that_ask_for_a_new_key_at_the_same_moment_get_the_same_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    made = queue.SimpleQueue

    def slowly() -> Any:
        new = made()
        time.sleep(0.05)  # as if a garbage collection ran here, during which other threads go on
        return new

    monkeypatch.setattr(queue, "SimpleQueue", slowly)
    queues, together = KeyedQueues[int, str](), Barrier(4)

    def ask(_: int) -> Any:
        together.wait(10)
        return queues[7]

    with ThreadPoolExecutor(4) as threads:
        first, *others = threads.map(ask, range(4), timeout=10)
    assert all(other is first for other in others)
    assert queues[8] is not first
