"""What a search minimizes: a loss at a virtual time, or the virtual time to a loss. Numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

Mode = Literal["min", "max"]

RUNGS = (1 / 3, 2 / 3)
"""Parts of the virtual time at which bad trials end.

Not earlier, because losses under different rates cross: among the 14 settings of HALoS in
``docs/time_to_loss/search.json``, the rank of the loss after a quarter of the run has a correlation of 0.6 with that of
the final loss, after a third 0.7, and after two thirds 0.9. The best one was the third best after a third.
"""


class Point(NamedTuple):
    """A validation of the global model."""

    step: int  # global
    seconds: float  # virtual, at which the model was there
    value: float  # of the metric


@dataclass(frozen=True)
class Goal:
    """What a search minimizes.

    Attributes:
        seconds: Virtual seconds that each trial may use.
        monitor: The metric, which the module logs in validation.
        mode: Whether lower or higher values are better.
        target: A value of the metric, and the virtual time to it counts. ``None``: the metric at the end counts.
    """

    seconds: float
    monitor: str = "val_loss"
    mode: Mode = "min"
    target: float | None = None

    def losses(self, curve: Sequence[Point]) -> list[float]:
        """Returns the values of a curve, negative ones of a metric that is to be high, so that lower is better."""
        return [point.value if self.mode == "min" else -point.value for point in curve]

    def at(self, curve: Sequence[Point], part: float) -> float | None:
        """Returns the loss at a part of the virtual time, between two validations in a straight line.

        ``None`` if the curve has not come so far.
        """
        if not curve or curve[-1].seconds < part * self.seconds:
            return None
        return float(np.interp(part * self.seconds, [point.seconds for point in curve], self.losses(curve)))

    def value(self, curve: Sequence[Point]) -> float:
        """Returns what a complete curve is worth; lower is better.

        With a target that was not reached, it is more than :attr:`seconds`, by the relative distance from it.
        """
        losses = self.losses(curve)
        if self.target is None:
            return losses[-1]
        target = self.target if self.mode == "min" else -self.target
        time = time_to_reach(target, [point.seconds for point in curve], losses)
        if np.isnan(time):
            return self.seconds * (1 + (min(losses) - target) / max(abs(target), 1e-6))
        return time

    def is_reached(self, curve: Sequence[Point]) -> bool:
        """Whether a curve has reached the target, so that the rest of it cannot change its value."""
        if self.target is None or not curve:
            return False
        return min(self.losses(curve)) <= (self.target if self.mode == "min" else -self.target)

    def shown(self, value: float) -> float:
        """Returns a value of :meth:`value` as the metric, or as virtual seconds."""
        return -value if self.mode == "max" and self.target is None else value

    def describe(self, value: float) -> str:
        """Returns a value of :meth:`value` as a text for people."""
        if self.target is None:
            return f"{self.shown(value):.4g}"
        if value <= self.seconds:
            return f"{value / 3600:.4g} h"
        return f"not reached ({value / self.seconds - 1:.1%} off)"

    @property
    def title(self) -> str:
        """What the values of :meth:`value` are, for people."""
        if self.target is None:
            return f"{self.monitor} after {self.seconds / 3600:.4g} virtual hours"
        return f"virtual time to {self.monitor} {self.target:g}"


def time_to_reach(target: float, times: Sequence[float], losses: Sequence[float]) -> float:
    """The time at which a loss is down at a target: interpolated on the running minimum; nan if it never is."""
    lowest = np.minimum.accumulate(losses)
    is_new = np.diff(lowest, prepend=np.inf) < 0
    return float(np.interp(-target, -lowest[is_new], np.array(times)[is_new], right=np.nan))
