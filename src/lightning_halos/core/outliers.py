"""Which updates are too large to be taken in.

Rules of this room: numbers only, no tensors. The same norms in the same order get the same verdicts.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable


class NormLimit:
    """Refuses an update whose norm is many times the median of the recent ones.

    Refused norms enter the median, too: if updates have become larger for good, they are refused only until they are
    more than half of the last :attr:`WINDOW`, and nobody is locked out for ever.

    Args:
        max_norm_ratio: The largest norm that is taken in, as a multiple of the median.

    Attributes:
        norms: The norms of the last updates, the oldest first.
    """

    WINDOW = 64
    """Updates whose norms are remembered."""
    ENOUGH = 16
    """Updates before which nothing is refused."""

    def __init__(self, max_norm_ratio: float) -> None:
        self.norms: deque[float] = deque(maxlen=self.WINDOW)
        self._max_norm_ratio = max_norm_ratio

    def fault(self, norm: float) -> str | None:
        """Takes note of an update's norm. Returns what is wrong with it, ``None`` if nothing is."""
        fault = None
        if len(self.norms) >= self.ENOUGH:
            # Of two in the middle the lower one: if every second update is too large, they stay refused.
            median = statistics.median_low(self.norms)
            if norm > self._max_norm_ratio * median:
                fault = (
                    f"its norm of {norm:.3g} is {norm / median:.3g} times the median of the last {len(self.norms)} here"
                    f" (max_norm_ratio={self._max_norm_ratio:g})"
                )
        if norm > 0:  # a learning rate of 0 says nothing about how large updates are
            self.norms.append(norm)
        return fault

    def load(self, norms: Iterable[float]) -> None:
        """Goes on from the :attr:`norms` of another."""
        self.norms = deque(norms, maxlen=self.WINDOW)
