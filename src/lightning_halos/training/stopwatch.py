"""Measures how long a worker computes, including the work in its device's queue.

A device works asynchronously: without synchronization, the host's clock shows how fast work is queued, not how fast it
is done. Other work, such as saving a checkpoint, is excluded with pauses.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


class Stopwatch:
    """Measures the seconds that a worker computes on a device. It runs from the start."""

    def __init__(self, device: torch.device) -> None:
        self._device = getattr(torch, device.type)
        self._pauses = 0
        self._seconds = 0.0
        self._since = self.now()

    def now(self) -> float:
        """Returns the host's time in seconds."""
        return time.perf_counter()

    def synchronize(self) -> None:
        """Waits until the device has completed all work in its queue."""
        self._device.synchronize()

    def restart(self) -> None:
        """Resets the watch to zero."""
        self._seconds = 0.0
        self._since = self.now()

    def lap(self) -> float:
        """Returns the seconds since the last lap, without pauses. It does not synchronize the device."""
        now = self.now()
        seconds = self._seconds if self._pauses else self._seconds + now - self._since
        self._seconds, self._since = 0.0, now
        return seconds

    def drain(self) -> float:
        """Synchronizes the device. Returns the seconds that this took."""
        begin = self.now()
        self.synchronize()
        return self.now() - begin

    def pause(self) -> None:
        """Stops the watch, after the device has completed the measured work. Pauses may be nested."""
        if not self._pauses:
            self.synchronize()
            self._seconds += self.now() - self._since
        self._pauses += 1

    def resume(self) -> None:
        """Ends a pause, after the device has completed the work of the pause."""
        self._pauses -= 1
        if not self._pauses:
            self.synchronize()
            self._since = self.now()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pauses the watch in a ``with`` block."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def excluding(self, items: Iterable[T]) -> Iterator[T]:
        """Yields the items, and pauses while it waits for each of them."""
        iterator = iter(items)
        while True:
            with self.paused():
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item
