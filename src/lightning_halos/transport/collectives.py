"""Collectives over all workers, for use before and after the training loop, when all workers are in step.

Data goes from the workers of a region to its leader, from the leaders to the centre, and back, over the pairs in
``star``. So a worker connects to its leader only, and a model crosses a slow link once in each direction. Nothing is
pickled. Arguments are checked before data is sent, and every worker raises the error, so that the next collective
works. After the loss of a worker all collectives raise an error that names it.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store

from lightning_halos.core.compat import bytes_of
from lightning_halos.transport.errors import PeerLostError, is_lost_connection
from lightning_halos.transport.groups import interruptible
from lightning_halos.transport.link import since
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
_LENGTH = 8  # bytes of a length
_FRAME = 256  # bytes per worker in the first round trip of a gathering
_CHUNK = 2**26  # bytes that are copied to the host at once


class Collectives:
    """Collectives over workers, all of which must make this object in order to connect.

    Every method raises ``PeerLostError`` if a worker has ended, or does not come in time.

    Args:
        regions: Ranks of the workers of each region. The lowest of each is the region's leader, and the lowest of all
            is the centre.
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
        self._agree(_REDUCTION, f"reduce_op={name!r}, {_form(tensor)}")
        if name not in _OPERATIONS:
            raise ValueError(f"reduce_op={operation!r} must be one of {sorted(_OPERATIONS)}.")
        _check_dense(tensor)
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
        data = _bytes_of(tensor) if _is_dense(tensor) else None
        rows = self._agree("give a tensor to a gathering", _form(tensor), data)
        _check_dense(tensor)
        return torch.stack([_tensor_of(row, tensor.dtype, tensor.shape) for row in rows]).to(tensor.device)

    def broadcast_(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Overwrites tensors with those of the worker ``source``, in few messages.

        Args:
            tensors: On any device. Their number, shapes and dtypes must be the same on every worker.
            source: Rank of the worker whose tensors are sent.

        Raises:
            ValueError: If number, shapes or dtypes differ. Every worker raises it.
        """
        rows = self._gather(_BROADCAST, _bytes("\n".join(map(_form, tensors))))
        forms = [_text(row).split("\n") for row in rows]
        self._compare([_difference(row, forms[0]) for row in forms])
        _check_dense(*tensors)
        for chunk in _chunks([tensor.detach() for tensor in tensors]):
            sizes = [tensor.nbytes for tensor in chunk]
            if self._rank == source:
                host = torch.cat([_bytes_of(tensor) for tensor in chunk])
            else:
                host = torch.empty(sum(sizes), dtype=torch.uint8)
            self._run(_BROADCAST, partial(self._star.broadcast, host, source))
            if self._rank != source:
                for tensor, part in zip(chunk, torch.split(host, sizes), strict=True):
                    tensor.copy_(_tensor_of(part, tensor.dtype, tensor.shape))

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
                body = _to_bytes(value)
            except Exception as error:  # anything, even out of memory: the others wait for an answer
                failure, body = error, _body({"error": str(error)}, [])
        body = self._run(_BROADCAST, partial(self._broadcast_bytes, body, source))
        if failure is not None:
            raise failure
        return value if self._rank == source else _from_bytes(body)

    def gather_texts(self, text: str) -> list[str]:
        """Returns the texts of all workers, by rank."""
        return [_text(row) for row in self._gather("give a text to a gathering", _bytes(text))]

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
        head = _bytes(form + "\n")
        rows = self._gather(what, head if data is None else torch.cat([head, data]))
        self._compare([_text(row[:_FRAME]).partition("\n")[0] for row in rows])
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
            lengths = [_length_in(row) for row in table]
            if max(lengths) > _FRAME - _LENGTH:
                table = self._star.gather(_frame(data, max(lengths) + _LENGTH))
            return [row[_LENGTH:][:length] for row, length in zip(table, lengths, strict=True)]

        return self._run(what, gather)

    def _reduce(self, tensor: Tensor, name: str) -> Tensor:
        host = tensor.to("cpu", _wide(tensor.dtype), copy=True).contiguous()
        self._run(_REDUCTION, partial(self._star.reduce, host, _OPERATIONS[name]))
        return host

    def _broadcast_bytes(self, data: Tensor, source: int) -> Tensor:
        """Returns the bytes of ``source``. The other workers need not know their number, and give none."""
        frame = _frame(data, _FRAME)
        self._star.broadcast(frame, source)
        if (length := _length_in(frame)) > _FRAME - _LENGTH:
            frame = _frame(data, length + _LENGTH)
            self._star.broadcast(frame, source)
        return frame[_LENGTH:][:length]

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


def is_broadcastable(value: Any) -> bool:
    """Returns whether :meth:`Collectives.broadcast_object` supports a value."""
    try:
        _to_bytes(value)
    except Exception:  # an object's own methods may raise anything
        return False
    return True


# ---------------------------------------------------------------------- tensors as bytes


def _form(tensor: Tensor) -> str:
    kind = "" if _is_dense(tensor) else "meta " if tensor.is_meta else f"{tensor.layout} ".removeprefix("torch.")
    return f"a {kind}{str(tensor.dtype).removeprefix('torch.')} tensor of shape {list(tensor.shape)}"


def _is_dense(tensor: Tensor) -> bool:
    """Returns whether a tensor has its values in a block of memory."""
    return tensor.layout == torch.strided and not tensor.is_meta


def _check_dense(*tensors: Tensor) -> None:
    """Refuses other tensors. All workers have agreed on their form before, so every worker raises the error."""
    for tensor in tensors:
        if not _is_dense(tensor):
            raise TypeError(f"{_form(tensor)} cannot be sent. Send dense tensors, such as tensor.to_dense().")


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


def _bytes_of(tensor: Tensor) -> Tensor:
    _check_dense(tensor)
    return bytes_of(tensor)


def _tensor_of(data: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    return data.clone().view(dtype).view(shape)  # a clone is aligned, and does not keep the other tensors in memory


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode() + b"\0"), dtype=torch.uint8)[:-1]  # no buffer may be empty


def _text(data: Tensor) -> str:
    return data.numpy().tobytes().decode(errors="replace")


def _length(length: int) -> Tensor:
    return torch.tensor([length]).view(torch.uint8)


def _length_in(data: Tensor) -> int:
    return int(data[:_LENGTH].view(torch.int64))


def _frame(data: Tensor, size: int) -> Tensor:
    """Returns a frame of ``size`` bytes with the length of ``data`` and as much of ``data`` as fits."""
    frame = torch.cat([_length(len(data)), data[: size - _LENGTH]])
    return torch.nn.functional.pad(frame, (0, size - len(frame)))


# ---------------------------------------------------------------------- objects


def _to_bytes(value: Any) -> Tensor:
    """Returns a value as bytes: the length of the JSON, the JSON, and the tensors in it."""
    tensors: list[Tensor] = []
    return _body(_pack(value, tensors), tensors)


def _body(packed: Any, tensors: list[Tensor]) -> Tensor:
    head = _bytes(json.dumps(packed))
    return torch.cat([_length(len(head)), head, *map(_bytes_of, tensors)])


def _pack(value: Any, tensors: list[Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": [list(value.shape), str(value.dtype).removeprefix("torch.")]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__ if type(value) in (list, tuple) else "list": [_pack(v, tensors) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[_pack(k, tensors), _pack(v, tensors)] for k, v in value.items()]}
    if hasattr(value, "__fspath__"):
        return value.__fspath__()
    raise TypeError(
        f"A {type(value).__name__} cannot be broadcast, because lightning-halos never unpickles data from other"
        " processes. Broadcast numbers, strings, tensors, and lists or dicts of them."
    )


def _from_bytes(body: Tensor) -> Any:
    stop = _LENGTH + _length_in(body)

    def unpack(packed: Any) -> Any:
        nonlocal stop
        if not isinstance(packed, dict):
            return packed
        ((kind, content),) = packed.items()
        if kind == "error":
            raise TypeError(content)
        if kind == "tensor":
            shape, name = content
            dtype = getattr(torch, name)
            start, stop = stop, stop + math.prod(shape) * dtype.itemsize
            return _tensor_of(body[start:stop], dtype, shape)
        if kind == "dict":
            return {unpack(key): unpack(value) for key, value in content}
        items = [unpack(item) for item in content]
        return tuple(items) if kind == "tuple" else items

    return unpack(json.loads(_text(body[_LENGTH:stop])))
