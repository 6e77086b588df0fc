"""How the vector of a model is cut into the slices that the lanes of a worker carry.

A worker of several processes has a lane for each of them. Server optimizers work element by element, so each lane has
servers of its own, for its slice of the vector. This file computes the slices; it sends nothing and knows no modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Move(NamedTuple):
    """Elements that are in one lane's slice of a layout, and in another lane's slice of another layout."""

    lane: int  # of the old layout
    source: slice  # elements of the old slice
    target: slice  # the same elements in the new slice


@dataclass(frozen=True)
class Layout:
    """The slices of all lanes.

    Every lane has a piece of every tensor of the vector, which may be empty. The pieces of a tensor are ranges of its
    elements in row-major order, in the order of the lanes.

    Attributes:
        num_tensors: Number of the vector's tensors that are parameters. They come first, the averaged tensors follow.
        bounds: For each tensor of the vector, the first element of each lane's piece, and the tensor's size.
    """

    num_tensors: int
    bounds: tuple[tuple[int, ...], ...]

    @classmethod
    def build(
        cls, sizes: Sequence[int], num_tensors: int, lanes: int, shards: Mapping[int, Sequence[int]] | None = None
    ) -> Layout:
        """Divides a vector among lanes.

        Args:
            sizes: Elements of each tensor of the vector: first the parameters, then the averaged tensors.
            num_tensors: Number of parameters among them.
            lanes: Number of lanes.
            shards: Elements of each lane's piece, by the index of the tensor, for the tensors that the worker's
                processes share out among them. The others are cut into equal parts: the parameters together, and the
                averaged tensors together.

        Raises:
            ValueError: If the pieces of a tensor do not have its size.
        """
        if lanes < 1:
            raise ValueError(f"lanes={lanes} must be at least 1.")
        shards = {} if shards is None else shards
        bounds: dict[int, tuple[int, ...]] = {}
        for index, pieces in shards.items():
            bounds[index] = tuple(accumulate(pieces, initial=0))
            if len(pieces) != lanes or bounds[index][-1] != sizes[index]:
                raise ValueError(
                    f"The pieces of tensor {index} have {list(pieces)} elements, but {lanes} lane(s) must share"
                    f" {sizes[index]}."
                )
        for group in (range(num_tensors), range(num_tensors, len(sizes))):
            others = [index for index in group if index not in shards]
            total, start = sum(sizes[index] for index in others), 0
            ends = [total * lane // lanes for lane in range(lanes + 1)]
            for index in others:
                bounds[index] = (*(min(max(end - start, 0), sizes[index]) for end in ends[:-1]), sizes[index])
                start += sizes[index]
        return cls(num_tensors, tuple(bounds[index] for index in range(len(sizes))))

    @property
    def lanes(self) -> int:
        """Number of lanes."""
        return len(self.bounds[0]) - 1

    @cached_property
    def elements(self) -> int:
        """Elements of the complete vector."""
        return sum(bounds[-1] for bounds in self.bounds)

    @cached_property
    def parameters(self) -> int:
        """Elements of the complete vector that belong to parameters. They come first."""
        return sum(bounds[-1] for bounds in self.bounds[: self.num_tensors])

    def undivided(self) -> Layout:
        """Returns the layout of the same vector in one lane."""
        return Layout(self.num_tensors, tuple((0, bounds[-1]) for bounds in self.bounds))

    def sizes(self, lane: int) -> list[int]:
        """Returns the elements of a lane's piece of each tensor."""
        return [bounds[lane + 1] - bounds[lane] for bounds in self.bounds]

    def elements_of(self, lane: int) -> int:
        """Returns the elements of a lane's slice."""
        return sum(self.sizes(lane))

    def parameters_of(self, lane: int) -> int:
        """Returns the elements of a lane's slice that belong to parameters. They come first."""
        return sum(self.sizes(lane)[: self.num_tensors])

    def shapes(self, lane: int) -> list[torch.Size]:
        """Returns the shapes of a lane's pieces of the parameters, which are flat, for its servers."""
        return [torch.Size([size]) for size in self.sizes(lane)[: self.num_tensors]]

    def spans(self, lane: int) -> list[tuple[int, int]]:
        """Returns the first element of a lane's piece of each tensor in the complete vector, and the one behind it."""
        starts = accumulate((bounds[-1] for bounds in self.bounds), initial=0)
        return [
            (start + bounds[lane], start + bounds[lane + 1]) for start, bounds in zip(starts, self.bounds, strict=False)
        ]

    def segments(self, lane: int) -> list[tuple[int, int]]:
        """Returns the ranges of the complete vector that a lane's slice consists of, in order, and none is empty."""
        segments: list[tuple[int, int]] = []
        for start, stop in self.spans(lane):
            if segments and start == segments[-1][1]:
                segments[-1] = segments[-1][0], stop
            elif start < stop:
                segments.append((start, stop))
        return segments

    def cut(self, vector: Tensor, lane: int, out: Tensor | None = None) -> Tensor:
        """Returns a lane's slice of a complete vector, as a copy.

        Args:
            vector: The complete vector.
            lane: The lane.
            out: Memory for the slice. Default: new memory.
        """
        out = vector.new_empty(self.elements_of(lane)) if out is None else out
        for part, (start, stop) in self._parts(out, lane):
            part.copy_(vector[start:stop])
        return out

    def put(self, vector: Tensor, lane: int, values: Tensor) -> None:
        """Copies a lane's slice into a complete vector."""
        for part, (start, stop) in self._parts(values, lane):
            vector[start:stop].copy_(part)

    def join(self, slices: Sequence[Tensor]) -> Tensor:
        """Returns the complete vector of the slices of all lanes."""
        vector = slices[0].new_empty(self.elements)
        for lane, values in enumerate(slices):
            self.put(vector, lane, values)
        return vector

    def moves(self, tensor: int, old: Layout, lane: int) -> Iterator[Move]:
        """Yields where a lane's piece of a tensor was in an old layout; the elements are counted within the pieces."""
        start, stop = self.bounds[tensor][lane : lane + 2]
        for before, (first, last) in enumerate(pairwise(old.bounds[tensor])):
            begin, end = max(start, first), min(stop, last)
            if begin < end:
                yield Move(before, slice(begin - first, end - first), slice(begin - start, end - start))

    def to_plain(self) -> dict[str, Any]:
        """Returns the layout as plain values, for JSON."""
        return {"parameters": self.num_tensors, "bounds": [list(bounds) for bounds in self.bounds]}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Layout:
        """Returns the layout of :meth:`to_plain`."""
        return cls(plain["parameters"], tuple(map(tuple, plain["bounds"])))

    def _parts(self, values: Tensor, lane: int) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        segments = self.segments(lane)
        sizes = [stop - start for start, stop in segments]
        return zip(torch.split(values, sizes) if sizes else (), segments, strict=True)
