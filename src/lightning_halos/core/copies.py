"""Copies between the tensors of a module and host memory, for GPUs through pinned memory on a separate stream.

A copy between a GPU and pageable memory blocks the host. With pinned memory, the GPU copies one part while the host
computes with the previous one. This file handles tensors only; their order and meaning are in :mod:`.vector`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_halos.core.compat import copy_each_

Run = tuple[list[Tensor], list[Tensor], int]
"""Tensors of a module, the corresponding parts of a host vector, and the end of the last part in the vector."""


class Copies:
    """Copies runs of tensors in order, without intermediate memory."""

    def to_host(self, runs: Iterable[Run]) -> Iterator[Run]:
        """Yields the runs with tensors that can be copied to the host, valid until the next run is requested."""
        yield from runs

    def to_device(self, runs: Iterable[Run]) -> None:
        """Copies the parts of the vector into the module's tensors."""
        for tensors, parts, _ in runs:
            copy_each_(tensors, parts)


class CopyStream:
    """A queue of copies between a CUDA device and pinned memory, separate from the device's queue of computations."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def buffer(self, size: int) -> Tensor:
        """Allocates ``size`` bytes of pinned memory."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def begin(self) -> None:
        """Makes later copies wait for all computations that are queued now."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Callable[[], object]:
        """Queues copies. Returns a function that waits for them, without occupying a CPU core."""
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
            done.record(self._stream)
        return done.synchronize

    def end(self) -> None:
        """Makes later computations wait for all copies that are queued now."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


class _Slot:
    """Pinned memory for one run. ``wait`` waits until the last copy from or to this memory is complete."""

    def __init__(self, stream: CopyStream) -> None:
        self._stream = stream
        self._memory: Tensor | None = None
        self.wait: Callable[[], object] = lambda: None

    def like(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns pinned tensors of the same shapes and dtypes. They replace those of the previous run."""
        self.wait()
        sizes = [-(-tensor.numel() * tensor.itemsize // 16) * 16 for tensor in tensors]  # aligned for any dtype
        if self._memory is None or self._memory.numel() < sum(sizes):
            with torch.inference_mode(False):  # or training could not write to memory that validation allocated
                self._memory = self._stream.buffer(sum(sizes))
        pieces = torch.split(self._memory[: sum(sizes)], sizes)
        return [
            piece[: tensor.numel() * tensor.itemsize].view(tensor.dtype).view(tensor.shape)
            for piece, tensor in zip(pieces, tensors, strict=True)
        ]


class StagedCopies(Copies):
    """Copies through two slots of pinned memory, used alternately.

    The host works with one slot while the stream copies the other one. Slots have the dtypes of the module's tensors:
    conversions run on the host, so that they need no memory on the device.
    """

    def __init__(self, stream: CopyStream) -> None:
        self._stream = stream
        self._slots = _Slot(stream), _Slot(stream)

    def to_host(self, runs: Iterable[Run]) -> Iterator[Run]:
        queued: deque[tuple[_Slot, list[Tensor], Run]] = deque()
        for number, (tensors, parts, stop) in enumerate(runs):
            slot = self._slots[number % 2]
            staged = slot.like(tensors)
            self._stream.begin()  # for each run, because the next one may be computed only when it is requested
            slot.wait = self._stream.copy(staged, tensors)
            # A run's tensors are kept until they are copied: torch would use their memory again at once.
            queued.append((slot, tensors, (staged, parts, stop)))
            if len(queued) == 2:
                yield self._next(queued)
        while queued:
            yield self._next(queued)

    def to_device(self, runs: Iterable[Run]) -> None:
        self._stream.begin()  # later computations wait for the copies, the host does not
        try:
            for number, (tensors, parts, _) in enumerate(runs):
                slot = self._slots[number % 2]
                staged = slot.like(tensors)
                copy_each_(staged, parts)
                slot.wait = self._stream.copy(tensors, staged)
        finally:
            self._stream.end()

    def _next(self, queued: deque[tuple[_Slot, list[Tensor], Run]]) -> Run:
        slot, _tensors, run = queued.popleft()
        slot.wait()
        return run


def copies_of(devices: Collection[torch.device]) -> Copies:
    """Chooses how to copy tensors that are on these devices."""
    if len(devices) == 1 and (device := next(iter(devices))).type == "cuda":
        return StagedCopies(CopyStream(device))
    return Copies()
