"""The progress bar of an epoch that has more or fewer batches than it was expected to have."""

from __future__ import annotations

import math

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar


def show_batches_of_epoch(trainer: pl.Trainer) -> None:
    """Makes Lightning's progress bar end with the epoch. It must be called before the bar's hook.

    Lightning's bars read the number of batches at the start of an epoch, when nobody knows how many a worker will get.
    """
    bar, batches = trainer.progress_bar_callback, trainer.num_training_batches
    if not isinstance(bar, RichProgressBar | TQDMProgressBar) or not bar.is_enabled or not math.isfinite(batches):
        return
    if isinstance(bar, TQDMProgressBar) or bar.train_progress_bar_id is not None:  # else it is made after this hook
        bar.train_progress_bar.total = batches
