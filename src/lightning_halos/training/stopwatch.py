"""How long a worker computes, on its device too.

A device works through a queue of its own, so that the host's clock alone shows how fast work is queued, not how fast it
is done. What is no computing, such as saving, is left out.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


class Stopwatch:
    """Measures the seconds that a worker computes. It runs from the start.

    Args:
        device: The device that the worker computes on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = torch.get_device_module(device)
        self._pauses = 0
        self._seconds = 0.0
        self._since = self.now()

    def now(self) -> float:
        """Returns the host's time in seconds."""
        return time.perf_counter()

    def synchronize(self) -> None:
        """Waits until the device has done all work in its queue."""
        self._device.synchronize()

    def restart(self) -> None:
        """Begins at zero again."""
        self._seconds = 0.0
        self._since = self.now()

    def lap(self) -> float:
        """Returns the seconds since the last lap, pauses left out. Work may still be in the device's queue."""
        now = self.now()
        seconds = self._seconds if self._pauses else self._seconds + now - self._since
        self._seconds, self._since = 0.0, now
        return seconds

    def drain(self) -> float:
        """Waits until the device has done all work in its queue. Returns the seconds that this took."""
        begin = self.now()
        self.synchronize()
        return self.now() - begin

    def pause(self) -> None:
        """Stops the watch, after the device has done what was to be measured. Pauses may be nested."""
        if not self._pauses:
            self.synchronize()
            self._seconds += self.now() - self._since
        self._pauses += 1

    def resume(self) -> None:
        """Ends a pause, after the device has done what is not to be measured."""
        self._pauses -= 1
        if not self._pauses:
            self.synchronize()
            self._since = self.now()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pauses in a ``with`` block."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def leaving_out(self, items: Iterable[T]) -> Iterator[T]:
        """Yields the items. The time that it takes to get each of them is left out."""
        iterator = iter(items)
        while True:
            with self.paused():
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item
