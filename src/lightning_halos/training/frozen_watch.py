"""Notices frozen parameters that a module changes itself, although nothing says what happens with them.

Whether they are sent is decided before training, in ``core/buffers``; here is only the advice.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_halos.core.buffers import ATTRIBUTE, Entry, summary
from lightning_halos.core.teachers import is_plain

_SAMPLE = 256  # elements of each parameter that are looked at


class FrozenWatch:
    """Looks at the ends of the first, second, fourth ... and last round, until it has warned once.

    Args:
        entries: The module's buffers and frozen parameters.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        mine = [entry for entry in entries if entry.is_parameter and entry.rule == "first" and not entry.is_asked]
        self._entries = [entry for entry in mine if is_plain(entry.tensor)]
        self._before = [_sample(entry.tensor).clone() for entry in self._entries]
        self._rounds = 0

    def end_round(self, is_last: bool) -> None:
        """Compares the parameters with their values at the start of the fit."""
        self._rounds += 1
        if not self._entries or (self._rounds & (self._rounds - 1) and not is_last):
            return
        now = [_sample(entry.tensor) for entry in self._entries]
        # All comparisons are queued before the first result is awaited.
        pairs = zip(self._before, now, strict=True)
        differ = [before.shape != after.shape or (before.to(after.device) != after).any() for before, after in pairs]
        if names := [entry.path for entry, differs in zip(self._entries, differ, strict=True) if differs]:
            self._entries, self._before = [], []
            rank_zero_warn(
                f"The module changes frozen parameters itself: {summary(names)}. Each worker has its own in this fit,"
                f" and all have rank 0's afterwards. If they are averages, such as a teacher, set {ATTRIBUTE} = {{name:"
                " 'mean'} in the module, so that they are averaged over the workers; otherwise {name: 'first'}. They"
                " would be averaged if they had started with the values of the parameters that they follow."
            )


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)]
