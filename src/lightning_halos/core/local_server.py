"""The server of a region: it applies the pushes of its workers, and exchanges updates with the global server."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_halos.core.delayed_nesterov import OptimizerFactory
from lightning_halos.core.error_feedback import ErrorFeedback, add_residual_
from lightning_halos.core.finding import Finding
from lightning_halos.core.messages import GlobalModel, Push, RegionUpdate
from lightning_halos.core.parameter_server import ParameterServer, spans
from lightning_halos.core.quantization import Format
from lightning_halos.core.vector import Advance, ignore_progress


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
            teachers = min(stop, max(start, self.num_parameters + self.num_teachers))
            vector[start:teachers].sub_(model[start:teachers])
            if weight < 1:
                vector[start:parameters].mul_(weight)
            vector[teachers:stop] = model[teachers:stop]
            if self.feedback is not None:
                self.feedback.round_(vector, start, stop, update.final)
            return stop

        for stop in self.map(fill, spans(0, vector.numel())):
            advance(stop)

    def merge(self, reply: GlobalModel) -> None:
        """Merges the global server's answer to the unanswered update. Its vector is not kept.

        As published, no update has what pushes change during the exchange. Of teachers, the next one has it.
        """
        base, vector = self._base, reply.vector
        assert base is not None
        assert vector is not None
        self.exchanging = False
        self._preserve()

        def merge(span: tuple[int, int]) -> None:
            part = slice(*span)
            self.model[part].lerp_(vector[part], self._merge_weight)
            base[part] = self.model[part]

        def merge_teachers(span: tuple[int, int]) -> None:
            part = slice(*span)
            change = vector[part].sub_(self.model[part]).mul_(self._merge_weight)
            self.model[part].add_(change)
            base[part].add_(change)

        first, last = self.num_parameters, self.num_parameters + self.num_teachers
        deque(self.map(merge, [*spans(0, first), *spans(last, vector.numel())]), maxlen=0)
        deque(self.map(merge_teachers, spans(first, last)), maxlen=0)
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


def unsent_update(index: int, state: Mapping[str, Any], teachers: int = 0) -> RegionUpdate:
    """Returns the last update that a local server with this state would send; see :meth:`LocalServer.flush`.

    Args:
        index: Index of the local server.
        state: Its state.
        teachers: Elements of teachers.
    """
    model, parameters = state["model"], state["parameters"]
    vector = state["base"] - model
    pushes = state["version"] - _base_version(state)
    vector[:parameters] *= _weight_of_last(pushes, state.get("accumulate_updates"))
    if (residual := state.get("residual")) is not None:
        add_residual_(vector[:parameters], residual)
    vector[parameters + teachers :] = model[parameters + teachers :]
    return RegionUpdate(index, state["global_version"], state["steps"], vector=vector)


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
