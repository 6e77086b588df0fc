"""Who works when: rounds under the virtual clock.

Rules of this room: a round's place in time is known when it begins, from the cluster's description alone, whatever it
computes. So everybody who asks gets the same rounds: the servers, and each worker that wants to know its data ahead.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_halos.core.cursor import Lease, split
from lightning_halos.simulation.timing import Timing


@dataclass(frozen=True)
class Round:
    """One round of one worker.

    Attributes:
        worker: Its global rank.
        begin: Virtual milliseconds at which the worker is dispatched: the server's model leaves.
        end: Virtual milliseconds at which the result is at the server.
        first: Local steps' worth of data that was handed out, to all workers, before this round's.
        steps: Local steps.
        position: Global step that the worker's schedules begin the round with.
    """

    worker: int
    begin: float
    end: float
    first: int
    steps: int
    position: int


class Rounds(ABC):
    """The rounds of a run.

    Args:
        timing: The durations.
        local_steps: Local steps of a round of each worker.
        first: Local steps' worth of data that earlier runs were handed.
        budget: Local steps to hand out in this run, by all workers together; may be infinite.
    """

    def __init__(self, timing: Timing, local_steps: Sequence[int], first: int = 0, budget: float = math.inf) -> None:
        self._timing = timing
        self._local_steps = local_steps
        self._next = first
        self._end = first + budget
        self._is_restored = False

    @property
    @abstractmethod
    def running(self) -> list[Round]:
        """The rounds that are under way, in the order in which they end."""

    @abstractmethod
    def run_again(self, rounds: Sequence[Round]) -> None:
        """Takes rounds that are under way from another moment."""

    def state_dict(self, ending: Sequence[Round] = ()) -> dict[str, Any]:
        """Returns who works now, and what was handed out.

        Args:
            ending: Rounds that were taken out, and whose end is not handled yet.
        """
        return {"next": self._next, "running": [dataclasses.astuple(r) for r in (*ending, *self.running)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of :meth:`state_dict`."""
        self._next = state["next"]
        self.run_again([Round(*fields) for fields in state["running"]])
        self._is_restored = True

    @abstractmethod
    def begin(self, workers: Sequence[int], now: float) -> list[Round]:
        """Dispatches workers, as far as there is work left for them.

        Args:
            workers: Global ranks of idle workers.
            now: Virtual milliseconds.

        Returns:
            Their rounds, in the order in which they were dispatched.
        """

    @abstractmethod
    def next_end(self) -> float:
        """Virtual milliseconds at which the next rounds end; infinity if none is under way."""

    @abstractmethod
    def end(self) -> list[Round]:
        """Ends the rounds of :meth:`next_end`, and returns them in the order in which they are to be handled."""

    def all(self) -> Iterator[Round]:
        """All rounds, in the order of dispatch, if nobody stops the run; first those that are under way already."""
        yield from self.running if self._is_restored else self.begin(range(len(self._local_steps)), 0.0)
        while self.next_end() < math.inf:
            ended = self.end()
            yield from self.begin([r.worker for r in ended], ended[0].end)

    def leases(
        self, worker: int, steps_per_epoch: int, offset: int, is_endless: bool, done: int = 0
    ) -> Iterator[Lease]:
        """The data of one worker's rounds.

        Args:
            worker: Its global rank.
            steps_per_epoch: Local steps' worth of data in an epoch.
            offset: What to add to :attr:`Round.first`, so that it counts from the first epoch's beginning.
            is_endless: Whether there is more data after the last round: somebody may look ahead.
            done: Local steps of the worker's first round that it has done already.
        """
        last = None
        for dispatched in self.all():
            if dispatched.worker == worker:
                first, steps = dispatched.first + offset + done, dispatched.steps - done
                done = 0
                for last in split(first, steps, steps_per_epoch):
                    yield last
        while is_endless and last is not None:
            yield last

    def _take(self, steps: int) -> tuple[int, int]:
        """Hands out the data of so many steps. Returns where it begins, and how many there are."""
        first = self._next
        self._next += steps
        return first, steps

    @property
    def _left(self) -> float:
        return self._end - self._next


class AsynchronousRounds(Rounds):
    """Every worker's next round begins when its last one ends.

    Args:
        timing: The durations.
        local_steps: Local steps of a round of each worker.
        server_regions: Region of each worker's server.
        first: Local steps' worth of data that earlier runs were handed.
        budget: Local steps to hand out in this run.
    """

    def __init__(
        self,
        timing: Timing,
        local_steps: Sequence[int],
        server_regions: Sequence[int],
        first: int = 0,
        budget: float = math.inf,
    ) -> None:
        super().__init__(timing, local_steps, first, budget)
        self._server_regions = server_regions
        self._running: list[tuple[float, int, Round]] = []

    @property
    def running(self) -> list[Round]:
        return [dispatched for *_, dispatched in sorted(self._running)]

    def run_again(self, rounds: Sequence[Round]) -> None:
        self._running = [(r.end, r.worker, r) for r in rounds]
        heapq.heapify(self._running)

    def begin(self, workers: Sequence[int], now: float) -> list[Round]:
        begun = []
        for worker in workers:
            if self._left <= 0:
                break
            first, steps = self._take(self._steps(worker))
            end = now + self._timing.round(worker, self._server_regions[worker], steps)
            begun.append(Round(worker, now, end, first, steps, first // len(self._local_steps)))
            heapq.heappush(self._running, (end, worker, begun[-1]))
        return begun

    def next_end(self) -> float:
        return self._running[0][0] if self._running else math.inf

    def end(self) -> list[Round]:
        return [heapq.heappop(self._running)[-1]]

    def _steps(self, worker: int) -> int:
        steps = self._local_steps[worker]
        if self._left < math.inf:
            # Towards the end rounds get shorter, so that all workers have something to do until it is there.
            steps = min(steps, math.ceil(self._left / len(self._local_steps)))
        return steps


class SynchronousRounds(Rounds):
    """All workers' rounds begin together, and end together when the slowest is done and all have exchanged."""

    def __init__(self, timing: Timing, local_steps: Sequence[int], first: int = 0, budget: float = math.inf) -> None:
        super().__init__(timing, local_steps, first, budget)
        self._running: list[Round] = []
        self._all_reduce = timing.all_reduce() if len(local_steps) > 1 else 0.0

    @property
    def running(self) -> list[Round]:
        return list(self._running)

    def run_again(self, rounds: Sequence[Round]) -> None:
        self._running = list(rounds)

    def begin(self, workers: Sequence[int], now: float) -> list[Round]:
        workers = sorted(workers)
        wanted = [self._local_steps[worker] for worker in workers]
        if self._left < sum(wanted):
            # The last rounds: everybody gets an equal share.
            share, rest = divmod(int(self._left), len(self._local_steps))
            wanted = [min(steps, share + (worker < rest)) for worker, steps in zip(workers, wanted, strict=True)]
        chunks = [(w, *self._take(steps)) for w, steps in zip(workers, wanted, strict=True) if steps > 0]
        if not chunks:
            return []
        end = now + max(self._timing.compute(w, steps) for w, _, steps in chunks) + self._all_reduce
        self._running = [Round(w, now, end, first, steps, self._position(first)) for w, first, steps in chunks]
        return self._running

    def next_end(self) -> float:
        return self._running[0].end if self._running else math.inf

    def end(self) -> list[Round]:
        ended, self._running = self._running, []
        return ended

    def _position(self, first: int) -> int:
        """The global step; the same for all workers if all take equally many steps."""
        position = first // len(self._local_steps)
        if len(set(self._local_steps)) == 1:
            position -= position % self._local_steps[0]
        return position
