"""torch's default process group while a Trainer runs: it knows all processes, but waits for no other worker in a fit.

Modules, metrics and data libraries ask ``torch.distributed`` for their rank and the number of processes, and combine
values with its collectives. Whether workers can wait for each other is decided elsewhere; see :class:`Workers`. The
processes of one worker are always in step.
"""

# torch's stubs describe more ways to call a group's methods than torch.distributed uses.
# mypy: disable-error-code="override, assignment, call-arg"

from __future__ import annotations

import functools
import inspect
import os
import socket
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
from lightning_halos.transport.address import INTERFACE_VARIABLE
from lightning_halos.transport.collectives import Collectives
from lightning_halos.transport.forks import noting_sockets

BACKEND = "halos"
_new_group = dist.new_group  # torch's own, which _keep_functions_from_waiting replaces
_worker_groups: dict[tuple[int, ...], ProcessGroup] = {}  # those of the present default group
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
        TOGETHER: All workers are in step, so it combines the values of all processes.
        APART: Each worker trains at its own pace. A collective combines the values of this worker's processes, and acts
            as if all other workers had the same ones.
        ALONE: Only one worker works, for example when it validates during a fit. Its processes are the world.
    """

    TOGETHER = "together"
    APART = "apart"
    ALONE = "alone"


@dataclass
class Workers:
    """The workers of a run, as seen by one process. All process groups of a process share one object.

    Attributes:
        rank: Global rank of this process.
        size: Number of processes of all workers.
        here: Global ranks of the processes of this worker.
        stands_for: Returns the process of this worker that stands for any process, by its rank.
        mode: Returns what a collective does now.
        collectives: Returns collectives over the processes with these ranks, in this order.
        warn: Called with the name of a collective that does not combine values, and where it was called.
        process: The id of this process.
        are_running: Whether the Trainer is in one of its entry points.
        shows_all: Whether process groups have all their members even if one worker is alone.
        inner: torch's own group of the processes of this worker, if it has several.
    """

    rank: int
    size: int
    here: tuple[int, ...]
    stands_for: Callable[[int], int]
    mode: Callable[[], Mode]
    collectives: Callable[[tuple[int, ...]], Collectives]
    warn: Callable[[str, str], None]
    process: int
    are_running: bool = True
    shows_all: bool = False
    inner: ProcessGroup | None = None

    def is_like(self, other: Workers) -> bool:
        """Whether another object's workers have the same processes."""
        return (self.size, self.here) == (other.size, other.here)

    def adopt(self, other: Workers) -> None:
        """Becomes like another object, for the next Trainer."""
        vars(self).update(vars(other))

    @contextmanager
    def showing_all(self) -> Iterator[None]:
        """Shows all members of process groups in a ``with`` block, even if one worker is alone."""
        before, self.shows_all = self.shows_all, True
        try:
            yield
        finally:
            self.shows_all = before


@dataclass(frozen=True)
class _Scope:
    """The members of a group that combine their values now.

    Attributes:
        collectives: Collectives over them; ``None`` if there is only this process.
        ranks: Their global ranks.
        copies: For each member of the group, the position in ``ranks`` of the one that it is, or that stands for it.
    """

    collectives: Collectives | None
    ranks: tuple[int, ...]
    copies: list[int]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        rows = [tensor] if self.collectives is None else list(self.collectives.all_gather(tensor))
        return [rows[copy] for copy in self.copies]

    def reduce(self, tensor: Tensor, name: str) -> Tensor:
        result = tensor if self.collectives is None else self.collectives.reduce(tensor, name)
        return result if len(self.copies) == len(self.ranks) else self._as_if_all_had(result, name)

    def _as_if_all_had(self, result: Tensor, name: str) -> Tensor:
        """Returns the reduction over the complete group, as if its other members had the same values."""
        if result.dtype == torch.bool or name in ("mean", "min", "max"):
            return result
        times, rest = divmod(len(self.copies), len(self.ranks))
        if name == "product":
            return result ** (times if rest == 0 else len(self.copies) / len(self.ranks))
        if rest == 0:
            return result * times
        total = result * (len(self.copies) / len(self.ranks))
        return total if result.is_floating_point() or result.is_complex() else total.round().to(result.dtype)


class WorkersGroup(ProcessGroup):
    """A process group of some or all processes.

    Args:
        workers: The workers of the run.
        ranks: Global ranks of the members.

    Attributes:
        ranks: The same.
    """

    def __init__(self, workers: Workers, ranks: Sequence[int]) -> None:
        super().__init__(ranks.index(workers.rank), len(ranks))
        self.workers = workers
        self.ranks = tuple(ranks)

    def rank(self) -> int:
        return self._members.index(self.workers.rank)

    def size(self) -> int:
        return len(self._members)

    def name(self) -> str:
        return BACKEND

    def getBackendName(self) -> str:  # noqa: N802
        return BACKEND

    @property
    def _device_types(self) -> list[torch.device]:  # where torch's distributed checkpoints put what they broadcast
        return [torch.device("cpu")]

    def _set_group_name(self, name: str) -> None:  # torch's own method needs another backend
        self._group_name = name

    @property
    def group_name(self) -> str:
        return self._group_name

    @property
    def _members(self) -> tuple[int, ...]:
        """Global ranks of the members that the group has now."""
        alone = not self.workers.shows_all and self.workers.mode() is Mode.ALONE
        return self.members_here if alone else self.ranks

    @property
    def members_here(self) -> tuple[int, ...]:
        """Global ranks of the members in this worker."""
        return tuple(rank for rank in self.ranks if rank in self.workers.here)

    def _scope(self) -> _Scope:
        """Returns the members that combine their values in a call. It warns if others do not."""
        mode, members = self.workers.mode(), self._members
        ranks = members if mode is Mode.TOGETHER else self.members_here
        if len(ranks) < len(members):
            self.workers.warn(*_call())
        if len(ranks) == 1:
            return _Scope(None, ranks, [0] * len(members))
        if os.getpid() != self.workers.process:
            raise RuntimeError(
                f"{_call()[0]}() was called in another process than the Trainer's, such as a DataLoader worker, which"
                " has no connection to the others. Call it in the Trainer's process."
            )
        return _Scope(self.workers.collectives(ranks), ranks, [self._copy(rank, ranks) for rank in members])

    def _copy(self, rank: int, ranks: tuple[int, ...]) -> int:
        if rank not in ranks:
            rank = self.workers.stands_for(rank)
        return ranks.index(rank) if rank in ranks else rank % len(ranks)

    # ------------------------------------------------------------------ collectives, by the names that torch calls

    def barrier(self, opts: Any = None) -> Work:
        if collectives := self._scope().collectives:
            collectives.barrier()
        return finished_work([])

    def monitored_barrier(self, *_: Any, **__: Any) -> None:
        """Waits without a limit, as Lightning does for ``prepare_data``, which one process runs."""
        if collectives := self._scope().collectives:
            collectives.wait_for_all()

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Work:
        scope = self._scope()
        if scope.collectives:
            scope.collectives.broadcast_([tensor.data for tensor in tensors], scope.copies[opts.rootRank])
        return finished_work(tensors)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Work:
        operation, scope = dist.ReduceOp.SUM if opts is None else opts.reduceOp, self._scope()
        for tensor in tensors:
            _reduce(scope, tensor, operation, tensor)
        return finished_work(tensors)

    allreduce_coalesced = allreduce

    def reduce(self, tensors: list[Tensor], opts: Any) -> Work:
        scope = self._scope()
        for tensor in tensors:
            _reduce(scope, tensor, opts.reduceOp, tensor if self.rank() == opts.rootRank else None)
        return finished_work(tensors)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Work:
        scope = self._scope()
        for slots, tensor in zip(outputs, inputs, strict=True):
            _gather(scope, tensor, slots)
        return finished_work([slot for slots in outputs for slot in slots])

    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Work:
        _gather(self._scope(), tensor, list(output.view(-1, *tensor.shape)))
        return finished_work([output])

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Work:
        for output, tensor in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, tensor)
        return finished_work(outputs)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> Work:
        scope = self._scope()
        for index, tensor in enumerate(inputs):
            _gather(scope, tensor, outputs[index] if outputs else [])
        return finished_work([slot for slots in outputs for slot in slots])

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Work:
        scope = self._scope()
        has_source = self._members[opts.rootRank] in scope.ranks
        for index, output in enumerate(outputs):
            if scope.collectives is not None and has_source:
                rows = torch.stack(inputs[index]) if inputs else output.new_empty(self.size(), *output.shape)
                scope.collectives.broadcast_([rows], scope.copies[opts.rootRank])
                output.data.copy_(rows[self.rank()])
            elif inputs:
                output.data.copy_(inputs[index][self.rank()])
        return finished_work(outputs)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Work:
        scope = self._scope()
        for output, parts in zip(outputs, inputs, strict=True):
            if scope.collectives is None:
                _reduce(scope, parts[self.rank()].clone(), opts.reduceOp, output)
            else:
                for index, part in enumerate(parts):
                    _reduce(scope, part, opts.reduceOp, output if index == self.rank() else None)
        return finished_work(outputs)

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: Any) -> Work:
        return self.reduce_scatter([output], [list(tensor.view(-1, *output.shape))], opts)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any) -> Work:
        for output, tensor in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(output, tensor, opts)
        return finished_work(outputs)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Work:
        scope = self._scope()
        rows = [torch.stack(inputs)] * len(outputs) if scope.collectives is None else scope.gather(torch.stack(inputs))
        for output, row in zip(outputs, rows, strict=True):
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


def _reduce(scope: _Scope, tensor: Tensor, operation: Any, out: Tensor | None) -> None:
    name = next((name for known, name in _NAMES if operation == known), None)
    if name is None:
        raise NotImplementedError(f"{_call()[0]}() supports the operations {[name for _, name in _NAMES]}.")
    result = scope.reduce(tensor.detach(), name)
    if out is not None:
        out.data.copy_(result)


def _gather(scope: _Scope, tensor: Tensor, slots: Sequence[Tensor]) -> None:
    for slot, row in zip(slots, scope.gather(tensor.detach()), strict=bool(slots)):
        slot.data.copy_(row)


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
    """Makes a group of all processes torch's default process group. It needs no message to the others.

    Args:
        workers: The workers of the run.
        store: A store of all processes. torch requires one; only :func:`worker_group` writes to it.
        timeout: Limit for a collective, in seconds, as torch shows it.
    """
    _worker_groups.clear()
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


def worker_group(ranks: tuple[int, ...], backend: str, timeout: float) -> ProcessGroup:
    """Returns torch's own process group of the processes of a worker, all of which must call this.

    It is made once for a default group, which has to be one of :func:`make_default_group`. A worker is on one machine,
    so gloo listens on the loopback interface, unless the user has chosen another.

    Args:
        ranks: Global ranks of the worker's processes.
        backend: As for ``torch.distributed.new_group``.
        timeout: Limit for a collective, in seconds.
    """
    default = default_group()
    assert default is not None
    if ranks not in _worker_groups:
        loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
        limit = timedelta(seconds=timeout)
        with default.workers.showing_all(), _interface(loopback), noting_sockets():
            _worker_groups[ranks] = _new_group([*ranks], limit, backend, use_local_synchronization=True)
    return _worker_groups[ranks]


@contextmanager
def _interface(name: str | None) -> Iterator[None]:
    """Makes gloo listen on an interface in a ``with`` block, unless the user has chosen one."""
    if name is None or INTERFACE_VARIABLE in os.environ:
        yield
        return
    os.environ[INTERFACE_VARIABLE] = name
    try:
        yield
    finally:
        del os.environ[INTERFACE_VARIABLE]


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
        ("broadcast_object_list", functools.partial(_keeping_objects, can_stand_in=True)),
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


def _keeping_objects(function: Callable[..., Any], can_stand_in: bool = False) -> Callable[..., Any]:
    """Lets each worker keep its own objects during training, since a receiver cannot know the size of the sender's.

    Inside a worker with the sender, or with a process that can stand in for it, objects are sent.
    """

    @functools.wraps(function)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(function).bind(*args, **kwargs)
        given = call.arguments
        group = given.get("group") or default_group()
        if not isinstance(group, WorkersGroup) or group.size() == 1 or group.workers.mode() is not Mode.APART:
            return function(*args, **kwargs)
        members = group.members_here
        if len(members) < group.size():
            group.workers.warn(*_call(function.__name__))
            index = given.pop("group_src", None)  # since torch 2.6
            source = (given.get("src") or 0) if index is None else group.ranks[index]
            given["src"] = group.workers.stands_for(source)
            knows_source = source in members or (can_stand_in and given["src"] in members)
            if len(members) == 1 or not knows_source:
                return None
        return function(*call.args, **call.kwargs)

    return replacement
