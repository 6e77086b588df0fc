"""A parameter server: it has a model and an optimizer, and computes what an update does to the model.

It sends nothing and decides nothing about the run, which the nodes do. Only the server writes to its model. An update
that would spoil the model is rejected, counted and logged; its sender goes on from the server's model.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_halos.core.checks import check_made
from lightning_halos.core.delayed_nesterov import DelayedNesterov, OptimizerFactory
from lightning_halos.core.divided_step import DividedStep, Piece, divide
from lightning_halos.core.finding import Finding
from lightning_halos.core.norm_limit import NormLimit
from lightning_halos.core.snapshot import Portion, ServerSnapshot
from lightning_halos.core.vector import PART, Advance, ignore_progress

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


class Map(Protocol):
    """Calls a function for each item, possibly at the same time. Yields the results in the order of the items."""

    def __call__(self, function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]: ...


PIECE = PART // 4
"""Elements per piece that a thread computes at a time: few enough to stay in a core's caches."""

# Optimizers that update every parameter independently and skip those without a gradient, so that a step can be made in
# portions. Other optimizers may need all parameters at once.
_BY_PARAMETER = (DelayedNesterov, torch.optim.SGD)

# Optimizers that compute each element from that element alone, so that the lanes' servers, each with a slice of every
# parameter, compute together what one server would.
_BY_ELEMENT = (
    *_BY_PARAMETER,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
)

_REPEATED = 3  # rejected updates of a sender in a row after which a warning names it, and again after 6, 12, ...


class ParameterServer:
    """A model with a server optimizer that applies every valid update on arrival.

    Args:
        model: The initial model: a flat host tensor, first the parameters, then the buffers. The server owns it from
            here on.
        optimizer: Makes the server optimizer from the parameters.
        shapes: Shapes of the parameters in ``model``; the rest are buffers. Default: one flat parameter and no buffers.
        senders: Number of senders. The buffers of an update enter the server's with the weight ``1 / senders``, and so
            do the differences of teachers.
        max_norm_ratio: Reject an update if its norm is more than this many times the median of the last norms; see
            :class:`~lightning_halos.core.norm_limit.NormLimit`. ``None``: no limit.

    Attributes:
        model: The present model.
        num_parameters: Elements of the model that are parameters. They come first.
        num_teachers: Elements behind them of teachers, of which an update has differences, as of parameters: a mean of
            values would hold them back, because an update's values began from a model that others have changed since.
        version: Number of applied updates.
        rejections: Number of rejected updates, by sender.
        staleness: Staleness of the last applied update: versions between the model that it started from and its
            arrival.
        agree: Returns the finding of all lanes, given that of this one, where no host does so; see :meth:`find`.
        map: Where the server computes. Default: the builtin ``map``, in the thread that calls the server.
        warns: Whether to log rejections. One lane does.
    """

    def __init__(
        self,
        model: Tensor,
        optimizer: OptimizerFactory,
        shapes: Sequence[torch.Size] | None = None,
        senders: int = 1,
        max_norm_ratio: float | None = None,
    ) -> None:
        shapes = [model.shape] if shapes is None else shapes
        self.model = model
        self.version = 0
        self.rejections: dict[int, int] = {}
        self.staleness = 0
        self.agree: Callable[[Finding], Finding] = lambda finding: finding
        self.map: Map = map
        self.warns = True
        self._is_slice = False
        self._touched: Collection[int] | None = None  # by the last update
        self._dropped_in_a_row: dict[int, int] = {}
        self._norm_limit = None if max_norm_ratio is None else NormLimit(max_norm_ratio)
        self._sizes = [shape.numel() for shape in shapes]
        self.num_parameters = sum(self._sizes)
        self.num_teachers = 0
        self.senders = senders
        parts = torch.split(model[: self.num_parameters], self._sizes)
        self._parameters = [nn.Parameter(part.view(shape)) for part, shape in zip(parts, shapes, strict=True)]
        self._optimizer = optimizer(self._parameters)
        check_made("The function that makes a server's optimizer", self._optimizer, self._parameters)
        is_divisible = type(self._optimizer) in _BY_PARAMETER
        self._portions = _portions(self._sizes) if is_divisible else [slice(len(self._sizes))]
        self._pieces = divide(self._sizes, PIECE if is_divisible else self.num_parameters + 1)
        self._snapshots: weakref.WeakSet[ServerSnapshot] = weakref.WeakSet()  # an abandoned one costs nothing

    def become_slice(self, warns: bool) -> None:
        """Makes this the server of one lane, whose parameters are the lane's pieces of them; some may be empty.

        Args:
            warns: Whether to log rejections.

        Raises:
            ValueError: If the optimizer needs complete parameters.
        """
        if type(self._optimizer) not in _BY_ELEMENT:
            known = ", ".join(kind.__name__ for kind in _BY_ELEMENT)
            raise ValueError(
                f"The server optimizer {type(self._optimizer).__name__} may need complete parameters, but in workers of"
                " several processes each process has a server for its slice of them. Use one of"
                f" {known}, or HalosStrategy(worker=1)."
            )
        self._is_slice, self.warns = True, warns

    @property
    def rejected(self) -> int:
        """Number of rejected updates."""
        return sum(self.rejections.values())

    def inspect(self, vector: Tensor, progress: Iterable[int] | None = None) -> Finding:
        """Checks an update and computes its norm, in one pass over its memory. Reads nothing that an update changes.

        Args:
            vector: The update.
            progress: Yields the number of elements that have arrived so far. Default: all have arrived.
        """
        end = self.num_parameters

        def look_at(span: tuple[int, int]) -> tuple[bool, float]:
            start, stop = span
            parameters, buffers = vector[start : min(stop, end)], vector[max(start, end) : stop]
            norm = _norm_of(parameters)
            # The norm of finite values may be infinite, because squares overflow first.
            return (math.isfinite(norm) or all_finite(parameters)) and all_finite(buffers), norm

        there, finite, norm = 0, True, 0.0
        for stop in [vector.numel()] if progress is None else progress:
            for is_finite, part in self.map(look_at, spans(there, stop)):
                finite, norm = finite and is_finite, math.hypot(norm, part)
            there = stop
        fault = None if finite else "it has NaN or infinite values"
        if vector.shape != self.model.shape:
            fault = f"its shape is {tuple(vector.shape)}, the model's is {tuple(self.model.shape)}"
        if vector.dtype != self.model.dtype:
            fault = f"its dtype is {vector.dtype}, the model's is {self.model.dtype}"
        touched = None
        if self._is_slice:
            touched = self._touched_by(vector) if fault is None else []
        return Finding(fault, norm, touched)

    def find(self, vector: Tensor) -> Finding:
        """Returns the finding for an update that no host has inspected; all lanes must do so in step."""
        return self.agree(self.inspect(vector))

    def _touched_by(self, vector: Tensor) -> list[int]:
        """Returns the indices of the parameters that an update changes, so that their momentum may move them, too."""
        parts = torch.split(vector[: self.num_parameters], self._sizes)
        return [index for index, part in enumerate(parts) if not _is_zero(part)]

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of the server's state, of tensors and plain values."""
        return self.snapshot().complete()

    def snapshot(self) -> ServerSnapshot:
        """Starts a copy of the server's state as it is now. The server may go on before the copy is complete."""
        groups = self._optimizer.param_groups
        numbers = {id(p): number for number, p in enumerate(p for group in groups for p in group["params"])}
        portions, stop = [], 0
        for portion in self._portions:
            start, stop = stop, stop + sum(self._sizes[portion])
            portions.append(Portion(slice(start, stop), [numbers[id(p)] for p in self._parameters[portion]]))
        snapshot = ServerSnapshot(self._state(), [*portions, Portion(slice(stop, None), [])])
        self._snapshots.add(snapshot)
        return snapshot

    def _preserve(self) -> None:
        """Completes the snapshots in progress, before a tensor is overwritten."""
        for snapshot in self._snapshots:
            if pending := snapshot.pending:
                deque(self.map(snapshot.take, pending), maxlen=0)

    def _state(self) -> dict[str, Any]:
        """The server's state: its own tensors, and copies of plain values."""
        return {
            "model": self.model,
            "optimizer": self._optimizer.state_dict(),
            "optimizer_type": type(self._optimizer).__name__,
            "version": self.version,
            "rejections": dict(self.rejections),
            "staleness": self.staleness,
            "senders": self.senders,
            "dropped_in_a_row": dict(self._dropped_in_a_row),
            "norms": [] if self._norm_limit is None else list(self._norm_limit.norms),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state of :meth:`state_dict`. Keeps none of its tensors.

        This server keeps the arguments of its own optimizer, such as ``lr``. If they are not those of the state, or the
        number of senders is not, the momentum goes on in new windows.

        Raises:
            ValueError: If the state belongs to another model or another server optimizer.
        """
        model = state["model"]
        if model.shape != self.model.shape or model.dtype != self.model.dtype:
            raise ValueError(
                f"The state has a model of {model.numel()} elements of {model.dtype}, but this server's model has"
                f" {self.model.numel()} of {self.model.dtype}. Load the state of a server of the same model."
            )
        if state["optimizer_type"] != (mine := type(self._optimizer).__name__):
            raise ValueError(
                f"The state has the server optimizer {state['optimizer_type']}, but this server has {mine}. Pass the"
                " optimizer that the run began with, or resume without the checkpoint's folder, with new servers."
            )
        self._preserve()
        own = _arguments(self._optimizer)
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        if state["senders"] != self.senders or _arguments(self._optimizer) != own:
            for group, values in zip(self._optimizer.param_groups, own, strict=True):
                group.update(values)
            if isinstance(self._optimizer, DelayedNesterov):
                self._optimizer.restart_windows()
        self.model.copy_(model)
        self.version, self.staleness = state["version"], state["staleness"]
        self.rejections = dict(state["rejections"])
        self._dropped_in_a_row = dict(state["dropped_in_a_row"])
        if self._norm_limit is not None:
            self._norm_limit.norms.clear()
            self._norm_limit.norms.extend(state["norms"])

    def follow(self, senders: int, values: Mapping[str, Any]) -> None:
        """Adapts to another number of senders.

        Args:
            senders: Their number. The buffers of an update enter the server's with the weight ``1 / senders``.
            values: Arguments of the optimizer from now on, such as ``lr``. If one changes, a :class:`DelayedNesterov`
                keeps its momentum and starts new windows.
        """
        self.senders = senders
        groups = self._optimizer.param_groups
        if all(group[name] == value for group in groups for name, value in values.items()):
            return
        self._preserve()
        for group in groups:
            group.update(values)
        if isinstance(self._optimizer, DelayedNesterov):
            self._optimizer.restart_windows()

    def _judge(self, finding: Finding, version: int, sender: int, name: str) -> bool:
        """Accepts or rejects an update that started from ``version``, and counts it. Returns whether to apply it."""
        fault = finding.fault
        if fault is None and self._norm_limit is not None:
            fault = self._norm_limit.fault(finding.norm)
        if fault is None:
            self.staleness = self.version - version
            self.version += 1
            self._touched = None if finding.touched is None else frozenset(finding.touched)
            self._dropped_in_a_row.pop(sender, None)
            return True
        self.rejections[sender] = self.rejections.get(sender, 0) + 1
        in_a_row = self._dropped_in_a_row[sender] = self._dropped_in_a_row.get(sender, 0) + 1
        repeats, rest = divmod(in_a_row, _REPEATED)
        if not self.warns:
            return False
        if in_a_row < _REPEATED:
            log.warning(
                "The update of %s was rejected: %s. It goes on from the server's model (%d rejected so far).",
                name,
                fault,
                self.rejected,
            )
        elif not rest and repeats.bit_count() == 1:
            log.warning(
                "The last %d updates of %s were all rejected, this one because %s. Its steps count, but nothing that it"
                " computes enters the model. Check its loss, its data and its device; clip gradients or lower the"
                " learning rate; or remove it from the run.",
                in_a_row,
                name,
                fault,
            )
        return False

    def memory_for(self, vector: Tensor) -> Tensor:
        """Returns the memory for the answer to an update: the update's own memory, if it fits."""
        fits = vector.dtype == self.model.dtype and vector.shape == self.model.shape
        return vector if fits else torch.empty_like(self.model)

    def apply(self, vector: Tensor, is_accepted: bool, answer: Tensor, advance: Advance = ignore_progress) -> None:
        """Applies an update if it is accepted, and fills its answer, one portion of the model after the other.

        Args:
            vector: The update.
            is_accepted: Whether to apply it.
            answer: The memory for the answer, which is filled with the model afterwards.
            advance: Called with the number of complete elements of the answer.
        """
        start = 0
        if is_accepted:
            self._preserve()
            start = self.num_parameters
            step = DividedStep(self._optimizer, self._parameters)
            touched = frozenset(self._touched_by(vector)) if self._touched is None else self._touched

            def change(piece: Piece) -> int:
                step.step(piece, vector[piece.start : piece.stop], touched)
                answer[piece.start : piece.stop] = self.model[piece.start : piece.stop]
                return piece.stop

            for stop in self.map(change, self._pieces):
                advance(stop)
            step.end()

        def fill(span: tuple[int, int]) -> int:
            begin, stop = span
            if is_accepted:
                teachers = min(max(begin, self.num_parameters + self.num_teachers), stop)
                self.model[begin:teachers].sub_(vector[begin:teachers], alpha=1 / self.senders)
                self.model[teachers:stop].lerp_(vector[teachers:stop], 1 / self.senders)
            answer[begin:stop] = self.model[begin:stop]
            return stop

        for stop in self.map(fill, spans(start, self.model.numel())):
            advance(stop)


def _arguments(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Returns the arguments of each group of an optimizer, without the state that some optimizers keep beside them."""
    parameters = inspect.signature(type(optimizer)).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    names = [*parameters, *(optimizer.defaults if takes_any else ())]
    return [
        {name: group[name] for name in names if name in group and name != "params"} for group in optimizer.param_groups
    ]


def _is_zero(part: Tensor) -> bool:
    """Returns whether a parameter was not trained, so that momentum must not move it. Usually one element tells."""
    return not (part[:1].any() or part.any())


def spans(start: int, stop: int) -> list[tuple[int, int]]:
    """Divides a range of elements into ranges of at most ``PIECE``."""
    return [(begin, min(begin + PIECE, stop)) for begin in range(start, stop, PIECE)]


def _norm_of(vector: Tensor) -> float:
    """Returns the Euclidean norm of a vector; infinite or NaN if it has such values, or if squares overflow."""
    return math.hypot(*(float(torch.linalg.vector_norm(part)) for part in torch.split(vector, PART)))


def all_finite(vector: Tensor) -> bool:
    """Returns whether a vector has neither NaN nor infinite values, usually with one pass over its memory."""
    # A sum can only be finite if every term is. The slower exact check is for sums of finite terms that overflow.
    return bool(torch.isfinite(vector.sum())) or bool(torch.isfinite(vector).all())


def _portions(sizes: Sequence[int]) -> list[slice]:
    """Divides consecutive parameters of these sizes into portions of about ``PART`` elements."""
    portions, start, elements = [], 0, 0
    for index, size in enumerate(sizes, start=1):
        elements += size
        if elements >= PART or index == len(sizes):
            portions.append(slice(start, index))
            start, elements = index, 0
    return portions
