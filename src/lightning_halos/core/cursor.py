"""Which part of the data is whose: one cursor over the dataset for all workers.

Rules of this room: numbers only. The unit is the data of one local step: every worker's steps are equally large, so a
step is a step whoever takes it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Lease:
    """A contiguous range of an epoch's data, for one worker to train on.

    Attributes:
        epoch: The epoch.
        first: Local steps' worth of data before the range, in this epoch.
        steps: Local steps' worth of data in the range.
    """

    epoch: int
    first: int
    steps: int


class Spans:
    """A set of data: ranges of local steps' worth, counted from the first epoch's beginning.

    Args:
        spans: Beginnings and ends (exclusive), in any order; they may touch.
    """

    def __init__(self, spans: Iterable[Sequence[int]] = ()) -> None:
        self._spans: list[tuple[int, int]] = []
        self.add(spans)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yields the beginnings and ends, in order, with something missing between any two."""
        return iter(self._spans)

    def add(self, spans: Iterable[Sequence[int]]) -> None:
        """Takes ranges into the set."""
        for start, stop in spans:
            first = bisect_left(self._spans, start, key=lambda span: span[1])
            last = bisect_right(self._spans, stop, key=lambda span: span[0])
            if first < last:
                start, stop = min(start, self._spans[first][0]), max(stop, self._spans[last - 1][1])
            self._spans[first:last] = [(start, stop)]

    def missing(self, first: int) -> tuple[int, float]:
        """Returns the next range from ``first`` on that is not in the set."""
        for start, stop in self._spans[bisect_right(self._spans, first, key=lambda span: span[1]) :]:
            if first < start:
                return first, start
            first = stop
        return first, math.inf


class DataCursor:
    """Hands out the data of epoch after epoch, every part once.

    Args:
        steps_per_epoch: Local steps' worth of data in an epoch; the last of an epoch may be smaller.
        epochs: The epoch to end before, ``None`` for no end.
        done: The data that needs not to be handed out, since earlier fits have used it.
    """

    def __init__(self, steps_per_epoch: int, epochs: int | None = None, done: Spans | None = None) -> None:
        self._steps_per_epoch = steps_per_epoch
        self._done = done or Spans()
        self._next = 0
        self._end = math.inf if epochs is None else epochs * steps_per_epoch

    def take(self, steps: int, sharers: int = 1) -> Lease | None:
        """Hands out a range.

        Args:
            steps: Its length; shorter at the end of an epoch, since no range belongs to two.
            sharers: How many take ranges of this length. Towards the end of the last epoch ranges get shorter, so that
                all of them have something to do until it is over.

        Returns:
            The range, ``None`` if there is no data left.
        """
        self._next, gap = self._done.missing(self._next)
        if self._next >= self._end:
            return None
        steps = int(min(steps, gap - self._next))
        fair = math.ceil((self._end - self._next) / (2 * sharers)) if self._end < math.inf else steps
        lease = next(split(self._next, max(1, min(steps, fair)), self._steps_per_epoch))
        self._next += lease.steps
        return lease


def split(first: int, steps: int, steps_per_epoch: int) -> Iterator[Lease]:
    """Divides a range that is counted from the first epoch's beginning at the ends of epochs."""
    while steps > 0:
        epoch, start = divmod(first, steps_per_epoch)
        length = min(steps, steps_per_epoch - start)
        yield Lease(epoch, start, length)
        first, steps = first + length, steps - length


class LeaseStock:
    """A local server's stock of data for its workers. It orders more ahead of need.

    If workers had to wait for an order, the next ones are twice as large: the link is slow for such fast workers.

    Args:
        ahead: Low-water mark and size of an order at the beginning, in local steps. 0: order only what workers ask for.
    """

    _LARGEST = 64  # times as large as in the beginning

    def __init__(self, ahead: int) -> None:
        self._ahead = ahead
        self._largest = self._LARGEST * ahead
        self._has_served = False
        self._leases: deque[Lease] = deque()
        self._asked: deque[tuple[int, int]] = deque()
        self._ordered = self._ended = False

    def __iter__(self) -> Iterator[Lease]:
        """Yields the leases in stock."""
        return iter(self._leases)

    def ask(self, worker: int, steps: int) -> None:
        """Takes note that a worker wants data for a number of local steps."""
        self._asked.append((worker, steps))

    def forget(self, worker: int) -> None:
        """Drops what a worker asked for and has not got."""
        self._asked = deque((other, steps) for other, steps in self._asked if other != worker)

    def add(self, lease: Lease | None) -> None:
        """Takes what was ordered; ``None`` if there is no more."""
        self._ordered = False
        if self._asked and self._has_served:
            self._ahead = min(2 * self._ahead, self._largest)
        if lease is None:
            self._ended = True
        else:
            self._leases.append(lease)

    def serve(self) -> list[tuple[int, Lease | None]]:
        """Returns which workers get what now, in the order in which they asked; ``None`` if there is no more data."""
        served: list[tuple[int, Lease | None]] = []
        while self._asked and (self._leases or self._ended):
            worker, steps = self._asked.popleft()
            if not self._leases:
                served.append((worker, None))
                continue
            whole = self._leases.popleft()
            steps = min(steps, whole.steps)
            self._has_served = True
            served.append((worker, Lease(whole.epoch, whole.first, steps)))
            if steps < whole.steps:
                self._leases.appendleft(Lease(whole.epoch, whole.first + steps, whole.steps - steps))
        return served

    def order(self) -> int:
        """Returns how many local steps' worth of data to order now; 0 if there is enough, or an order is under way."""
        stock = sum(lease.steps for lease in self)
        asked = sum(steps for _, steps in self._asked)
        if self._ordered or self._ended or stock >= max(self._ahead, asked):
            return 0
        self._ordered = True
        return max(self._ahead, asked - stock)
