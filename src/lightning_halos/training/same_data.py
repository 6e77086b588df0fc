"""Notices workers with different training datasets, such as a dataset that the user has divided by rank.

Workers can only share data if an index means the same sample for all of them. What is compared are the lengths, the
data that the datasets hold, and a few samples, which ``sketches`` reads without effects here.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from lightning_halos.training.sketches import all_differ, all_equal, sketches
from lightning_halos.transport.collectives import Collectives

_SAMPLES = 4  # elements that are looked at, at the start and at the end of each sequence
_DEPTH = 4  # of datasets within datasets, and sequences within sequences


def can_share(collectives: Collectives, dataset: Dataset[Any] | None) -> bool:
    """Compares the datasets of all workers, and warns if they differ. All workers must call it together.

    Args:
        collectives: Collectives over all workers.
        dataset: This worker's dataset; ``None`` if it cannot be shared for another reason.

    Returns:
        Whether all datasets have the same length.
    """
    length = "" if dataset is None else str(len(dataset))  # type: ignore[arg-type]
    lengths, digests = zip(
        *(text.split() for text in collectives.gather_texts(f"{length or '-'} {digest(dataset)}")), strict=True
    )
    what = ""
    if len(set(lengths)) > 1:
        what = f"have different lengths ({', '.join(lengths)}, by rank), so they do not share them"
    elif len(lengths) > 1 and "-" not in lengths:
        first, *others = map(json.loads, collectives.gather_texts(json.dumps(sketches(dataset))))
        # A dataset may hold what it has read, and rank 0 may have validated with the same one before.
        if len(set(digests)) > 1 and not all(all_equal(first, other) for other in others):
            what = "have different contents"
        elif any(all_differ(first, other) for other in others):
            what = "have different samples at the same index"
    if what and "-" not in lengths:
        rank_zero_warn(
            f"The training datasets of the workers {what}. If the dataset is already divided by rank, Lightning's"
            " sampler divides it once more, and some samples are never used. Pass"
            " Trainer(use_distributed_sampler=False), with which each worker uses all of its own dataset; or give all"
            " workers the same complete dataset."
        )
    return len(set(lengths)) == 1 and dataset is not None


def digest(dataset: Any) -> int:
    """Returns a checksum of some of the data that a dataset holds in its attributes."""
    checksum = 0
    with suppress(Exception):  # a dataset may hold anything, and the checksum is only for a warning
        for part in _contents(dataset, _DEPTH):
            checksum = zlib.crc32(part, checksum)
    return checksum


def _contents(value: Any, depth: int) -> Iterator[bytes]:
    if isinstance(value, int | float | str | PurePath):  # machines may have a file in different folders
        yield os.path.basename(str(value)).encode()
    elif isinstance(value, bytes):
        yield value
    elif depth < 0:
        return
    elif _is_dense(value):
        rows = [
            value[row].reshape(-1)[:_SAMPLES].tolist() for row in (0, len(value) // 2, -1) if value.ndim and len(value)
        ]
        yield repr((tuple(value.shape), rows)).encode()
    elif isinstance(value, list | tuple | range | np.ndarray):
        yield str(len(value)).encode()
        for element in [*value[:_SAMPLES], *value[-_SAMPLES:]]:
            yield from _contents(element, depth - 1)
    elif isinstance(value, Mapping):
        for key in list(value)[:_SAMPLES]:
            yield str(key).encode()
            yield from _contents(value[key], depth - 1)
    elif isinstance(value, Dataset) or depth == _DEPTH:
        if type(value).__module__.startswith(
            "datasets."
        ):  # of Hugging Face: as stored, neither decoded nor transformed
            stored = value.with_format("arrow")
            yield from _contents([len(value), stored[0].to_pylist(), stored[-1].to_pylist()], depth)
            return
        for name, attribute in sorted(getattr(value, "__dict__", {}).items()):
            if isinstance(attribute, Tensor | np.ndarray | list | tuple | range | Dataset):
                yield name.encode()
                yield from _contents(attribute, depth - 1)


def _is_dense(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.layout is torch.strided and not value.is_nested
    return isinstance(value, np.ndarray) and not value.dtype.hasobject
