"""torch's default process group while a Trainer runs: it knows all workers, and waits for none of them during training.

Modules, metrics and data libraries ask ``torch.distributed`` for their rank and the number of workers, and combine
values with its collectives. Whether workers can wait for each other is decided elsewhere; see :class:`Workers`.
"""

# torch's stubs describe more ways to call a group's methods than torch.distributed uses.
# mypy: disable-error-code="override, assignment, call-arg"

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Store, Work

from lightning_halos.core.compat import finished_work
from lightning_halos.transport.collectives import Collectives

BACKEND = "halos"
_TORCH = str(Path(torch.__file__).parent) + os.sep
_DEVICES = ["cpu", "cuda", "xpu", "mps"]
_NAMES = [
    (dist.ReduceOp.SUM, "sum"),
    (dist.ReduceOp.AVG, "mean"),
    (dist.ReduceOp.PRODUCT, "product"),
    (dist.ReduceOp.MIN, "min"),
    (dist.ReduceOp.MAX, "max"),
]


class Mode(Enum):
    """What a collective does now.

    Attributes:
        TOGETHER: All workers are in step, so it combines their values.
        APART: Each worker trains at its own pace. A collective does not wait: it acts as if all other workers had this
            worker's values.
        ALONE: Only rank 0 works, for example when it validates during a fit. It is a world of one.
    """

    TOGETHER = "together"
    APART = "apart"
    ALONE = "alone"


@dataclass
class Workers:
    """The workers of a run, as seen by one of them. All process groups of a process share one object.

    Attributes:
        rank: Global rank of this process.
        size: Number of workers.
        mode: Returns what a collective does now.
        collectives: Returns collectives over the workers with these ranks, in this order.
        warn: Called with the name of a collective that does not combine values, and where it was called.
        process: The id of this process.
        are_running: Whether the Trainer is in one of its entry points.
        shows_all: Whether process groups have all their members even if rank 0 is alone.
    """

    rank: int
    size: int
    mode: Callable[[], Mode]
    collectives: Callable[[tuple[int, ...]], Collectives]
    warn: Callable[[str, str], None]
    process: int
    are_running: bool = True
    shows_all: bool = False

    def adopt(self, other: Workers) -> None:
        """Becomes like another object, for the next Trainer."""
        vars(self).update(vars(other))

    @contextmanager
    def showing_all(self) -> Iterator[None]:
        """Shows all members of process groups in a ``with`` block, even if rank 0 is alone."""
        before, self.shows_all = self.shows_all, True
        try:
            yield
        finally:
            self.shows_all = before


class WorkersGroup(ProcessGroup):
    """A process group of some or all workers.

    Args:
        workers: The workers of the run.
        ranks: Global ranks of the members.
    """

    def __init__(self, workers: Workers, ranks: Sequence[int]) -> None:
        super().__init__(ranks.index(workers.rank), len(ranks))
        self.workers = workers
        self._ranks = tuple(ranks)

    def rank(self) -> int:
        return 0 if self._is_alone else self._ranks.index(self.workers.rank)

    def size(self) -> int:
        return 1 if self._is_alone else len(self._ranks)

    def name(self) -> str:
        return BACKEND

    def getBackendName(self) -> str:  # noqa: N802
        return BACKEND

    def _set_group_name(self, name: str) -> None:  # torch's own method needs another backend
        self._group_name = name

    @property
    def group_name(self) -> str:
        return self._group_name

    @property
    def _is_alone(self) -> bool:
        return not self.workers.shows_all and self.workers.mode() is Mode.ALONE

    def _connected(self) -> Collectives | None:
        """Returns the collectives for a call; ``None`` if it must not wait for others, which may be worth a warning."""
        mode = self.workers.mode()
        if mode is Mode.ALONE or len(self._ranks) == 1:
            return None
        if mode is Mode.APART:
            self.workers.warn(*_call())
            return None
        if os.getpid() != self.workers.process:
            raise RuntimeError(
                f"{_call()[0]}() was called in another process than the Trainer's, such as a DataLoader worker, which"
                " has no connection to the other workers. Call it in the Trainer's process."
            )
        return self.workers.collectives(self._ranks)

    # ------------------------------------------------------------------ collectives, by the names that torch calls

    def barrier(self, opts: Any = None) -> Work:
        if collectives := self._connected():
            collectives.barrier()
        return finished_work([])

    def monitored_barrier(self, *_: Any, **__: Any) -> None:  # Lightning calls it after prepare_data
        self.barrier()

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Work:
        if collectives := self._connected():
            collectives.broadcast_([tensor.data for tensor in tensors], opts.rootRank)
        return finished_work(tensors)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Work:
        operation = dist.ReduceOp.SUM if opts is None else opts.reduceOp
        collectives = self._connected()
        for tensor in tensors:
            self._reduce(collectives, tensor, operation, tensor)
        return finished_work(tensors)

    allreduce_coalesced = allreduce

    def reduce(self, tensors: list[Tensor], opts: Any) -> Work:
        collectives = self._connected()
        for tensor in tensors:
            self._reduce(collectives, tensor, opts.reduceOp, tensor if self.rank() == opts.rootRank else None)
        return finished_work(tensors)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Work:
        collectives = self._connected()
        for slots, tensor in zip(outputs, inputs, strict=True):
            self._gather(collectives, tensor, slots)
        return finished_work([slot for slots in outputs for slot in slots])

    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Work:
        self._gather(self._connected(), tensor, list(output.view(-1, *tensor.shape)))
        return finished_work([output])

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Work:
        for output, tensor in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, tensor)
        return finished_work(outputs)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> Work:
        collectives = self._connected()
        for index, tensor in enumerate(inputs):
            self._gather(collectives, tensor, outputs[index] if outputs else [])
        return finished_work([slot for slots in outputs for slot in slots])

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Work:
        collectives = self._connected()
        for index, output in enumerate(outputs):
            if collectives is not None:
                rows = torch.stack(inputs[index]) if inputs else output.new_empty(self.size(), *output.shape)
                collectives.broadcast_([rows], opts.rootRank)
                output.data.copy_(rows[self.rank()])
            elif inputs:
                output.data.copy_(inputs[index][self.rank()])
        return finished_work(outputs)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Work:
        collectives = self._connected()
        for output, parts in zip(outputs, inputs, strict=True):
            if collectives is None:
                self._reduce(None, parts[self.rank()].clone(), opts.reduceOp, output)
            else:
                for index, part in enumerate(parts):
                    self._reduce(collectives, part, opts.reduceOp, output if index == self.rank() else None)
        return finished_work(outputs)

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: Any) -> Work:
        return self.reduce_scatter([output], [list(tensor.view(-1, *output.shape))], opts)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any) -> Work:
        for output, tensor in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(output, tensor, opts)
        return finished_work(outputs)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Work:
        if (collectives := self._connected()) is None:
            for output in outputs:
                output.data.copy_(inputs[self.rank()])
        else:
            for output, row in zip(outputs, collectives.all_gather(torch.stack(inputs)), strict=True):
                output.data.copy_(row[self.rank()])
        return finished_work(outputs)

    def all_to_all_single(
        self, output: Tensor, tensor: Tensor, output_sizes: list[int], input_sizes: list[int], opts: Any = None
    ) -> Work:
        if len({*output_sizes, *input_sizes}) > 1:
            raise NotImplementedError(f"{_call()[0]}() needs parts of equal size here. Pad them.")
        self.alltoall(list(output.chunk(self.size())), list(tensor.chunk(self.size())))
        return finished_work([output])

    # The names of the same methods before torch 2.12.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    def send(self, *_: Any) -> Work:
        raise self._no_messages()

    def recv(self, *_: Any) -> Work:
        raise self._no_messages()

    def recv_anysource(self, *_: Any) -> Work:
        raise self._no_messages()

    def _no_messages(self) -> Exception:
        return RuntimeError(
            f"{_call()[0]}() is not possible with this strategy: the receiver would have to wait, but no worker waits"
            " for another one during training. Before and after it, use torch.distributed.all_gather or broadcast."
        )

    # ------------------------------------------------------------------ values

    def _reduce(self, collectives: Collectives | None, tensor: Tensor, operation: Any, out: Tensor | None) -> None:
        name = next((name for known, name in _NAMES if operation == known), None)
        if name is None:
            raise NotImplementedError(f"{_call()[0]}() supports the operations {[name for _, name in _NAMES]}.")
        if collectives is None:
            result = _as_if_all_had(tensor.detach(), name, self.size())
        else:
            result = collectives.reduce(tensor, name)
        if out is not None:
            out.data.copy_(result)

    def _gather(self, collectives: Collectives | None, tensor: Tensor, slots: Sequence[Tensor]) -> None:
        rows = [tensor.detach()] * len(slots) if collectives is None else list(collectives.all_gather(tensor))
        for slot, row in zip(slots, rows, strict=bool(slots)):
            slot.data.copy_(row)


def _as_if_all_had(tensor: Tensor, name: str, size: int) -> Tensor:
    """Returns the reduction of ``size`` equal tensors."""
    if tensor.dtype == torch.bool or name in ("mean", "min", "max"):
        return tensor
    return tensor * size if name == "sum" else tensor**size


def _call(name: str = "a collective") -> tuple[str, str]:
    """Returns the name of the function of ``torch.distributed`` that was called, and where.

    Args:
        name: The name, if torch has not been entered yet.
    """
    frame = inspect.currentframe()
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith(_TORCH):
            name = name if function == "wrapper" else function
        elif file != __file__ and frame.f_globals.get("__name__") != "typing_extensions":  # it marks what is deprecated
            return f"torch.distributed.{name}", f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return name, "an unknown place"


# ---------------------------------------------------------------------- torch's default group


def make_default_group(workers: Workers, store: Store, timeout: float) -> WorkersGroup:
    """Makes a group of all workers torch's default process group. It needs no message to the other workers.

    Args:
        workers: The workers of the run.
        store: A store of all workers. torch requires one, but nothing is written to it.
        timeout: Limit for a collective, in seconds, as torch shows it.
    """
    if not hasattr(dist.Backend, BACKEND.upper()):
        dist.Backend.register_backend(BACKEND, _make_group, extended_api=True, devices=_DEVICES)
        _keep_functions_from_waiting()
    hook = sys.excepthook  # torch would put the rank before every line of an error
    dist.init_process_group(
        BACKEND,
        store=store,
        rank=workers.rank,
        world_size=workers.size,
        timeout=timedelta(seconds=timeout),
        pg_options=workers,
    )
    sys.excepthook = hook
    group = default_group()
    assert group is not None
    return group


def default_group() -> WorkersGroup | None:
    """Returns torch's default process group, if it is one of :func:`make_default_group`."""
    group = dist.group.WORLD if dist.is_initialized() else None
    return group if isinstance(group, WorkersGroup) else None


def _make_group(options: Any, workers: Workers | None) -> WorkersGroup:
    if workers is None:  # for torch.distributed.new_group
        group = default_group()
        assert group is not None
        workers = group.workers
    return WorkersGroup(workers, options.global_ranks_in_group or range(workers.size))


def _keep_functions_from_waiting() -> None:
    """Replaces the functions of ``torch.distributed`` that would wait for other workers whatever the default group is.

    They do what they did before if the default group is none of :func:`make_default_group`.
    """
    for name, make in (
        ("new_group", _without_backend),
        ("broadcast_object_list", _keeping_objects),
        ("scatter_object_list", _keeping_objects),
    ):
        replacement = make(getattr(dist, name))
        setattr(dist, name, replacement)
        setattr(dist.distributed_c10d, name, replacement)


def _without_backend(new_group: Callable[..., Any]) -> Callable[..., Any]:
    """Lets ``new_group`` make groups of this backend, whichever one is named: others connect, and wait, at once."""

    @functools.wraps(new_group)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        group = default_group()
        if group is None:
            return new_group(*args, **kwargs)
        call = inspect.signature(new_group).bind(*args, **kwargs)
        call.arguments |= {"backend": None, "pg_options": None}
        with group.workers.showing_all():
            return new_group(*call.args, **call.kwargs)

    return replacement


def _keeping_objects(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets each worker keep its own objects during training, since a receiver cannot know the size of the sender's."""

    @functools.wraps(function)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        group = inspect.signature(function).bind(*args, **kwargs).arguments.get("group") or default_group()
        if isinstance(group, WorkersGroup) and group.size() > 1 and group.workers.mode() is Mode.APART:
            group.workers.warn(*_call(function.__name__))
            return None
        return function(*args, **kwargs)

    return replacement
