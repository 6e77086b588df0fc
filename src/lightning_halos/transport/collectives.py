"""Collectives over all workers, for the times when they are in step: before and after the training loop.

Rules of this room: host memory, a time limit for everything, no pickle. When a collective fails, those who were waiting
in it find out who was not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store

from lightning_halos.transport.errors import PeerLostError
from lightning_halos.transport.groups import interruptible
from lightning_halos.transport.link import since

_OPERATIONS = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.SUM,
    "product": dist.ReduceOp.PRODUCT,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
}
_ROLL_CALL = 3.0  # seconds in which all who were waiting can say so


class Collectives:
    """Collectives over one process group.

    Args:
        group: The group of all workers.
        interrupted: Called several times a second while waiting; may raise.
        store: A store of all workers, for these collectives alone. It counts, and it is used when a collective fails.
        describe: Names a worker of a global rank in errors.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        interrupted: Callable[[], None],
        store: Store,
        describe: Callable[[int], str],
    ) -> None:
        self._groups = [group]
        self._rank, self._size = group.rank(), group.size()
        self._interrupted = interrupted
        self._store = store
        self._describe = describe
        self._calls = 0
        self._completed: float | None = None

    @property
    def _group(self) -> dist.ProcessGroup:
        return self._groups[0]

    def barrier(self) -> None:
        """Waits until all workers are here."""
        self._wait("come to a barrier", lambda: self._group.barrier())

    def reduce(self, tensor: Tensor, operation: str) -> Tensor:
        """Reduces a tensor over all workers.

        Args:
            tensor: Of the same shape on every worker, on any device.
            operation: ``"mean"`` (or ``"avg"``), ``"sum"``, ``"min"``, ``"max"`` or ``"product"``.

        Returns:
            The result, on the tensor's device; of a mean of integers, a ``float32``.

        Raises:
            ValueError: If the operation is another one.
        """
        name = str(operation).lower().rsplit(".", 1)[-1]
        if name not in _OPERATIONS:
            raise ValueError(f"reduce_op={operation!r} must be one of {sorted(_OPERATIONS)}.")
        is_mean = name in ("mean", "avg")
        host = tensor.detach().cpu().clone()
        if is_mean and not host.is_floating_point():
            host = host.float()
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(_OPERATIONS[name])
        self._wait("give a tensor to a reduction", lambda: self._group.allreduce([host], options))
        return (host / self._size if is_mean else host).to(tensor.device)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Returns the tensors of all workers, stacked by rank, on the tensor's device."""
        host = tensor.detach().cpu().contiguous()
        parts = [torch.empty_like(host) for _ in range(self._size)]
        self._wait("give a tensor to a gathering", lambda: self._group.allgather([parts], [host]))
        return torch.stack(parts).to(tensor.device)

    def broadcast_(self, tensor: Tensor, source: int = 0) -> None:
        """Overwrites a tensor, on any device, with that of the worker ``source``."""
        host = tensor.detach().cpu().contiguous()
        options = dist.BroadcastOptions()
        options.rootRank = source
        # gloo knows few dtypes, but bytes are bytes.
        self._wait(
            "take part in a broadcast", lambda: self._group.broadcast([host.view(-1).view(torch.uint8)], options)
        )
        if self._rank != source:
            tensor.detach().copy_(host)

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """Returns the value of the worker ``source``.

        Args:
            value: None, bool, int, float, str, a path, a tensor, or a list, tuple or dict of these.
            source: Global rank of the worker whose value it is.

        Raises:
            TypeError: If it is anything else. Nothing is pickled.
        """
        tensors: list[Tensor] = []
        data = json.dumps(_pack(value, tensors)).encode() if self._rank == source else b""
        length = torch.tensor([len(data)])
        self.broadcast_(length, source)
        body = (
            torch.frombuffer(bytearray(data), dtype=torch.uint8)
            if data
            else torch.empty(int(length), dtype=torch.uint8)
        )
        self.broadcast_(body, source)
        if self._rank != source:
            packed = json.loads(bytes(body.tolist()))
            result = _unpack(packed, tensors)
        else:
            result = value
        for tensor in tensors:
            if tensor.numel():
                self.broadcast_(tensor, source)
        return result

    def gather_texts(self, text: str) -> list[str]:
        """Returns the texts of all workers, by rank."""
        return [str(self.broadcast_object(text, source)) for source in range(self._size)]

    def count(self, key: str, amount: int, timeout: float) -> int:
        """Adds to a number that all workers share, and returns it. Waits for no other worker.

        Args:
            key: Name of the number, which is 0 at first.
            amount: What to add.
            timeout: Seconds to wait for the store, which by itself would wait without a limit.

        Raises:
            PeerLostError: If the store does not answer in time, or is gone.
        """
        try:
            return interruptible(lambda: int(self._store.add(key, amount)), self._interrupted, timeout)
        except (TimeoutError, dist.DistError) as error:
            raise PeerLostError(
                f"{self._describe(self._rank)} got no answer from the store that all processes share, to count {key!r},"
                f" within timeout={timeout:g} s. {self._describe(0)} has ended or does not run any more: it is in its"
                f" process. All were last heard of {since(self._completed)}. {error}"
            ) from None

    def _wait(self, what: str, start: Callable[[], dist.Work]) -> None:
        self._calls += 1
        if not self._groups:
            raise PeerLostError(f"{self._describe(self._rank)} cannot wait for all workers to {what}: some are lost.")
        try:
            interruptible(lambda: start().wait(), self._interrupted)
        except RuntimeError as error:
            # This closes its connections: who waits for this process, and not for the missing one, notices it, too.
            self._groups.clear()
            raise PeerLostError(
                f"{self._describe(self._rank)} waited for all workers to {what}. {self._missing()} All were"
                f" last heard of {since(self._completed)}. The limit is HalosStrategy(timeout=...). {error}"
            ) from error
        self._completed = time.monotonic()

    def _missing(self) -> str:
        """Says who was not waiting in the collective that failed."""
        rank, size = self._rank, self._size

        def call_the_roll() -> list[int]:
            self._store.set(f"{self._calls}/{rank}", "")
            # The store is in the process of rank 0, so that must not leave before the others have read it.
            deadline = time.monotonic() + _ROLL_CALL * (1.5 if rank == 0 else 1)
            while True:
                missing = [other for other in range(size) if not self._store.check([f"{self._calls}/{other}"])]
                if not missing or time.monotonic() > deadline:
                    return missing
                time.sleep(0.1)

        try:
            missing = interruptible(call_the_roll, self._interrupted, 2 * _ROLL_CALL)
        except (RuntimeError, TimeoutError):
            return f"{self._describe(0)} has ended or does not run any more."
        if not missing:
            return "All of them came, but a connection between them broke."
        return f"Did not come, or has ended: {', '.join(map(self._describe, missing))}."


def is_broadcastable(value: Any) -> bool:
    """Whether :meth:`Collectives.broadcast_object` takes a value."""
    try:
        json.dumps(_pack(value, []))
    except (TypeError, ValueError):
        return False
    return True


def _pack(value: Any, tensors: list[Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": [len(tensors) - 1, list(value.shape), str(value.dtype).removeprefix("torch.")]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__ if type(value) in (list, tuple) else "list": [_pack(v, tensors) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[_pack(k, tensors), _pack(v, tensors)] for k, v in value.items()]}
    if hasattr(value, "__fspath__"):
        return value.__fspath__()
    raise TypeError(
        f"A {type(value).__name__} cannot be broadcast: lightning-halos never unpickles what comes over a link."
        " Broadcast numbers, strings, tensors, and lists or dicts of them."
    )


def _unpack(packed: Any, tensors: list[Tensor]) -> Any:
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "tensor":
        _, shape, dtype = content
        tensors.append(torch.empty(shape, dtype=getattr(torch, dtype)))
        return tensors[-1]
    if kind == "dict":
        return {_unpack(key, tensors): _unpack(value, tensors) for key, value in content}
    items = [_unpack(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
