"""The kinds of parameter server.

Rules of this room: a server takes one message and returns the messages that answer it. It does not know who carries
them, when, or whether the world is real. It owns its model and nobody else writes to it. What would poison the model is
dropped, counted and warned about; the sender goes on from the server's model. What comes again is answered again, and
never applied twice.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_halos.core.messages import GlobalModel, Push, RegionUpdate
from lightning_halos.core.optim import DelayedNesterov
from lightning_halos.core.outliers import NormLimit
from lightning_halos.core.vector import PART, Reach, nobody

log = logging.getLogger(__name__)

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]

# Optimizers that treat every parameter by itself and leave those without a gradient alone: a step may be made portion
# by portion. Others may look at all parameters at once.
_BY_PARAMETER = (DelayedNesterov, torch.optim.SGD)

_REPEATED = 3  # updates of one sender that are dropped in a row before it is named, and again after 6, 12, ...


class Finding(NamedTuple):
    """What a look at an update has found.

    Attributes:
        fault: What is wrong with it whatever came before, ``None`` if nothing is.
        norm: Euclidean norm of its parameters' part.
    """

    fault: str | None
    norm: float


class ParameterServer:
    """A model, a server optimizer, and the rule that every good update is applied the moment it comes.

    Args:
        model: The initial model: a flat host tensor, parameters first, buffers behind them. The server owns it from
            here on.
        optimizer: Makes the server optimizer from the parameters.
        shapes: Shapes of the parameters in ``model``; default: one flat parameter and no buffers. What is behind them
            are buffers.
        senders: How many senders the server has; each one's buffers enter the server's with the weight ``1 / senders``.
        max_norm_ratio: Drop an update whose norm is more than this many times the median of the last ones; see
            :class:`~lightning_halos.core.outliers.NormLimit`. ``None``: there is no such limit.

    Attributes:
        model: The model now.
        version: Updates applied so far.
        rejections: Updates dropped so far, by sender.
        staleness: Of the last applied update: versions between the model that it started from and its arrival.
        received: Number of the last update of each sender. No part of the state: workers of a run that resumes are new
            and count from 1.
        senders: How many senders the server has.
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
        self.received: dict[int, int] = {}
        self._dropped_in_a_row: dict[int, int] = {}
        self._norm_limit = None if max_norm_ratio is None else NormLimit(max_norm_ratio)
        self._sizes = [shape.numel() for shape in shapes]
        self._num_parameters = sum(self._sizes)
        self.senders = senders
        parts = torch.split(model[: self._num_parameters], self._sizes)
        self._parameters = [nn.Parameter(part.view(shape)) for part, shape in zip(parts, shapes, strict=True)]
        self._optimizer = optimizer(self._parameters)
        self._portions = _portions(self._sizes) if type(self._optimizer) in _BY_PARAMETER else [slice(len(self._sizes))]

    @property
    def rejected(self) -> int:
        """Updates dropped so far."""
        return sum(self.rejections.values())

    def inspect(self, vector: Tensor, filled: Iterable[int] | None = None) -> Finding:
        """Looks at an update, in one pass over its memory. Reads nothing that an update changes.

        Args:
            vector: The update.
            filled: Says again and again how many elements of it are there, while it arrives. Default: they all are.
        """
        there, finite, norm, end = 0, True, 0.0, self._num_parameters
        for stop in [vector.numel()] if filled is None else filled:
            parameters, buffers = vector[there : min(stop, end)], vector[max(there, end) : stop]
            part = norm_of(parameters)
            # Squares overflow before the values do.
            finite = (math.isfinite(part) or all_finite(parameters)) and all_finite(buffers) and finite
            norm, there = math.hypot(norm, part), stop
        fault = None if finite else "it has NaN or infinite values"
        if vector.shape != self.model.shape:
            fault = f"its shape is {tuple(vector.shape)}, the model's is {tuple(self.model.shape)}"
        if vector.dtype != self.model.dtype:
            fault = f"its dtype is {vector.dtype}, the model's is {self.model.dtype}"
        return Finding(fault, norm)

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of all that an equal server needs to go on as this one would: tensors and plain values."""
        return {
            "model": self.model.clone(),
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
            "optimizer_type": type(self._optimizer).__name__,
            "version": self.version,
            "rejections": dict(self.rejections),
            "staleness": self.staleness,
            "senders": self.senders,
            "dropped_in_a_row": dict(self._dropped_in_a_row),
            "norms": [] if self._norm_limit is None else list(self._norm_limit.norms),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on as the server of a :meth:`state_dict` would have. Keeps no tensor of it.

        If that server had another number of senders, its momentum is kept, but not its rates: this server's own are for
        its number of senders. Momentum windows begin anew then.

        Raises:
            ValueError: If it is the state of another model or of another server optimizer.
        """
        model = state["model"]
        if model.shape != self.model.shape or model.dtype != self.model.dtype:
            raise ValueError(
                f"The state is that of a server of {model.numel()} elements of {model.dtype}, but this server's model"
                f" has {self.model.numel()} of {self.model.dtype}. Load the state of a server of the same model."
            )
        if state["optimizer_type"] != (mine := type(self._optimizer).__name__):
            raise ValueError(f"its server optimizer is {state['optimizer_type']}, this one is {mine}")
        own = [{k: v for k, v in group.items() if k != "params"} for group in self._optimizer.param_groups]
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        if state["senders"] != self.senders:
            for group, values in zip(self._optimizer.param_groups, own, strict=True):
                group.update(values)
            if isinstance(self._optimizer, DelayedNesterov):
                self._optimizer.restart_windows()
        self.model.copy_(model)
        self.version, self.staleness = state["version"], state["staleness"]
        self.rejections = dict(state["rejections"])
        self._dropped_in_a_row = dict(state["dropped_in_a_row"])
        if self._norm_limit is not None:
            self._norm_limit.load(state["norms"])

    def _is_new(self, number: int, sender: int, name: str) -> bool:
        """Takes note of the number of a sender's update. Returns whether it comes for the first time."""
        if 0 < number <= self.received.get(sender, 0):
            log.warning("Update %d of %s came again. It is answered again, but not applied twice.", number, name)
            return False
        self.received[sender] = number
        return True

    def _count(self, finding: Finding, version: int, sender: int, name: str) -> bool:
        """Counts an update, which started from a version of the model. Returns whether it is to be applied."""
        fault = finding.fault
        if fault is None and self._norm_limit is not None:
            fault = self._norm_limit.fault(finding.norm)
        if fault is None:
            self.staleness = self.version - version
            self.version += 1
            self._dropped_in_a_row.pop(sender, None)
            return True
        self.rejections[sender] = self.rejections.get(sender, 0) + 1
        in_a_row = self._dropped_in_a_row[sender] = self._dropped_in_a_row.get(sender, 0) + 1
        repeats, rest = divmod(in_a_row, _REPEATED)
        if in_a_row < _REPEATED:
            log.warning(
                "The update of %s was dropped: %s. It goes on from the server's model (%d dropped so far).",
                name,
                fault,
                self.rejected,
            )
        elif not rest and repeats.bit_count() == 1:
            log.warning(
                "The last %d updates of %s were all dropped, this one because %s. Its steps count, but nothing that it"
                " computes enters the model. Look at its loss, its data and its device; clip gradients or lower the"
                " learning rate; or take it out of the run.",
                in_a_row,
                name,
                fault,
            )
        return False

    def _memory(self, vector: Tensor) -> Tensor:
        """Returns the memory for the answer to an update: that of the update, if it fits."""
        fits = vector.dtype == self.model.dtype and vector.shape == self.model.shape
        return vector if fits else torch.empty_like(self.model)

    def _apply(self, vector: Tensor, is_good: bool, answer: Tensor, reach: Reach = nobody) -> None:
        """Applies an update if it is good, and answers it, one portion of the model after the other."""
        stop = 0
        for portion in self._portions if is_good else []:
            parameters = self._parameters[portion]
            start, stop = stop, stop + sum(self._sizes[portion])
            flat = vector[start:stop]
            parts = torch.split(flat, self._sizes[portion])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.grad = part.view_as(parameter)
            self._optimizer.step()
            for parameter in parameters:
                parameter.grad = None
            self._answer(answer, start, stop, reach)
        if is_good:
            self.model[stop:].lerp_(vector[stop:], 1 / self.senders)
        self._answer(answer, stop, self.model.numel(), reach)

    def _answer(self, answer: Tensor, start: int, stop: int, reach: Reach) -> None:
        """Copies a part of the model into the answer."""
        for begin in range(start, stop, PART):
            end = min(begin + PART, stop)
            answer[begin:end].copy_(self.model[begin:end])
            reach(end)


class LocalServer(ParameterServer):
    """A region's server (HALoS, algorithm 1): applies pushes, sends what has accumulated, merges the global model.

    After every ``accumulate_updates`` applied pushes it sends ``model at the last merge - model now`` to the global
    server and goes on serving. When the global model comes back it merges
    ``model = (1 - merge_weight) * model + merge_weight * global model`` and counts the next pushes from there.

    Args:
        index: Index of this server among all local servers.
        model: The initial model; see :class:`ParameterServer`.
        optimizer: Makes the local server optimizer from the parameters.
        accumulate_updates: Applied pushes per exchange with the global server (``K``). ``None``: this is the only
            server, and nothing is exchanged.
        merge_weight: Weight of the global model in a merge (``alpha``).
        shapes: Shapes of the parameters in ``model``.
        workers: Number of workers of this server.
        max_norm_ratio: See :class:`ParameterServer`.
        describe: Names a worker of a global rank in warnings.

    Attributes:
        merges: Global models merged so far.
        exchanging: Whether an update is on its way to the global server and unanswered.
        number: Number of the last update that was sent.
        steps: Local steps behind the pushes since then.
    """

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
        # The model as it was last sent or merged, which the next update is counted from. None after the flush, and
        # where nothing is exchanged.
        self._base: Tensor | None = self._begin()
        self._merged_at = 0
        self._global_version = 0

    @property
    def exchanges(self) -> bool:
        """Whether there is a global server to exchange with."""
        return self._accumulate_updates is not None

    @property
    def is_due(self) -> bool:
        """Whether it is time to send an update."""
        return (
            self._accumulate_updates is not None
            and not self.exchanging
            and self.version - self._merged_at >= self._accumulate_updates
        )

    def receive(self, push: Push) -> tuple[Tensor | None, RegionUpdate | None]:
        """Applies a push.

        Args:
            push: A finished round. Its vector's memory is reused for the answer.

        Returns:
            The model for the worker to go on from, ``None`` if it pushed no vector, and the update to send to the
            global server, if one is due.
        """
        if push.vector is None:
            return None, None
        answer, is_good = self.accept(push, self.inspect(push.vector))
        self.apply(push, is_good, answer)
        if not self.is_due:
            return answer, None
        update = self.begin_exchange()
        self.fill(update)
        return answer, update

    def accept(self, push: Push, finding: Finding) -> tuple[Tensor, bool]:
        """Counts a push that :meth:`apply` applies: from here on ``version`` is that of the answer.

        Args:
            push: A finished round, with a vector.
            finding: What :meth:`inspect` found in its vector.

        Returns:
            The memory for the answer, and whether the push has to be applied: it is new and would not poison the model.
        """
        assert push.vector is not None
        is_good = False
        if self._is_new(push.number, push.worker, name := self._describe(push.worker)):
            self.steps += push.steps
            is_good = self._count(finding, push.version, push.worker, name)
        return self._memory(push.vector), is_good

    def apply(self, push: Push, is_good: bool, answer: Tensor, reach: Reach = nobody) -> None:
        """Applies a push, if it has to be applied, and answers it.

        Args:
            push: The push.
            is_good: Whether it has to be applied, as :meth:`accept` said.
            answer: The memory that :meth:`accept` returned. It becomes the model for the worker to go on from.
            reach: Told how many elements of the answer are complete.
        """
        assert push.vector is not None
        self._apply(push.vector, is_good, answer, reach)

    def begin_exchange(self) -> RegionUpdate:
        """Returns the update that is due. :meth:`fill` computes its vector, before the next push or merge."""
        self.exchanging = True
        return self._take()

    def flush(self, stop: bool = False) -> RegionUpdate:
        """Returns the last update: all that the global server does not have yet.

        Nothing is lost if the last exchange is still unanswered: then this is what was added since that was sent. The
        answer to that is no longer merged.

        Args:
            stop: Whether one of the workers asked for the whole run to stop.
        """
        update = self._take()
        update.final, update.stop = True, stop
        self.fill(update)
        return update

    def fill(self, update: RegionUpdate, reach: Reach = nobody) -> None:
        """Computes the vector of an update, in its memory.

        Args:
            update: What :meth:`begin_exchange` returned.
            reach: Told how many elements of the vector are complete.
        """
        vector = update.vector
        assert vector is not None
        if not update.final:
            self._base = torch.empty_like(vector)
        for start in range(0, vector.numel(), PART):
            stop = min(start + PART, vector.numel())
            if self._base is not None:
                self._base[start:stop] = self.model[start:stop]
            parameters = min(stop, max(start, self._num_parameters))
            vector[start:parameters].sub_(self.model[start:parameters])
            vector[parameters:stop] = self.model[parameters:stop]
            reach(stop)

    def merge(self, reply: GlobalModel) -> None:
        """Merges the global server's answer. Ignored unless it answers the update that is unanswered.

        Args:
            reply: The global server's answer to an update. Its vector is not kept.
        """
        if self._base is None or not self.exchanging or reply.number not in (0, self.number):
            return
        assert reply.vector is not None
        self.exchanging = False
        self.model.lerp_(reply.vector, self._merge_weight)
        self._base.copy_(self.model)
        self._merged_at = self.version
        self._global_version = reply.version
        self.merges += 1

    def settle(self, model: Tensor) -> None:
        """Takes the final global model as its own after the flush, so that a later run can go on from there.

        Args:
            model: The final global model. It is copied.
        """
        self.model.copy_(model)
        self._base = self._begin()
        self._merged_at = self.version
        self.exchanging = False

    def state_dict(self) -> dict[str, Any]:
        # After the flush there is nothing that the global server does not have, and no answer to wait for.
        is_flushed = self._base is None
        return {
            **super().state_dict(),
            "base": self._begin() if self._base is None else self._base.clone(),
            "merged_at": self._merged_at,
            "merges": self.merges,
            "steps": self.steps,
            "exchanging": self.exchanging and not is_flushed,
            "global_version": self._global_version,
            "parameters": self._num_parameters,
            "number": self.number,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        base = state["base"]
        self._base = self._begin() if base is None or self._accumulate_updates is None else base.clone()
        self._merged_at, self.merges = state["merged_at"], state["merges"]
        self.steps, self.exchanging = state["steps"], state["exchanging"]
        self._global_version, self.number = state["global_version"], state["number"]

    def _begin(self) -> Tensor | None:
        return None if self._accumulate_updates is None else self.model.clone()

    def _take(self) -> RegionUpdate:
        """Returns the header of an update, whose vector has the memory of what it is counted from."""
        assert self._base is not None
        vector, self._base = self._base, None
        steps, self.steps = self.steps, 0
        self.number += 1
        return RegionUpdate(self.index, self._global_version, steps, vector=vector, number=self.number)


class GlobalServer(ParameterServer):
    """The server of all regions: applies each region's accumulated update as a pseudo-gradient the moment it comes.

    Args:
        model: The initial model; see :class:`ParameterServer`.
        optimizer: Makes the global server optimizer from the parameters.
        shapes: Shapes of the parameters in ``model``.
        servers: Number of local servers.

    Attributes:
        steps: Local steps behind all updates, dropped ones included.
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

    def receive(self, update: RegionUpdate, finding: Finding | None = None) -> GlobalModel:
        """Applies a region's accumulated update.

        Args:
            update: The update. Its vector's memory is reused for the answer. A final update without local steps behind
                it changes nothing.
            finding: What :meth:`inspect` found in its vector; default: it looks now.

        Returns:
            The global model, for the region to merge.
        """
        assert update.vector is not None
        is_good = False
        if self._is_new(update.number, update.server, name := f"the local server {update.server}"):
            self.steps += update.steps
            if update.steps or not update.final:
                finding = self.inspect(update.vector) if finding is None else finding
                is_good = self._count(finding, update.version, update.server, name)
        answer = self._memory(update.vector)
        self._apply(update.vector, is_good, answer)
        return GlobalModel(self.version, vector=answer, number=update.number)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.steps = state["steps"]


def unsent(index: int, state: Mapping[str, Any]) -> RegionUpdate:
    """Returns what the global server does not have yet of a local server, as :meth:`LocalServer.flush` would.

    Args:
        index: Index of the local server.
        state: Its state; see :meth:`LocalServer.state_dict`.
    """
    model, parameters = state["model"], state["parameters"]
    vector = state["base"] - model
    vector[parameters:] = model[parameters:]
    return RegionUpdate(index, state["global_version"], state["steps"], vector=vector)


class SynchronousServer(ParameterServer):
    """The server of synchronous rounds (DiLoCo, arXiv 2311.08105): applies the mean of all workers' rounds.

    Args:
        model: The initial model; see :class:`ParameterServer`.
        optimizer: Makes the outer optimizer from the parameters.
        shapes: Shapes of the parameters in ``model``.
    """

    def __init__(self, model: Tensor, optimizer: OptimizerFactory, shapes: Sequence[torch.Size] | None = None) -> None:
        super().__init__(model, optimizer, shapes)

    def receive(self, mean: Tensor) -> None:
        """Applies a round.

        Args:
            mean: The mean of the workers' pseudo-gradients, then that of their buffers. It becomes the model to go on
                from.
        """
        is_good = self._count(self.inspect(mean), self.version, 0, "all workers together")
        self._apply(mean, is_good, mean)


def norm_of(vector: Tensor) -> float:
    """Euclidean norm of a vector; infinite or NaN if it has such values, or its squares overflow."""
    return math.hypot(*(float(torch.linalg.vector_norm(part)) for part in torch.split(vector, PART)))


def all_finite(vector: Tensor) -> bool:
    """Whether a vector has neither NaN nor infinities, in one pass over its memory."""
    # A sum is finite only if every term is; the exact and much slower look is for sums that overflow.
    return bool(torch.isfinite(vector.sum())) or bool(torch.isfinite(vector).all())


def _portions(sizes: Sequence[int]) -> list[slice]:
    """Divides parameters of these sizes into runs of about ``PART`` elements."""
    portions, start, elements = [], 0, 0
    for index, size in enumerate(sizes, start=1):
        elements += size
        if elements >= PART or index == len(sizes):
            portions.append(slice(start, index))
            start, elements = index, 0
    return portions
