"""How much work there is, who does how much of it per round, and which step it counts as.

Rules of this room: numbers only, no tensors, no clock. Seconds come in as arguments.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


def dynamic_local_steps(local_steps: int, speed: float, fastest: float) -> int:
    """Local steps per round of a worker, so that all workers' rounds take about equally long (HALoS, section 4.1).

    ``max(1, ceil(local_steps * (speed / fastest)))``, in this order: the fastest runs exactly ``local_steps``.

    Args:
        local_steps: Local steps per round of the fastest worker (``H``).
        speed: Local steps per second of the worker.
        fastest: Local steps per second of the fastest worker.
    """
    return max(1, math.ceil(local_steps * (speed / fastest)))


@dataclass
class StepBudget:
    """Counts the local steps of all workers against the work that was ordered.

    Attributes:
        workers: Number of workers.
        max_steps: Global steps that were ordered, ``None`` for no limit. One global step is one local step per worker.
        total: Local steps that all workers have finished.
    """

    workers: int
    max_steps: int | None = None
    total: int = 0

    @property
    def position(self) -> int:
        """Global steps so far, rounded down."""
        return global_step(self.total, self.workers, self.max_steps)

    @property
    def exhausted(self) -> bool:
        """Whether the ordered work is done."""
        return self.max_steps is not None and self.total >= self.max_steps * self.workers


def global_step(total: int, workers: int, max_steps: int | None) -> int:
    """Local steps of all workers, divided by their number, rounded down, and never beyond ``max_steps``."""
    position = total // workers
    return position if max_steps is None else min(position, max_steps)


class RoundPlanner:
    """Decides how many local steps a worker runs in its next round.

    Args:
        local_steps: Local steps per round of the fastest worker (``H``).
        dynamic: Whether slower workers run fewer, by their measured speed. Otherwise all run ``local_steps``.
        workers: Number of workers of the whole run.
        max_steps: Global steps that were ordered, ``None`` for no limit. Towards the end rounds get shorter, so that
            the run ends close to it.
        speeds: Speed of each worker by rank, on any scale, if speeds are known and need not be measured.

    Attributes:
        fastest: Local steps per second of the fastest worker known, 0 before the first measurement.
    """

    # Weight of the newest measurement in a worker's speed: follows a change within a few rounds and damps noise.
    _NEWEST = 0.5

    def __init__(
        self,
        local_steps: int,
        dynamic: bool,
        workers: int,
        max_steps: int | None = None,
        speeds: Mapping[int, float] | None = None,
    ) -> None:
        self._local_steps = local_steps
        self._dynamic = dynamic
        self._workers = workers
        self._max_steps = max_steps
        self._are_known = speeds is not None
        self._speeds: dict[int, float] = dict(speeds or {})
        self._fastest_elsewhere = 0.0

    @property
    def fastest(self) -> float:
        return max([self._fastest_elsewhere, *self._speeds.values()])

    @property
    def fastest_here(self) -> float:
        """Local steps per second of the fastest worker that was measured here, 0 before the first measurement."""
        return max(self._speeds.values(), default=0.0)

    def measure(self, worker: int, steps: int, seconds: float) -> None:
        """Takes the time of a finished round into account."""
        if steps > 0 and seconds > 0 and not self._are_known:
            speed = steps / seconds
            known = self._speeds.get(worker, speed)
            self._speeds[worker] = known + self._NEWEST * (speed - known)

    def hear_of(self, fastest: float) -> None:
        """Learns the speed of the fastest worker of all regions."""
        if not self._are_known:
            self._fastest_elsewhere = fastest

    def state_dict(self) -> dict[str, Any]:
        """Returns what was measured and heard."""
        return {"speeds": dict(self._speeds), "fastest_elsewhere": self._fastest_elsewhere}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of :meth:`state_dict`."""
        if self._are_known:
            return
        self._speeds = dict(state["speeds"])
        self._fastest_elsewhere = state["fastest_elsewhere"]

    def known_steps(self, worker: int) -> int:
        """Local steps of a round of a worker whose speed is known; 1 before the first measurement."""
        if worker not in self._speeds:
            return 1
        return dynamic_local_steps(self._local_steps, self._speeds[worker], self.fastest)

    def local_steps(self, worker: int, total: int) -> int:
        """Local steps of the worker's next round.

        Args:
            worker: Global rank of the worker.
            total: Local steps that all workers have finished.
        """
        steps = self._local_steps
        if self._dynamic and worker in self._speeds:
            steps = dynamic_local_steps(steps, self._speeds[worker], self.fastest)
        if self._max_steps is not None:
            remaining = self._max_steps * self._workers - total
            steps = min(steps, max(1, math.ceil(remaining / self._workers)))
        return steps


def next_count(shown: int, target: int, periods: Iterable[int]) -> int:
    """Moves a step counter forward, stopping at multiples that somebody waits for.

    The global step grows by more than one per local step of a slow worker, yet Lightning acts when its counter is a
    multiple of a period (``log_every_n_steps``, ``every_n_train_steps``).

    Args:
        shown: The counter now.
        target: Where it should be. A target behind ``shown`` leaves the counter where it is.
        periods: Those whose multiples are stopped at: of several multiples of a period in the way, at the last.

    Returns:
        ``target``, or the multiple before it at which to stop first.
    """
    stops = [target]
    for period in periods:
        multiple = target // period * period
        if multiple > shown:
            stops.append(multiple)
    return max(shown, min(stops))
