"""The progress bar of an epoch: a fast worker has more batches than a slow one, and nobody knows how many before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from tests.integration.toys import Toy, loader
from tests.integration.virtual import simulate

BATCHES = 16  # of an epoch, for each worker under DDP


class Watched(Toy):
    """Records what the bar shows after each batch: the batches of the epoch, and of how many."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[list[tuple[int, int]]] = []

    def on_train_epoch_start(self) -> None:
        self.shown.append([])

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_rank > 0:
            return
        bar: Any = self.trainer.progress_bar_callback
        if isinstance(bar, TQDMProgressBar):
            self.shown[-1].append((bar.train_progress_bar.n, bar.train_progress_bar.total))
        else:
            task = bar.progress.tasks[bar.train_progress_bar_id]
            assert task.speed is not None or len(self.shown[-1]) < 2, "the measured speed is not lost"
            self.shown[-1].append((int(task.completed), int(task.total)))

    def more(self) -> dict[str, Any]:
        return {"shown": self.shown}


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
@pytest.mark.parametrize("slow", [0, 1])
def test_it_is_full_when_the_epoch_ends_and_not_before(tmp_path: Path, bar: type[pl.Callback], slow: int) -> None:
    flags = {"max_epochs": 2, "callbacks": [bar()], "enable_progress_bar": True}
    first, *_ = simulate(tmp_path, Watched(), loader(), slow=slow, **flags)
    for epoch in first["shown"]:
        *before, (last, of) = epoch
        assert last == of == len(epoch)
        assert (of > BATCHES) == (slow > 0)
        assert all(batches < usual for batches, usual in before)
