"""Detects updates that are too large, by their norms alone.

It is deterministic: the same norms in the same order give the same result, in real runs and in simulations.
"""

from __future__ import annotations

import statistics
from collections import deque


class NormLimit:
    """Rejects an update if its norm is many times the median of the recent norms.

    Norms of rejected updates enter the median, too. So if updates have become larger for good, they are rejected only
    until they are more than half of the last :attr:`WINDOW` updates.

    Args:
        max_norm_ratio: The largest accepted norm, as a multiple of the median.

    Attributes:
        norms: The norms of the last updates, the oldest first.
    """

    WINDOW = 64
    """Number of recent norms that the median is computed from."""
    ENOUGH = 16
    """Number of norms before which nothing is rejected."""

    def __init__(self, max_norm_ratio: float) -> None:
        self.norms: deque[float] = deque(maxlen=self.WINDOW)
        self._max_norm_ratio = max_norm_ratio

    def fault(self, norm: float) -> str | None:
        """Records an update's norm. Returns why it is rejected, ``None`` if it is accepted."""
        fault = None
        if len(self.norms) >= self.ENOUGH:
            # The lower of two middle values, so that outliers stay rejected even if they are every second update.
            median = statistics.median_low(self.norms)
            if norm > self._max_norm_ratio * median:
                fault = (
                    f"its norm of {norm:.3g} is {norm / median:.3g} times the median of the last {len(self.norms)} here"
                    f" (max_norm_ratio={self._max_norm_ratio:g})"
                )
        if norm > 0:  # a zero update (learning rate 0) says nothing about the usual size
            self.norms.append(norm)
        return fault
