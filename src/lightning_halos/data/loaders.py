"""Loaders of training sequences."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader


class FilledLoader(DataLoader[Tensor]):
    """A loader that is an error if it has no batch, because Lightning would end the fit without a step.

    The number of batches is known when Lightning has put in its sampler, and is asked for before the first one is read.
    """

    def __len__(self) -> int:
        batches = super().__len__()
        if not batches:
            sampler: Any = self.sampler
            dataset: Any = self.dataset
            raise ValueError(
                f"batch_size={self.batch_size} is more than the {len(sampler)} training sequences of each process, of"
                f" {len(dataset)} in all. Use a smaller batch_size or context, fewer val_sequences or processes, or"
                " more text."
            )
        return batches
