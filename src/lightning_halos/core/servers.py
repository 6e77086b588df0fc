"""The parameter servers: each has a model and an optimizer, and computes what a push or update does to the model.

They send nothing and decide nothing about the run, which the nodes do. Only the server writes to its model. An update
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
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_halos.core.error_feedback import ErrorFeedback, add_residual_
from lightning_halos.core.messages import GlobalModel, Push, RegionUpdate
from lightning_halos.core.optim import DelayedNesterov
from lightning_halos.core.outliers import NormLimit
from lightning_halos.core.pieces import DividedStep, Piece, divide
from lightning_halos.core.quantization import Format
from lightning_halos.core.snapshot import Portion, ServerSnapshot
from lightning_halos.core.vector import PART, Advance, ignore_progress

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


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


class Finding(NamedTuple):
    """The result of inspecting an update."""

    fault: str | None  # why the update is invalid, regardless of other updates
    norm: float  # Euclidean norm of its parameters
    # Indices of the parameters that have values other than 0, in any lane; `None` if there is one lane, whose server
    # sees it by itself.
    touched: Collection[int] | None = None


def combine(findings: Sequence[Finding]) -> Finding:
    """Returns the finding for an update, given those for its slices in all lanes."""
    fault = next((finding.fault for finding in findings if finding.fault is not None), None)
    touched = [finding.touched for finding in findings if finding.touched is not None]
    together = sorted(set().union(*touched)) if touched else None
    return Finding(fault, math.hypot(*(finding.norm for finding in findings)), together)


class ParameterServer:
    """A model with a server optimizer that applies every valid update on arrival.

    Args:
        model: The initial model: a flat host tensor, first the parameters, then the buffers. The server owns it from
            here on.
        optimizer: Makes the server optimizer from the parameters.
        shapes: Shapes of the parameters in ``model``; the rest are buffers. Default: one flat parameter and no buffers.
        senders: Number of senders. The buffers of an update enter the server's with the weight ``1 / senders``.
        max_norm_ratio: Reject an update if its norm is more than this many times the median of the last norms; see
            :class:`~lightning_halos.core.outliers.NormLimit`. ``None``: no limit.

    Attributes:
        model: The present model.
        num_parameters: Elements of the model that are parameters. They come first.
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
        self.senders = senders
        parts = torch.split(model[: self.num_parameters], self._sizes)
        self._parameters = [nn.Parameter(part.view(shape)) for part, shape in zip(parts, shapes, strict=True)]
        self._optimizer = optimizer(self._parameters)
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
            for is_finite, part in self.map(look_at, _spans(there, stop)):
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
            part = slice(*span)
            if is_accepted:
                self.model[part].lerp_(vector[part], 1 / self.senders)
            answer[part] = self.model[part]
            return span[1]

        for stop in self.map(fill, _spans(start, self.model.numel())):
            advance(stop)


class LocalServer(ParameterServer):
    """A region's server (HALoS, algorithm 1): applies pushes, sends accumulated updates, merges the global model.

    After every ``accumulate_updates`` applied pushes it sends ``model at the last merge - model now`` to the global
    server and goes on serving. When the global model arrives, it merges it,
    ``model = (1 - merge_weight) * model + merge_weight * global model``, and counts the next pushes from there.

    Args:
        index: Index of this local server among all local servers.
        model: See :class:`ParameterServer`, like ``optimizer``, ``shapes`` and ``max_norm_ratio``.
        accumulate_updates: Applied pushes per exchange with the global server (``K``). ``None``: this is the only
            server, and nothing is exchanged.
        merge_weight: Weight of the global model in a merge (``alpha``).
        workers: Number of workers of this server.
        describe: Returns the name of a worker for warnings, by its global rank.

    Attributes:
        merges: Number of merged global models.
        merged_at: The version at the last merge.
        base_version: The version of the model that the next update is measured from.
        global_version: Version of the global model that was merged last.
        exchanging: Whether an update is unanswered.
        number: Number of the last update that was sent.
        steps: Local steps of the pushes since then.
        feedback: Rounds the updates, and has what the ones before lacked; ``None`` if they travel as they are and none
            before was rounded.
    """

    # Values in the state.
    _PLAIN = ("merges", "merged_at", "base_version", "global_version", "exchanging", "number", "steps")

    def __init__(
        self,
        index: int,
        model: Tensor,
        optimizer: OptimizerFactory,
        accumulate_updates: int | None,
        merge_weight: float,
        shapes: Sequence[torch.Size] | None = None,
        workers: int = 1,
        max_norm_ratio: float | None = None,
        describe: Callable[[int], str] = "worker {}".format,
    ) -> None:
        super().__init__(model, optimizer, shapes, workers, max_norm_ratio)
        self.index = index
        self._describe = describe
        self.merges = 0
        self.exchanging = False
        self.number = 0
        self.steps = 0
        self._accumulate_updates = accumulate_updates
        self._merge_weight = merge_weight
        # The model at the last update or merge, from which the next update is computed. None after the flush, and if
        # there is no global server.
        self._base: Tensor | None = self._begin()
        self.merged_at = 0
        self.base_version = 0
        self.global_version = 0
        self.feedback: ErrorFeedback | None = None

    def round_updates(self, form: Format) -> None:
        """Rounds the updates to the global server from now on to what a format can have."""
        self.feedback = ErrorFeedback(form, self.num_parameters, self.model.dtype)

    @property
    def exchanges(self) -> bool:
        """Whether there is a global server to exchange with."""
        return self._accumulate_updates is not None

    @property
    def is_due(self) -> bool:
        """Whether an update is due."""
        return (
            self._accumulate_updates is not None
            and not self.exchanging
            and self.version - self.merged_at >= self._accumulate_updates
        )

    def judge(self, push: Push, finding: Finding, version: int) -> bool:
        """Accepts or rejects a push that started from ``version``, and counts it. Returns whether to apply it.

        From here on :attr:`version` is that of the answer.
        """
        self.steps += push.steps
        return self._judge(finding, version, push.worker, self._describe(push.worker))

    def begin_exchange(self) -> RegionUpdate:
        """Returns the update that is due. :meth:`fill` must compute its vector before the next push or merge."""
        self.exchanging = True
        update = self._take()
        self.base_version = self.version
        return update

    def flush(self, stop: bool = False) -> RegionUpdate:
        """Returns the last update, with the local steps that no other update has.

        If an update is still unanswered, the last update contains the changes since that one, and the answer must not
        be merged. On a slow link these may be most of a run, measured from an old model. So the last update counts for
        no more than ``accumulate_updates`` pushes, like every other: if it has more, it is scaled down.
        """
        update = self._take()
        update.final, update.stop = True, stop
        self.fill(update)
        self.exchanging, self.merged_at, self.base_version = False, self.version, self.version
        return update

    def fill(self, update: RegionUpdate, advance: Advance = ignore_progress) -> None:
        """Computes the vector of an update of :meth:`begin_exchange` in place."""
        vector = update.vector
        assert vector is not None
        self._preserve()
        if not update.final:
            self._base = torch.empty_like(vector)
        base, model = self._base, self.model
        weight = _weight_of_last(self.version - self.base_version, self._accumulate_updates) if update.final else 1.0

        def fill(span: tuple[int, int]) -> int:
            start, stop = span
            if base is not None:
                base[start:stop] = model[start:stop]
            parameters = min(stop, max(start, self.num_parameters))
            vector[start:parameters].sub_(model[start:parameters])
            if weight < 1:
                vector[start:parameters].mul_(weight)
            vector[parameters:stop] = model[parameters:stop]
            if self.feedback is not None:
                self.feedback.round_(vector, start, stop, update.final)
            return stop

        for stop in self.map(fill, _spans(0, vector.numel())):
            advance(stop)

    def merge(self, reply: GlobalModel) -> None:
        """Merges the global server's answer to the unanswered update. Its vector is not kept."""
        base, vector = self._base, reply.vector
        assert base is not None
        assert vector is not None
        self.exchanging = False
        self._preserve()

        def merge(span: tuple[int, int]) -> None:
            part = slice(*span)
            self.model[part].lerp_(vector[part], self._merge_weight)
            base[part] = self.model[part]

        deque(self.map(merge, _spans(0, vector.numel())), maxlen=0)
        self.merged_at = self.base_version = self.version
        self.global_version = reply.version
        self.merges += 1

    def adopt_final_model(self, model: Tensor) -> None:
        """Copies the final global model after the flush, for a later run that continues from there."""
        self._preserve()
        self.model.copy_(model)
        self._base = self._begin()
        self.merged_at = self.base_version = self.version
        self.exchanging = False
        self.steps = 0
        self._take_residual(None)

    def _state(self) -> dict[str, Any]:
        return {
            **super()._state(),
            **{name: getattr(self, name) for name in self._PLAIN},
            "parameters": self.num_parameters,
            "accumulate_updates": self._accumulate_updates,
            # After the flush everything has been sent.
            "base": self.model if self._base is None and self.exchanges else self._base,
            **({} if self.feedback is None else {"residual": self.feedback.residual}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        base = state["base"]
        self._base = base.clone() if self.exchanges and base is not None else self._begin()
        self._take_residual(state.get("residual"))
        for name in self._PLAIN:
            setattr(self, name, _base_version(state) if name == "base_version" else state[name])

    def _take_residual(self, residual: Tensor | None) -> None:
        """Goes on with what the updates before lacked. If none is rounded now, the next ones contain all of it."""
        if residual is not None and self.feedback is None and self.exchanges:
            self.round_updates("float32")
        if self.feedback is not None:
            self.feedback.residual.copy_(torch.zeros(()) if residual is None else residual)

    def _begin(self) -> Tensor | None:
        return None if self._accumulate_updates is None else self.model.clone()

    def _take(self) -> RegionUpdate:
        """Returns an update whose vector is still the base, from which :meth:`fill` computes the values."""
        assert self._base is not None
        vector, self._base = self._base, None
        steps, self.steps = self.steps, 0
        self.number += 1
        return RegionUpdate(self.index, self.global_version, steps, vector=vector, number=self.number)


class GlobalServer(ParameterServer):
    """The server of all regions: applies each region's accumulated update as a pseudo-gradient on arrival.

    Attributes:
        steps: Local steps of all updates, including rejected ones.
    """

    def __init__(
        self,
        model: Tensor,
        optimizer: OptimizerFactory,
        shapes: Sequence[torch.Size] | None = None,
        servers: int = 1,
    ) -> None:
        super().__init__(model, optimizer, shapes, senders=servers)
        self.steps = 0

    def receive(self, update: RegionUpdate, finding: Finding | None = None, name: str | None = None) -> GlobalModel:
        """Applies a region's accumulated update, unless it has no local steps and is final. Returns the answer.

        Args:
            update: The update. Its vector's memory is reused for the answer.
            finding: The result of :meth:`inspect` for its vector. Default: inspect it now.
            name: The sender's name in warnings. Default: the local server with its index.
        """
        assert update.vector is not None
        self.steps += update.steps
        is_accepted = False
        if update.steps or not update.final:
            finding = self.find(update.vector) if finding is None else finding
            name = f"the local server {update.server}" if name is None else name
            is_accepted = self._judge(finding, update.version, update.server, name)
        return self.answer(update, is_accepted)

    def answer(self, update: RegionUpdate, is_accepted: bool = False) -> GlobalModel:
        """Applies an update if it is accepted, and returns the answer."""
        assert update.vector is not None
        answer = self.memory_for(update.vector)
        self.apply(update.vector, is_accepted, answer)
        return GlobalModel(self.version, vector=answer, number=update.number)

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.steps = state["steps"]


class SynchronousServer(ParameterServer):
    """The server of synchronous rounds (DiLoCo, arXiv 2311.08105): applies the mean of all workers' rounds."""

    def receive(self, mean: Tensor) -> None:
        """Applies the mean of the workers' vectors, and overwrites it with the new model."""
        is_accepted = self._judge(self.find(mean), self.version, 0, "all workers together")
        self.apply(mean, is_accepted, mean)


def unsent_update(index: int, state: Mapping[str, Any]) -> RegionUpdate:
    """Returns the last update that a local server with this state would send; see :meth:`LocalServer.flush`."""
    model, parameters = state["model"], state["parameters"]
    vector = state["base"] - model
    pushes = state["version"] - _base_version(state)
    vector[:parameters] *= _weight_of_last(pushes, state.get("accumulate_updates"))
    if (residual := state.get("residual")) is not None:
        add_residual_(vector[:parameters], residual)
    vector[parameters:] = model[parameters:]
    return RegionUpdate(index, state["global_version"], state["steps"], vector=vector)


def _arguments(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Returns the arguments of each group of an optimizer, without the state that some optimizers keep beside them."""
    parameters = inspect.signature(type(optimizer)).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    names = [*parameters, *(optimizer.defaults if takes_any else ())]
    return [
        {name: group[name] for name in names if name in group and name != "params"} for group in optimizer.param_groups
    ]


def _weight_of_last(pushes: int, accumulate_updates: int | None) -> float:
    """Returns the weight of a last update of this many pushes; see :meth:`LocalServer.flush`."""
    return 1.0 if accumulate_updates is None else min(1.0, accumulate_updates / max(1, pushes))


def _base_version(state: Mapping[str, Any]) -> int:
    """Returns the version that the next update is measured from.

    Earlier checkpoints have none. The present one stands for it then, so that the last update is sent in full, as
    those versions did.
    """
    version: int = state.get("base_version", state["version"])
    return version


def plain_finding(finding: Finding | None) -> tuple[str | None, float, list[int]] | None:
    """Returns the finding of several lanes as plain values, for a snapshot; ``None`` for one lane."""
    if finding is None or finding.touched is None:
        return None
    return finding.fault, finding.norm, list(finding.touched)


def update_of_snapshot(fields: Mapping[str, Any]) -> tuple[RegionUpdate, Finding | None]:
    """Returns an update of a snapshot, as a copy, and the finding of several lanes for it."""
    fields = dict(fields)
    finding = fields.pop("finding", None)
    fields["vector"] = fields["vector"].clone()
    return RegionUpdate(**fields), None if finding is None else Finding(*finding)


def _is_zero(part: Tensor) -> bool:
    """Returns whether a parameter was not trained, so that momentum must not move it. Usually one element tells."""
    return not (part[:1].any() or part.any())


def _spans(start: int, stop: int) -> list[tuple[int, int]]:
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
