"""Where a worker is in training data of its own, which workers do not share, for checkpoints.

A push that has not reached the server is not in a checkpoint, so a resumed worker uses the data of that round again.
How a position is restored is in ``worker_state``.
"""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl

_POSITION = ("state_dict", "epoch_progress", "epoch_loop.batch_progress")


class OwnData:
    """Remembers a worker's position in its data at the start of its round, with the states of its loaders.

    Args:
        trainer: The Trainer, at the start of training.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._loaders = self.position["state_dict"]
        self._round: dict[str, Any] | None = None

    @property
    def position(self) -> dict[str, Any]:
        """A copy of the present position, as in the state of Lightning's loop."""
        state = self._trainer.fit_loop.state_dict()
        return copy.deepcopy({name: state[name] for name in _POSITION})

    def begin_batch(self) -> None:
        """Completes the position at the start of the first round, when the loop has begun the first batch."""
        if self._round is None:
            self._round = {**self.position, "state_dict": self._loaders}
            progress = self._round["epoch_loop.batch_progress"]
            progress["is_last_batch"] = False
            for counts in (progress["total"], progress["current"]):
                counts["ready"] = counts["completed"]

    def begin_round(self) -> None:
        """Records the position at the start of a later round."""
        self._round = self.position

    def position_in(self, has_push: bool) -> dict[str, Any]:
        """Returns the position that belongs to a snapshot, which may have this round's push already."""
        return self.position if has_push or self._round is None else self._round
