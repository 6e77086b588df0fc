"""The formats in which vectors travel: a vector as bytes, and back. Nothing here has state, or knows messages.

``int8`` and ``int4`` have blocks of 64 elements. A block has a scale, which is a bfloat16 number, and for each element
a whole number ``k`` from -127 to 127, or from -7 to 7: the element is ``k * scale``. This product is exact in float32,
so that a vector which was decoded is encoded without another error, to the same bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_halos.core.vector import CHUNK, PART

Format = Literal["float32", "bfloat16", "int8", "int4"]
"""``float32`` stands for the vector as it is, which is ``float64`` if the model has parameters of this dtype."""

FORMATS: tuple[Format, ...] = get_args(Format)

BLOCK = 64
"""Elements that share a scale."""
assert PART % CHUNK == CHUNK % BLOCK == 0

_MOST = {"int8": 127, "int4": 7}  # the largest whole number; the smallest is its negative, so that 0 is exact
_BLOCK_BYTES = {"int8": BLOCK + 2, "int4": BLOCK // 2 + 2}  # the numbers, and the scale
_CHUNK_OF_DEVICE = 2**24  # elements that are converted at once on a GPU, where starting a computation takes longer
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def check_format(name: str, value: Any) -> None:
    """Raises a ``ValueError`` unless a value is the name of a format."""
    if not isinstance(value, str) or value not in FORMATS:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, FORMATS))}.")


def nbytes(elements: int, form: Format, itemsize: int = 4) -> int:
    """Returns the bytes of an encoded vector.

    Args:
        elements: Number of elements.
        form: The format.
        itemsize: Bytes of an element of the vector itself.
    """
    if form in _BLOCK_BYTES:
        return -(-elements // BLOCK) * _BLOCK_BYTES[form]
    return elements * (2 if form == "bfloat16" else itemsize)


def encode(vector: Tensor, form: Format) -> Tensor:
    """Returns a vector as bytes: first the numbers of all blocks, then their scales.

    In ``int8`` and ``int4``, a block that has NaN or infinite values becomes NaN. Finite values become finite values;
    a block whose scale would be a denormal number becomes 0.

    Args:
        vector: A contiguous tensor of shape (elements,) and dtype ``float32`` or ``float64``.
        form: The format.

    Returns:
        A ``uint8`` tensor of shape (``nbytes(elements, form)``,), on the vector's device. In the format ``float32`` it
        shares the vector's memory.
    """
    if form == "float32":
        return vector.view(torch.uint8)
    data = vector.new_empty(nbytes(vector.numel(), form, vector.itemsize), dtype=torch.uint8)
    if form == "bfloat16":
        halves = data.view(torch.bfloat16)
        for part in _chunks(vector):
            halves[part] = _narrowed(vector[part], torch.bfloat16)
        return data
    numbers, scales = _parts(data, vector.numel(), form)
    for part, rows in _block_chunks(vector):
        found, scale = _quantized(_blocks(vector[part]), form)
        scales[rows] = scale
        if form == "int4":
            numbers[rows] = found[:, : BLOCK // 2].add_(found[:, BLOCK // 2 :], alpha=16)
        else:
            numbers[rows] = found
    return data


def decode(data: Tensor, out: Tensor, form: Format) -> None:
    """Fills a vector with the values of :func:`encode`.

    Args:
        data: The bytes.
        out: A contiguous tensor of shape (elements,), on the same device.
        form: The format.
    """
    if form in ("float32", "bfloat16"):
        out.copy_(data.view(out.dtype if form == "float32" else torch.bfloat16))
        return
    numbers, scales = _parts(data, out.numel(), form)
    for part, rows in _block_chunks(out):
        target = out[part]
        if is_complete := target.numel() % BLOCK == 0:
            blocks = target.view(-1, BLOCK)
        else:
            blocks = target.new_empty(rows.stop - rows.start, BLOCK)
        own, scale = numbers[rows], scales[rows].float()
        if form == "int4":  # a byte is the first number plus 16 times the second one
            second = (own + 8).bitwise_right_shift_(4)
            torch.mul(torch.sub(own, second, alpha=16), scale, out=blocks[:, : BLOCK // 2])
            torch.mul(second, scale, out=blocks[:, BLOCK // 2 :])
        else:
            torch.mul(own, scale, out=blocks)
        if not is_complete:
            target.copy_(blocks.view(-1)[: target.numel()])


def round_(vector: Tensor, form: Format) -> Tensor:
    """Rounds a vector in place to what :func:`decode` makes of :func:`encode`, bit for bit, and returns it."""
    if form == "bfloat16":
        for part in _chunks(vector):
            vector[part] = _narrowed(vector[part], torch.bfloat16)
    elif form != "float32":
        for part, _ in _block_chunks(vector):
            found, scale = _quantized(_blocks(vector[part]), form)
            found.add_(0.0).mul_(scale)  # adding makes -0 to 0, which is the same whole number
            vector[part] = found.view(-1)[: part.stop - part.start]
    return vector


def _quantized(blocks: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Returns the whole numbers (as ``float32``, of the blocks' shape) and the scales (of shape (blocks, 1))."""
    most = _MOST[form]
    largest_scale = _bfloat16_below(_LARGEST / most)
    found = blocks.abs()
    largest = found.amax(1, keepdim=True)
    scale = (largest / most).clamp_(max=largest_scale).add_(largest - largest)  # which is NaN if it is infinite
    scale = scale.bfloat16().float()
    scale.mul_(scale >= _SMALLEST)
    inverse = scale.reciprocal().masked_fill_(~(scale > 0), 0.0)
    torch.mul(blocks, inverse, out=found).round_()
    if not bool((scale < largest_scale).all()):  # there are NaN, infinite or huge values
        found.nan_to_num_(0.0).clamp_(-most, most)
    return found, scale


def _parts(data: Tensor, elements: int, form: Format) -> tuple[Tensor, Tensor]:
    """Returns the two parts of encoded bytes: the whole numbers, a row for each block, and the scales, likewise."""
    blocks = -(-elements // BLOCK)
    width = _BLOCK_BYTES[form] - 2
    numbers, scales = data[: blocks * width], data[blocks * width :]
    return numbers.view(torch.int8).view(blocks, width), scales.view(torch.bfloat16).view(blocks, 1)


def _blocks(values: Tensor) -> Tensor:
    """Returns the values as rows of a block each, in ``float32``, and zeros behind the last one."""
    values = _narrowed(values, torch.float32)
    if missing := -values.numel() % BLOCK:
        values = torch.nn.functional.pad(values, (0, missing))
    return values.view(-1, BLOCK)


def _narrowed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the values in a narrower dtype, in which those that are finite stay finite."""
    narrow = values.to(dtype)
    if narrow.dtype != values.dtype and not bool(torch.isfinite(narrow.sum())):
        limit = torch.finfo(dtype).max
        narrow = torch.where(torch.isfinite(values), values.clamp(-limit, limit), values).to(dtype)
    return narrow


def _chunks(vector: Tensor) -> Iterator[slice]:
    size, elements = CHUNK if vector.device.type == "cpu" else _CHUNK_OF_DEVICE, vector.numel()
    for start in range(0, elements, size):
        yield slice(start, min(start + size, elements))


def _block_chunks(vector: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yields ranges of the vector, and of its blocks. Only the last block may be incomplete; it has its own range."""
    complete = vector.numel() // BLOCK * BLOCK
    for part in _chunks(vector[:complete]):
        yield part, slice(part.start // BLOCK, part.stop // BLOCK)
    if complete < vector.numel():
        yield slice(complete, vector.numel()), slice(complete // BLOCK, complete // BLOCK + 1)


def _bfloat16_below(value: float) -> float:
    """Returns the largest bfloat16 number that is not above a positive number."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0] & 0xFFFF0000
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])
