"""The division of the training data among workers: one cursor over the data set, and leases of ranges.

Numbers only; ``training/shared_data`` turns them into samples. The unit is the data of one local step, which is the
same for all workers.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Lease:
    """A contiguous range of an epoch's data. ``first`` is its start in this epoch, ``steps`` its length."""

    epoch: int
    first: int
    steps: int

    def span(self, steps_per_epoch: int) -> tuple[int, int]:
        """Returns the start and the end (exclusive) of the range, counted from the start of the first epoch."""
        start = self.epoch * steps_per_epoch + self.first
        return start, start + self.steps

    def divide(self, steps: int) -> tuple[Lease, list[Lease]]:
        """Returns a lease of at most this many steps, and what is left."""
        if steps >= self.steps:
            return self, []
        return Lease(self.epoch, self.first, steps), [Lease(self.epoch, self.first + steps, self.steps - steps)]


class Spans:
    """A set of data ranges, counted in local steps from the start of the first epoch.

    Args:
        spans: Starts and ends (exclusive) of the ranges, in any order. They may overlap.
    """

    def __init__(self, spans: Iterable[Sequence[int]] = ()) -> None:
        self._spans: list[tuple[int, int]] = []
        self.add(spans)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yields the starts and ends of the ranges, in order. No two touch."""
        return iter(self._spans)

    def add(self, spans: Iterable[Sequence[int]]) -> None:
        for start, stop in spans:
            first = bisect_left(self._spans, start, key=lambda span: span[1])
            last = bisect_right(self._spans, stop, key=lambda span: span[0])
            if first < last:
                start, stop = min(start, self._spans[first][0]), max(stop, self._spans[last - 1][1])
            self._spans[first:last] = [(start, stop)]

    @property
    def steps(self) -> int:
        """Local steps in all ranges together."""
        return sum(stop - start for start, stop in self._spans)

    def remove(self, spans: Iterable[Sequence[int]]) -> None:
        for start, stop in spans:
            first = bisect_right(self._spans, start, key=lambda span: span[1])
            last = bisect_left(self._spans, stop, key=lambda span: span[0])
            if first < last:
                rest = (self._spans[first][0], start), (stop, self._spans[last - 1][1])
                self._spans[first:last] = [(begin, end) for begin, end in rest if begin < end]

    def common(self, spans: Iterable[Sequence[int]]) -> Spans:
        """Returns what is in the set and also in these ranges."""
        found = Spans()
        for start, stop in spans:
            first = bisect_right(self._spans, start, key=lambda span: span[1])
            last = bisect_left(self._spans, stop, key=lambda span: span[0])
            found.add((max(start, begin), min(stop, end)) for begin, end in self._spans[first:last])
        return found

    def without(self, *others: Iterable[Sequence[int]]) -> Spans:
        """Returns what is in the set and in none of the others."""
        rest = Spans()
        rest._spans = list(self._spans)
        for spans in others:
            # What a member was leased in a long run has many ranges, and a report has few.
            rest.remove(spans.common(rest) if isinstance(spans, Spans) else spans)
        return rest

    def missing(self, first: int) -> tuple[int, float]:
        """Returns the first range at or after ``first`` that is not in the set."""
        for start, stop in self._spans[bisect_right(self._spans, first, key=lambda span: span[1]) :]:
            if first < start:
                return first, start
            first = stop
        return first, math.inf


class DataCursor:
    """Leases the data of one epoch after the other, every range once unless it is given back.

    Args:
        steps_per_epoch: Data of an epoch, in local steps. The last step of an epoch may be smaller.
        epochs: Number of epochs, ``None`` for no limit.
        done: Ranges that are not leased, such as those that earlier fits have used. Leased ranges are added.
        end: Where the data ends at the latest, in local steps from the beginning of the first epoch.

    Attributes:
        end: Where the data ends; may be infinite.
    """

    def __init__(
        self, steps_per_epoch: int, epochs: int | None = None, done: Spans | None = None, end: float = math.inf
    ) -> None:
        self._steps_per_epoch = steps_per_epoch
        self._taken = Spans() if done is None else done
        self._next = 0
        self.end = end if epochs is None else min(end, epochs * steps_per_epoch)

    @property
    def next(self) -> int:
        """Start of the range that is leased next, in local steps from the beginning of the first epoch."""
        self._next, _ = self._taken.missing(self._next)
        return self._next

    @property
    def is_over(self) -> bool:
        """Whether no data is left."""
        return self.next >= self.end

    @property
    def epoch(self) -> int:
        """Epoch of the range that is leased next; the last one if no data is left."""
        return int(min(self.next, self.end - 1)) // self._steps_per_epoch

    def give_back(self, spans: Iterable[Sequence[int]]) -> None:
        """Takes leased ranges back, to lease them again before others."""
        spans = list(spans)
        self._taken.remove(spans)
        self._next = min([self._next, *(start for start, _ in spans)])

    def claim(self, spans: Iterable[Sequence[int]]) -> Spans:
        """Leases certain ranges. Returns what of them was free."""
        free = Spans((start, min(stop, self.end)) for start, stop in spans if start < self.end)  # type: ignore[misc]
        free.remove(self._taken)
        self._taken.add(free)
        return free

    def take(self, steps: int, sharers: int = 1) -> Lease | None:
        """Leases a range; returns ``None`` if there is no data left.

        Args:
            steps: Length of the range, in local steps. It is shorter at the end of an epoch, because no range is part
                of two epochs.
            sharers: Number of servers that take ranges of this length. Towards the end of the last epoch ranges get
                shorter, so that all servers have data until the end.
        """
        self._next, gap = self._taken.missing(self._next)
        if self._next >= self.end:
            return None
        steps = int(min(steps, gap - self._next))
        fair = math.ceil((self.end - self._next) / (2 * sharers)) if self.end < math.inf else steps
        lease = next(split(self._next, max(1, min(steps, fair)), self._steps_per_epoch))
        self._taken.add([(self._next, self._next + lease.steps)])
        self._next += lease.steps
        return lease


def split(first: int, steps: int, steps_per_epoch: int) -> Iterator[Lease]:
    """Splits a range, which is counted from the start of the first epoch, at the ends of epochs."""
    while steps > 0:
        epoch, start = divmod(first, steps_per_epoch)
        length = min(steps, steps_per_epoch - start)
        yield Lease(epoch, start, length)
        first, steps = first + length, steps - length


class LeaseStock:
    """A local server's stock of leased data for its workers. It orders more before the workers need it.

    If a worker had to wait for an order, the next orders are twice as large.

    Args:
        ahead: Initial low-water mark and order size, in local steps. 0: order only what workers ask for.
    """

    _LARGEST = 64  # largest order, as a multiple of the initial size

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
        """Records a worker's request for data of a number of local steps."""
        self._asked.append((worker, steps))

    def cancel(self, worker: int) -> None:
        """Drops a worker's open requests."""
        self._asked = deque((other, steps) for other, steps in self._asked if other != worker)

    def drop(self, spans: Iterable[Sequence[int]], steps_per_epoch: int) -> None:
        """Drops data that others have now."""
        lost, kept = list(spans), deque[Lease]()
        for lease in self._leases:
            for start, stop in Spans([lease.span(steps_per_epoch)]).without(lost):
                kept += split(start, stop - start, steps_per_epoch)
        self._leases = kept

    def add(self, lease: Lease | None) -> None:
        """Adds the lease that was ordered; ``None`` if no data is left."""
        self._ordered = False
        if self._asked and self._has_served:
            self._ahead = min(2 * self._ahead, self._largest)
        if lease is None:
            self._ended = True
        else:
            self._leases.append(lease)

    def serve(self) -> list[tuple[int, Lease | None]]:
        """Returns leases for waiting workers, in the order of their requests; ``None`` if no data is left."""
        served: list[tuple[int, Lease | None]] = []
        while self._asked and (self._leases or self._ended):
            worker, steps = self._asked.popleft()
            lease = None
            if self._leases:
                lease, rest = self._leases.popleft().divide(steps)
                self._leases.extendleft(rest)
                self._has_served = True
            served.append((worker, lease))
        return served

    def order(self) -> int:
        """Returns the size of the order to send now, in local steps; 0 if none is needed or one is unanswered."""
        stock = sum(lease.steps for lease in self._leases)
        asked = sum(steps for _, steps in self._asked)
        if self._ordered or self._ended or stock >= max(self._ahead, asked):
            return 0
        self._ordered = True
        return max(self._ahead, asked - stock)
