"""The step budget of a run, the local steps of a round, and the global step: numbers only, no tensors and no clock."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


def dynamic_local_steps(local_steps: int, speed: float, fastest: float) -> int:
    """Returns a worker's local steps per round, such that all rounds take about equally long (HALoS, section 4.1).

    Args:
        local_steps: Local steps per round of the fastest worker (``H``).
        speed: Local steps per second of the worker.
        fastest: Local steps per second of the fastest worker.
    """
    # With this order of operations, the fastest worker runs exactly `local_steps`.
    return max(1, math.ceil(local_steps * (speed / fastest)))


@dataclass
class StepBudget:
    """Compares the local steps of all workers with the ordered number of steps."""

    workers: int  # their number
    max_steps: int | None = None  # ordered global steps: one is one local step per worker; None for no limit
    total: int = 0  # local steps that all workers together have finished

    @property
    def position(self) -> int:
        """Global steps so far, rounded down."""
        return global_step(self.total, self.workers, self.max_steps)

    @property
    def exhausted(self) -> bool:
        """Whether all ordered steps are finished."""
        return self.max_steps is not None and self.total >= self.max_steps * self.workers


def global_step(total: int, workers: int, max_steps: int | None) -> int:
    """Returns the local steps of all workers, divided by their number and rounded down, but at most ``max_steps``."""
    position = total // workers
    return position if max_steps is None else min(position, max_steps)


class RoundPlanner:
    """Decides how many local steps a worker runs in its next round.

    Args:
        local_steps: Local steps per round of the fastest worker (``H``).
        dynamic: Whether slower workers run fewer local steps, by their measured speed. Otherwise all run
            ``local_steps``.
        workers: Number of workers of the complete run.
        max_steps: Ordered global steps, ``None`` for no limit. Towards the end rounds get shorter, so that the run
            ends close to it.
        speeds: Speed of each worker by rank, on any scale, if speeds are known and need not be measured.

    Attributes:
        fastest: Local steps per second of the fastest known worker, 0 before the first measurement.
    """

    # Weight of the newest measurement in a worker's speed: it follows a change within a few rounds, and damps noise.
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
        self._fastest_overall = 0.0

    @property
    def fastest(self) -> float:
        return max([self._fastest_overall, *self._speeds.values()])

    @property
    def fastest_here(self) -> float:
        """Local steps per second of the fastest worker of this server, 0 before the first measurement."""
        return max(self._speeds.values(), default=0.0)

    def measure(self, worker: int, steps: int, seconds: float) -> None:
        """Updates a worker's speed with the duration of a finished round."""
        if steps > 0 and seconds > 0 and not self._are_known:
            speed = steps / seconds
            known = self._speeds.get(worker, speed)
            self._speeds[worker] = known + self._NEWEST * (speed - known)

    def set_fastest_overall(self, fastest: float) -> None:
        """Sets the speed of the fastest worker of all regions, in local steps per second."""
        if not self._are_known:
            self._fastest_overall = fastest

    def state_dict(self) -> dict[str, Any]:
        """Returns the measured speeds."""
        return {"speeds": dict(self._speeds), "fastest_overall": self._fastest_overall}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state of :meth:`state_dict`."""
        if self._are_known:
            return
        self._speeds = dict(state["speeds"])
        self._fastest_overall = state["fastest_overall"]

    def known_steps(self, worker: int) -> int:
        """Returns a worker's local steps per round by its speed, or 1 before its first measurement."""
        if worker not in self._speeds:
            return 1
        return dynamic_local_steps(self._local_steps, self._speeds[worker], self.fastest)

    def local_steps(self, worker: int, total: int) -> int:
        """Returns the local steps of a worker's next round, given those that all workers together have finished."""
        steps = self._local_steps
        if self._dynamic and worker in self._speeds:
            steps = self.known_steps(worker)
        share = self.share(total)
        return steps if share is None else min(steps, share)

    def share(self, total: int) -> int | None:
        """Returns a worker's share of the local steps that are left, at least 1; ``None`` without ``max_steps``."""
        if self._max_steps is None:
            return None
        remaining = self._max_steps * self._workers - total
        return max(1, math.ceil(remaining / self._workers))


def next_count(shown: int, target: int, periods: Iterable[int]) -> int:
    """Returns the next value of a step counter, which must not skip multiples of certain periods.

    The global step grows by more than one per local step of a slow worker, but Lightning acts when its counter is a
    multiple of a period (``log_every_n_steps``, ``every_n_train_steps``).

    Args:
        shown: The counter now.
        target: The value to reach. If it is less than ``shown``, the counter does not change.
        periods: The periods. If several multiples of a period are on the way, the counter stops at the last one.
    """
    multiples = [target // period * period for period in periods]
    return max(shown, min([target, *(multiple for multiple in multiples if multiple > shown)]))
