"""The parts in which a vector travels: which there are, what a frame says of them, and their bytes in each format.

It knows no links. Which messages have which format is in ``core/wire_formats``, the formats in ``core/quantization``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_halos.core import description as descriptions
from lightning_halos.core.messages import RunDescription
from lightning_halos.core.quantization import FORMATS, Format, decode, encode, nbytes
from lightning_halos.core.vector import PART

_DTYPES = (torch.float32, torch.float64)
_NARROW = FORMATS[1:]


class VectorForm(NamedTuple):
    """The vectors on a link.

    Attributes:
        elements: Number of elements.
        dtype: ``torch.float32`` or ``torch.float64``.
        format: The format in which updates and differences of models travel.
        parameters: Elements that travel in this format. They come first; the others always travel as they are.
    """

    elements: int
    dtype: torch.dtype
    format: Format = "float32"
    parameters: int = 0

    @property
    def codes(self) -> list[int]:
        """The codes of vectors in frames that are accepted on the link."""
        return [code_of(self.dtype), *([] if self.format == "float32" else [code_of(self.dtype, self.format)])]

    def format_of(self, code: int) -> Format:
        """Returns the format of a vector that a frame announces with one of these codes."""
        return "float32" if code == code_of(self.dtype) else self.format

    @classmethod
    def of_run(cls, description: RunDescription) -> VectorForm:
        """Returns the form of a run's models on the links between its jobs."""
        elements, dtype = descriptions.form(description)
        return cls(elements, dtype, description.wire, sum(map(math.prod, description.shapes)))


class Part(NamedTuple):
    """A part of a vector: some elements in the format, and some as they are."""

    start: int
    narrow: int  # the element behind those in the format
    stop: int

    def nbytes(self, form: Format, itemsize: int) -> int:
        """Returns the number of bytes."""
        return nbytes(self.narrow - self.start, form, itemsize) + (self.stop - self.narrow) * itemsize

    def encode(self, vector: Tensor, form: Format) -> Tensor:
        """Returns the bytes of this part. Without elements in a narrow format, they share the vector's memory."""
        narrow, rest = vector[self.start : self.narrow], vector[self.narrow : self.stop].view(torch.uint8)
        if self.narrow == self.start:
            return rest
        data = encode(narrow, form)
        return torch.cat([data, rest]) if rest.numel() else data

    def decode(self, data: Tensor, vector: Tensor, form: Format) -> None:
        """Fills this part of a vector from its bytes."""
        narrow, rest = vector[self.start : self.narrow], vector[self.narrow : self.stop].view(torch.uint8)
        decode(data[: len(data) - len(rest)], narrow, form)
        rest.copy_(data[len(data) - len(rest) :])


def parts_of(vector: Tensor, form: Format, parameters: int) -> Iterator[Part]:
    """Yields the parts of a vector.

    Args:
        vector: The vector.
        form: Its format on the link.
        parameters: Elements in this format. They come first.
    """
    narrow = 0 if form == "float32" else parameters
    for start in range(0, vector.numel(), PART):
        stop = min(start + PART, vector.numel())
        yield Part(start, max(start, min(stop, narrow)), stop)


def code_of(dtype: torch.dtype, form: Format = "float32") -> int:
    """Returns the code of a vector in a frame."""
    return _DTYPES.index(dtype) if form == "float32" else len(_DTYPES) + _NARROW.index(form)
