"""Queues between threads, one for each key."""

from __future__ import annotations

import queue
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class KeyedQueues(Generic[K, T]):
    """A queue for each key, which exists when somebody asks for it: the thread that puts or the one that waits.

    Both may ask for the first time at the same moment. A ``defaultdict`` may then give each a queue of its own, so that
    what one puts never reaches the other.
    """

    def __init__(self) -> None:
        self._queues: dict[K, queue.SimpleQueue[T]] = {}

    def __getitem__(self, key: K) -> queue.SimpleQueue[T]:
        return self._queues.setdefault(key, queue.SimpleQueue())  # no other thread interrupts `setdefault`
