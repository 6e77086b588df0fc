"""Where a worker is in training data of its own, which workers do not share, for checkpoints.

A push that has not reached the server is not in a checkpoint, so a resumed worker uses the data of that round again.
How a position is restored is in ``worker_state``.
"""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_halos.training.compat import epochs_of_training

_POSITION = ("state_dict", "epoch_progress", "epoch_loop.batch_progress")


class OwnData:
    """Remembers a worker's position in its data after its last two pushes, with the states of its loaders.

    Args:
        trainer: The Trainer, at the start of training.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._loaders = self.position["state_dict"]
        self._after: dict[int, dict[str, Any]] = {}  # by number of the push; after 0 the first round begins

    @property
    def position(self) -> dict[str, Any]:
        """A copy of the present position, as in the state of Lightning's loop."""
        state = self._trainer.fit_loop.state_dict()
        return copy.deepcopy({name: state[name] for name in _POSITION})

    def begin_batch(self) -> None:
        """Completes the position at the start of the first round, when the loop has begun the first batch."""
        if not self._after:
            position = {**self.position, "state_dict": self._loaders}
            progress = position["epoch_loop.batch_progress"]
            progress["is_last_batch"] = False
            for counts in (progress["total"], progress["current"]):
                counts["ready"] = counts["completed"]
            self._after[0] = position

    def end_round(self, push: int) -> None:
        """Records the position at the end of a round, given the number of its push."""
        before = {number: position for number, position in self._after.items() if number == push - 1}
        self._after = {**before, push: self.position}

    def position_in(self, pushed: int) -> dict[str, Any]:
        """Returns the position that belongs to a snapshot, given the number of the last push in it."""
        return self._after.get(pushed) or self.position


def steps_left(trainer: pl.Trainer) -> float:
    """Returns the local steps that a worker has left in training data of its own, if every batch of it is used.

    Args:
        trainer: The Trainer, at the start of training.

    Returns:
        The steps; infinite if the length of the data or the number of epochs is unknown, or may change.
    """
    batches, epochs = trainer.num_training_batches, epochs_of_training(trainer)
    if epochs is None or math.isinf(batches) or trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        return math.inf
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    changing = [callback for callback in callbacks if isinstance(callback, GradientAccumulationScheduler)]
    loop: Any = trainer.fit_loop
    first: int = loop.epoch_progress.current.processed
    present = loop.epoch_loop.batch_progress
    is_inside = loop.epoch_loop.restarting and not present.is_last_batch  # a resumed run, inside an epoch
    done: int = present.current.processed if is_inside else 0

    def accumulated(epoch: int) -> int:
        return changing[-1].get_accumulate_grad_batches(epoch) if changing else trainer.accumulate_grad_batches

    # There may be billions of epochs, but few epochs at which the accumulation changes.
    changes = [epoch for callback in changing for epoch in callback.scheduling]
    starts = sorted({first, *(epoch for epoch in changes if first < epoch < epochs)})
    lengths = [end - start for start, end in pairwise([*starts, epochs])]
    steps = sum(n * math.ceil(batches / accumulated(start)) for start, n in zip(starts, lengths, strict=True))
    return max(0, steps - done // accumulated(first))
