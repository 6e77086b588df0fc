"""Collectives over all workers, for use before and after the training loop, when all workers are in step.

Data goes from the workers of a region to its leader, from the leaders to the center, and back, over the pairs in
``star``. So a worker connects to its leader only, and a model crosses a slow link once in each direction. Nothing is
pickled. Arguments are checked before data is sent, and every worker raises the error, so that the next collective
works. After the loss of a worker all collectives raise an error that names it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store

from lightning_halos.transport.errors import PeerLostError, is_lost_connection
from lightning_halos.transport.interruption import interruptible
from lightning_halos.transport.link import since
from lightning_halos.transport.packing import (
    LENGTH_BYTES,
    bytes_of_dense,
    bytes_of_length,
    bytes_of_text,
    check_dense,
    form_of,
    is_dense,
    length_in,
    pack,
    pack_error,
    tensor_of,
    text_of,
    unpack,
)
from lightning_halos.transport.star import Star

T = TypeVar("T")

_OPERATIONS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "sum": Tensor.add_,
    "mean": Tensor.add_,
    "avg": Tensor.add_,
    "product": Tensor.mul_,
    "min": lambda result, other: torch.minimum(result, other, out=result),
    "max": lambda result, other: torch.maximum(result, other, out=result),
}
_REDUCTION, _BROADCAST = "give a tensor to a reduction", "take part in a broadcast"  # what workers wait for, in errors
_ROLL_CALL = 3.0  # seconds in which all waiting workers report themselves after a failure
_FRAME = 256  # bytes per worker in the first round trip of a gathering
_CHUNK = 2**26  # bytes that are copied to the host at once


class Collectives:
    """Collectives over workers, all of which must make this object in order to connect.

    Every method raises ``PeerLostError`` if a worker has ended, or does not come in time.

    Args:
        regions: Ranks of the workers of each region. The lowest of each is the region's leader, and the lowest of all
            is the center.
        rank: This worker's rank.
        store: A store of the workers for these collectives alone.
        interrupted: Called several times a second while waiting; may raise.
        describe: Returns the name of a worker for errors, by its rank.
        timeout: Limit for any wait for other workers, in seconds.

    Raises:
        PeerLostError: If not all workers connect in time.
    """

    def __init__(
        self,
        regions: Sequence[Sequence[int]],
        rank: int,
        store: Store,
        interrupted: Callable[[], None],
        describe: Callable[[int], str],
        timeout: float,
    ) -> None:
        self._rank = rank
        self._store = store
        self._interrupted = interrupted
        self._describe = describe
        self._timeout = timeout
        self._lost_workers = False
        self._completed: float | None = None
        self._star = Star(regions, rank, store, timeout, interrupted)
        self._ranks = self._star.ranks

    def barrier(self) -> None:
        """Waits until all workers have called this."""
        self._gather("come to a barrier", torch.empty(0, dtype=torch.uint8))

    def wait_for_all(self) -> None:
        """Waits until all workers have called this, however long one of them takes."""
        with self._star.patience():
            self.barrier()

    def reduce(self, tensor: Tensor, operation: str) -> Tensor:
        """Reduces a tensor over all workers.

        Args:
            tensor: Of the same shape and dtype on every worker, on any device.
            operation: ``"mean"`` (or ``"avg"``), ``"sum"``, ``"min"``, ``"max"`` or ``"product"``.

        Returns:
            The result, on the tensor's device and of its dtype; ``float32`` for a mean of integers or booleans,
            ``int64`` for a sum or product of booleans.

        Raises:
            ValueError: If the operation is unknown, or shapes, dtypes or operations differ. Every worker raises it.
            TypeError: If the tensor is not dense, or the dtype is neither floating-point, integer nor boolean. Every
                worker raises it.
        """
        name = str(operation).lower().rsplit(".", 1)[-1]
        self._agree(_REDUCTION, f"reduce_op={name!r}, {form_of(tensor)}")
        if name not in _OPERATIONS:
            raise ValueError(f"reduce_op={operation!r} must be one of {sorted(_OPERATIONS)}.")
        check_dense(tensor)
        total = self._reduce(tensor.detach(), name)
        if name in ("mean", "avg"):
            mean = (total if total.is_floating_point() else total.double()) / len(self._ranks)
            return mean.to(tensor.device, tensor.dtype if tensor.is_floating_point() else torch.float32)
        counts = tensor.dtype == torch.bool and name in ("sum", "product")
        return total.to(tensor.device, torch.int64 if counts else tensor.dtype)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums a floating-point tensor over all workers in place, without the check of :meth:`reduce`. Returns it."""
        return tensor.copy_(self._reduce(tensor, "sum"))

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Returns the tensors of all workers, stacked by rank, on the tensor's device.

        Raises:
            ValueError: If shapes or dtypes differ. Every worker raises it.
        """
        data = bytes_of_dense(tensor) if is_dense(tensor) else None
        rows = self._agree("give a tensor to a gathering", form_of(tensor), data)
        check_dense(tensor)
        return torch.stack([tensor_of(row, tensor.dtype, tensor.shape) for row in rows]).to(tensor.device)

    def broadcast_(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Overwrites tensors with those of the worker ``source``, in few messages.

        Args:
            tensors: On any device. Their number, shapes and dtypes must be the same on every worker.
            source: Rank of the worker whose tensors are sent.

        Raises:
            ValueError: If number, shapes or dtypes differ. Every worker raises it.
        """
        rows = self._gather(_BROADCAST, bytes_of_text("\n".join(map(form_of, tensors))))
        forms = [text_of(row).split("\n") for row in rows]
        self._compare([_difference(row, forms[0]) for row in forms])
        check_dense(*tensors)
        for chunk in _chunks([tensor.detach() for tensor in tensors]):
            sizes = [tensor.nbytes for tensor in chunk]
            if self._rank == source:
                host = torch.cat([bytes_of_dense(tensor) for tensor in chunk])
            else:
                host = torch.empty(sum(sizes), dtype=torch.uint8)
            self._run(_BROADCAST, partial(self._star.broadcast, host, source))
            if self._rank != source:
                for tensor, part in zip(chunk, torch.split(host, sizes), strict=True):
                    tensor.copy_(tensor_of(part, tensor.dtype, tensor.shape))

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """Returns the value of the worker ``source``.

        Args:
            value: None, bool, int, float, str, a path, a tensor, or a list, tuple or dict of these.
            source: Rank of the worker whose value is sent.

        Raises:
            TypeError: If the value is anything else, because nothing is pickled. Every worker raises it.
        """
        failure: Exception | None = None
        body = torch.empty(0, dtype=torch.uint8)
        if self._rank == source:
            try:
                body = pack(value)
            except Exception as error:  # anything, even out of memory: the others wait for an answer
                failure, body = error, pack_error(error)
        body = self._run(_BROADCAST, partial(self._broadcast_bytes, body, source))
        if failure is not None:
            raise failure
        return value if self._rank == source else unpack(body)

    def gather_texts(self, text: str) -> list[str]:
        """Returns the texts of all workers, by rank."""
        return [text_of(row) for row in self._gather("give a text to a gathering", bytes_of_text(text))]

    def count(self, key: str, amount: int) -> int:
        """Adds to a counter that all workers share, and returns its new value. It waits for no worker."""
        try:  # the store itself has no limit
            return interruptible(lambda: int(self._store.add(key, amount)), self._interrupted, self._timeout)
        except (TimeoutError, dist.DistError) as error:
            raise PeerLostError(
                f"{self._describe(self._rank)} got no answer from the store that all processes share, to count {key!r},"
                f" within timeout={self._timeout:g} s. {self._describe(0)}, whose process has the store, has ended or"
                f" is stopped. All were last heard of {since(self._completed)}. {error}"
            ) from None

    # ------------------------------------------------------------------ over all workers

    def _agree(self, what: str, form: str, data: Tensor | None = None) -> list[Tensor]:
        """Gathers bytes. Raises an error on every worker if the forms of their arguments differ."""
        head = bytes_of_text(form + "\n")
        rows = self._gather(what, head if data is None else torch.cat([head, data]))
        self._compare([text_of(row[:_FRAME]).partition("\n")[0] for row in rows])
        return [row[len(head) :] for row in rows]

    def _compare(self, forms: list[str]) -> None:
        for rank, form in zip(self._ranks, forms, strict=True):
            if form != forms[0]:
                raise ValueError(
                    "The workers called a collective with different arguments:"
                    f" {self._describe(self._ranks[0])} has {forms[0]}, {self._describe(rank)} has {form}."
                )

    def _gather(self, what: str, data: Tensor) -> list[Tensor]:
        """Returns the bytes of all workers, by rank. A few bytes need one round trip, more need two."""

        def gather() -> list[Tensor]:
            table = self._star.gather(_frame(data, _FRAME))
            lengths = [length_in(row) for row in table]
            if max(lengths) > _FRAME - LENGTH_BYTES:
                table = self._star.gather(_frame(data, max(lengths) + LENGTH_BYTES))
            return [row[LENGTH_BYTES:][:length] for row, length in zip(table, lengths, strict=True)]

        return self._run(what, gather)

    def _reduce(self, tensor: Tensor, name: str) -> Tensor:
        host = tensor.to("cpu", _wide(tensor.dtype), copy=True).contiguous()
        self._run(_REDUCTION, partial(self._star.reduce, host, _OPERATIONS[name]))
        return host

    def _broadcast_bytes(self, data: Tensor, source: int) -> Tensor:
        """Returns the bytes of ``source``. The other workers need not know their number, and give none."""
        frame = _frame(data, _FRAME)
        self._star.broadcast(frame, source)
        if (length := length_in(frame)) > _FRAME - LENGTH_BYTES:
            frame = _frame(data, length + LENGTH_BYTES)
            self._star.broadcast(frame, source)
        return frame[LENGTH_BYTES:][:length]

    # ------------------------------------------------------------------ failures

    def _run(self, what: str, run: Callable[[], T]) -> T:
        if self._lost_workers:
            raise PeerLostError(f"{self._describe(self._rank)} cannot wait for all workers to {what}: some are lost.")
        try:
            result = interruptible(run, self._interrupted)
        except RuntimeError as error:
            if not is_lost_connection(error):
                raise
            # Releasing the pairs, and the traceback whose frames refer to them, closes the connections. So workers
            # that wait for this one, and not for the missing one, notice it, too.
            error.__traceback__ = None
            self._star.close()
            self._lost_workers = True
            raise PeerLostError(
                f"{self._describe(self._rank)} waited for all workers to {what}. {self._missing()} All were"
                f" last heard of {since(self._completed)}. The limit is HalosStrategy(timeout=...). {error}"
            ) from error
        self._completed = time.monotonic()
        return result

    def _missing(self) -> str:
        """Returns a sentence that names the workers which were not waiting in the failed collective."""
        everybody = set(self._ranks)

        def call_the_roll() -> set[int]:
            self._store.append("waiting", f"{self._rank} ")  # type: ignore[attr-defined]  # missing in torch's stubs
            # The store is in the process of rank 0, which must not end before the others have read it.
            deadline = time.monotonic() + _ROLL_CALL * (1.5 if self._rank == 0 else 1)
            while True:
                missing = everybody - set(map(int, self._store.get("waiting").split()))
                if not missing or time.monotonic() > deadline:
                    return missing
                time.sleep(0.1)

        try:
            missing = interruptible(call_the_roll, self._interrupted, 2 * _ROLL_CALL)
        except (RuntimeError, TimeoutError):
            return f"{self._describe(0)} has ended or is stopped."
        if not missing:
            return "All of them came, but a connection between them broke."
        return f"Did not come, or has ended: {', '.join(map(self._describe, sorted(missing)))}."


def _difference(forms: list[str], first: list[str]) -> str:
    """Describes how ``forms`` differ from ``first``: by their number, or the first form that differs."""
    if len(forms) != len(first):
        return f"{len(forms)} tensors"
    index = next((index for index, (mine, its) in enumerate(zip(forms, first, strict=True)) if mine != its), 0)
    return f"{forms[index]} as number {index}"


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype to reduce in, because gloo supports few dtypes, and narrow ones overflow."""
    if dtype.is_floating_point:
        return torch.float64 if dtype == torch.float64 else torch.float32
    if dtype.is_complex or str(dtype).startswith("torch.q"):
        raise TypeError(f"A tensor of dtype {dtype} cannot be reduced. Reduce its parts, as floating-point tensors.")
    return torch.int64


def _chunks(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Groups tensors into lists of at most ``_CHUNK`` bytes each, not counting the first tensor of a list."""
    ends = itertools.accumulate(tensor.nbytes for tensor in tensors)
    for _, chunk in itertools.groupby(zip(ends, tensors, strict=True), lambda pair: pair[0] // _CHUNK):
        yield [tensor for _, tensor in chunk]


def _frame(data: Tensor, size: int) -> Tensor:
    """Returns a frame of ``size`` bytes with the length of ``data`` and as much of ``data`` as fits."""
    frame = torch.cat([bytes_of_length(len(data)), data[: size - LENGTH_BYTES]])
    return torch.nn.functional.pad(frame, (0, size - len(frame)))
