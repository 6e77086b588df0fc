"""The memory in which a server receives pushes: bounded, and shared so that nobody waits for a slower worker's link.

A push has it from its first byte until its answer is sent. Further pushes wait at their senders.
"""

from __future__ import annotations

import threading
import time
from queue import Empty

import torch
from torch import Tensor

PUSHES = 4
"""Pushes that a server has memory for: one arrives, one is applied, one's answer leaves, and one is on a slow link."""

_SLOW = 2.0  # times the shortest time for which any worker's last push had its memory


class PushMemory:
    """Memory for a few pushes, made when it is first needed.

    It is given to workers in the order in which they ask. Slow workers, whose last push had its memory more than twice
    as long as another's, never have all of it at the same time, so that the others wait only for each other.

    Args:
        model: A vector of the size and dtype of a push.
        pushes: Number of pushes that there is memory for.
    """

    def __init__(self, model: Tensor, pushes: int = PUSHES) -> None:
        self._form = model.numel(), model.dtype
        self._left = pushes  # that have not been made
        self._most_slow = max(1, pushes - 1)
        self._free: list[Tensor] = []
        self._in_use: dict[int, tuple[Tensor, int, float]] = {}  # with the worker and since when, by the tensor's id
        self._times: dict[int, float] = {}  # seconds for which each worker's last push had its memory
        self._waiting: list[int] = []
        self._changed = threading.Condition()

    def get(self, worker: int, timeout: float | None = None, is_chosen: bool = False) -> Tensor:
        """Waits for the memory for a worker's push, and returns it.

        Args:
            worker: The worker.
            timeout: Limit in seconds.
            is_chosen: Whether lane 0 has decided that it is this worker's turn. Then it gets the memory as soon as any
                is free, however slow it has been.

        Raises:
            queue.Empty: If there is none within ``timeout`` seconds.
        """
        with self._changed:
            self._waiting.append(worker)
            try:
                is_next = self._has_any if is_chosen else lambda: self._next() == worker
                if not self._changed.wait_for(is_next, timeout):
                    raise Empty
                vector = self._take()
                self._in_use[id(vector)] = vector, worker, time.monotonic()
            finally:
                self._waiting.remove(worker)
                self._changed.notify_all()
        return vector

    def put(self, vector: Tensor) -> None:
        """Takes the memory back, if it is from here."""
        with self._changed:
            _, worker, since = self._in_use.pop(id(vector), (None, 0, 0.0))
            if since:
                self._times[worker] = time.monotonic() - since
                self._free.append(vector)
                self._changed.notify_all()

    def _next(self) -> int | None:
        """Returns the worker that gets the next memory; ``None`` if there is none, or nobody may have it."""
        if not self._has_any():
            return None
        slow = sum(self._is_slow(worker) for _, worker, _ in self._in_use.values())
        return next((w for w in self._waiting if slow < self._most_slow or not self._is_slow(w)), None)

    def _has_any(self) -> bool:
        return bool(self._free or self._left)

    def _is_slow(self, worker: int) -> bool:
        return self._times.get(worker, 0.0) > _SLOW * min(self._times.values(), default=0.0)

    def _take(self) -> Tensor:
        if self._free:
            return self._free.pop()
        self._left -= 1
        return torch.empty(self._form[0], dtype=self._form[1])
