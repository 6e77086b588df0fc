"""Reads a few samples of a dataset, so that workers can compare them. What a difference means is in ``same_data``.

The samples are read in a forked process that soon ends: reading may take long, fail, draw random numbers or move
through open files, and ``forked`` keeps these effects from this process. Only plain tensors are read directly. Samples
are not compared bit for bit, because the machines of a run may round and decode differently.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_halos.training.forked import in_forked_process

Leaf = str | list[float] | None
"""A part of a sample: a text that must be equal, numbers that must be close, or ``None`` for what is random."""
Sketch = list[Leaf] | None
"""A sample; ``None`` if its form is random."""

SECONDS = 1.0
"""Limit for all reads."""
_READS = 4  # of each sample, to recognize what is random
_LEAVES = 32  # of a sample
_NUMBERS = 16  # of an array
_DEPTH = 4
_CLOSE = 0.02  # of the largest number, for numbers that do not surely differ
_EQUAL = 1e-5  # likewise, for numbers that machines have rounded differently


def sketches(dataset: Any) -> list[Sketch]:
    """Returns sketches of the first, the middle and the last sample; none if they cannot be read in time."""
    with contextlib.suppress(Exception):  # a dataset may hold anything, and sketches are only for a warning
        if type(dataset) is TensorDataset and all(map(_is_plain_tensor, dataset.tensors)):  # reading it has no effects
            return [_sketch(dataset, index) for index in _indices(dataset)]
        return json.loads(in_forked_process(lambda: json.dumps(_read(dataset)), SECONDS))  # type: ignore[no-any-return]
    return []


def all_differ(mine: Sequence[Sketch], others: Sequence[Sketch]) -> bool:
    """Whether two workers' samples at the same indices all differ, as in datasets that are divided by rank."""
    return 0 < len(mine) == len(others) and all(map(_differ, mine, others))


def all_equal(mine: Sequence[Sketch], others: Sequence[Sketch]) -> bool:
    """Whether two workers' samples at the same indices were read, are all the same, and have nothing random in them."""
    return 0 < len(mine) == len(others) and all(map(_are_equal, mine, others))


def _are_equal(first: Sketch, second: Sketch) -> bool:
    if first is None or second is None or None in first or None in second:
        return False
    return not _differ(first, second, _EQUAL)


def _differ(first: Sketch, second: Sketch, close: float = _CLOSE) -> bool:
    if first is None or second is None:
        return False
    return len(first) != len(second) or not all(_is_same(*pair, close) for pair in zip(first, second, strict=True))


def _is_same(first: Leaf, second: Leaf, close: float) -> bool:
    if first is None or second is None:
        return True
    if isinstance(first, str) or isinstance(second, str):
        return first == second
    tolerance = close * max(map(abs, [0.0, *first, *second]))
    return len(first) == len(second) and all(
        math.isclose(a, b, rel_tol=0.0, abs_tol=tolerance) for a, b in zip(first, second, strict=True)
    )


def _read(dataset: Any) -> list[Sketch]:
    return [_what_stays([_sketch_seeded(dataset, index) for _ in range(_READS)]) for index in _indices(dataset)]


def _is_plain_tensor(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_nested


def _indices(dataset: Any) -> list[int]:
    return sorted({0, len(dataset) // 2, len(dataset) - 1}) if len(dataset) else []


def _sketch_seeded(dataset: Any, index: int) -> list[Leaf]:
    torch.manual_seed(0)  # random augmentation is the same for all workers, mostly
    np.random.seed(0)
    random.seed(0)
    return _sketch(dataset, index)


def _sketch(dataset: Any, index: int) -> list[Leaf]:
    return list(islice(_leaves(dataset[index], _DEPTH), _LEAVES))


def _what_stays(reads: list[list[Leaf]]) -> Sketch:
    if len(set(map(len, reads))) > 1:
        return None
    return [leaves[0] if all(leaf == leaves[0] for leaf in leaves) else None for leaves in zip(*reads, strict=True)]


def _leaves(value: Any, depth: int) -> Iterator[Leaf]:
    if depth < 0:
        return
    if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested:
        value = value.detach().cpu()
        yield from _of_array((value.float() if value.dtype is torch.bfloat16 else value).resolve_conj().numpy())
    elif isinstance(value, float):
        yield from _of_array(np.array(value))
    elif isinstance(value, str | bytes | int | None):
        yield f"{zlib.crc32(repr(value).encode())}"
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield str(key)
            yield from _leaves(part, depth - 1)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part, depth - 1)
    elif dataclasses.is_dataclass(value):
        yield from _leaves(vars(value), depth)
    elif hasattr(value, "__array_interface__"):  # arrays, and pictures
        array = np.asarray(value)
        yield from _leaves(array.tolist(), depth - 1) if array.dtype.hasobject else _of_array(array)
    else:
        yield type(value).__name__


def _of_array(array: np.ndarray[Any, Any]) -> Iterator[Leaf]:
    yield f"{array.shape}"
    if array.dtype.kind not in "fc" and array.dtype != np.uint8:
        yield f"{zlib.crc32(array.tobytes())}"
    elif array.size:
        flat = array.reshape(-1)
        flat = np.abs(flat) if array.dtype.kind == "c" else flat.astype(np.float64)
        some = flat[np.linspace(0, flat.size - 1, min(flat.size, _NUMBERS)).astype(int)]
        yield np.nan_to_num([*some, flat.mean(), flat.std()]).tolist()
