"""The nodes of a run on a described cluster, which deliver messages in the order of a virtual clock.

The nodes of ``core`` make all decisions of the algorithm. There are no threads and no workers here: a driver asks for
the rounds that end next, and passes the workers' pushes. The end of a round is known when it begins, and does not
depend on its result. So a network whose pushes have no vectors has the same rounds; each worker process uses one to
know its data in advance.

This is what all networks have in common. The kinds of networks are in ``region_network``, ``overlap`` and
``synchronous_network``.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_halos.core.algorithms import Algorithm
from lightning_halos.core.cursor import DataCursor, Spans
from lightning_halos.core.messages import Message, Pull, Push
from lightning_halos.core.schedule import StepBudget
from lightning_halos.simulation.history import Event
from lightning_halos.simulation.timing import Timing


@dataclass
class Round:
    """A round of a worker.

    Attributes:
        worker: Global rank of the worker.
        begin: Virtual time in milliseconds at which the server sends its model to the worker.
        end: Virtual time in milliseconds at which the worker's push arrives at the server.
        first: Local steps that were leased to all workers before this round.
        steps: Local steps of the round; 0 if no work is left, so that the push is the worker's last.
        position: Global step with which the worker's schedules start the round.
        leaves: Virtual time at which the push leaves the worker, if it trains on meanwhile; see :mod:`.overlap`.
    """

    worker: int
    begin: float
    end: float
    first: int
    steps: int
    position: int
    leaves: float = 0.0


@dataclass(frozen=True)
class Work:
    """The ordered work.

    Attributes:
        budget: The step budget at the start of the run.
        end: Local steps of all workers, including earlier runs, after which no work is left; may be infinite.
        steps_per_epoch: Data of an epoch, in local steps. Default: no epochs.
        offset: Position in the data minus local steps: the data that earlier runs trained on, in local steps, minus
            ``budget.total``.
        ends_with_data: Whether there is no more data after ``end``. Then workers end their epochs by themselves, and
            are not told to stop.
        begin: Virtual time in milliseconds at which the run begins. More than 0 if it goes on after the end of another.
        earlier: Local steps of all workers before, in the runs with the same clock.
    """

    budget: StepBudget
    end: float = math.inf
    steps_per_epoch: int = 1 << 62
    offset: int = 0
    ends_with_data: bool = False
    begin: float = 0.0
    earlier: int = 0


class Network(ABC):
    """The nodes of a run, the messages between them, and the rounds of the workers.

    Attributes:
        work: The ordered work.
        now: Virtual time of the last event in milliseconds.
        rounds: The rounds in progress, by worker.
        steps: Local steps that all workers together have finished in this run.
        history: The events so far.
        outbox: Messages to workers, which the driver has to deliver: pairs of a global rank and a message.
        finished: Whether the final model has been sent.
    """

    def __init__(self, timing: Timing, work: Work, algorithm: Algorithm) -> None:
        self.work = work
        self.now = work.begin
        self.rounds: dict[int, Round] = {}
        self.steps = 0
        self.history: list[Event] = []
        self.outbox: list[tuple[int, Message]] = []
        self.finished = False
        self._timing = timing
        self._workers = work.budget.workers
        # Towards the end rounds get shorter. The cursor leases exactly the ordered work.
        limit = None if work.end == math.inf else math.ceil(work.end / self._workers)
        speeds = dict(enumerate(timing.cluster.relative_speeds))
        self._planner = algorithm.planner(self._workers, limit, speeds)
        self._next = work.budget.total
        self._used = Spans([(0, self.handed_out)] if self.handed_out else [])
        self._cursor = DataCursor(work.steps_per_epoch, done=self._used, end=work.end + work.offset)
        self._left: list[int] = []
        self._begun: list[Round] | None = None  # those that a replay has not yielded yet

    @property
    @abstractmethod
    def model(self) -> Tensor | None:
        """The global model; ``None`` if only the workers have it."""

    @property
    @abstractmethod
    def version(self) -> int:
        """Number of updates in the global model."""

    @property
    def total(self) -> int:
        """Local steps that all workers together have finished, including earlier runs."""
        return self.work.budget.total + self.steps

    @property
    def handed_out(self) -> int:
        """End of the leased data, in local steps from the start of the first epoch."""
        return self._next + self.work.offset

    def start(self) -> None:
        """Starts the first rounds of all workers, unless there are rounds already."""
        if not self.rounds:
            steps = {worker: self._planner.local_steps(worker, self.total) for worker in range(self._workers)}
            self._begin_all({worker: Pull(0, planned, 0, stop=False) for worker, planned in steps.items()})

    def running(self) -> list[Round]:
        """Returns the rounds in progress, a worker's earlier one first."""
        return list(self.rounds.values())

    @abstractmethod
    def due(self) -> list[Round]:
        """Delivers the messages that arrive before the next rounds end.

        Returns:
            The rounds that end next, at the same moment, in the order in which :meth:`finish` handles them. Empty when
            the run is over.
        """

    @abstractmethod
    def finish(self, pushes: Sequence[Push]) -> None:
        """Ends the rounds of :meth:`due`, and starts the workers' next rounds.

        Args:
            pushes: The workers' pushes, in the order of the rounds. Their durations are replaced by virtual ones.
        """

    @abstractmethod
    def publish(self, plateau_steps: Sequence[tuple[int, float]], metrics: dict[str, float]) -> None:
        """Sends the steps of rank 0's plateau schedulers, and its metrics, to all workers."""

    def statistics(self) -> list[dict[str, Any]]:
        """Returns the counters of each local server, as :class:`~lightning_halos.HalosMonitor` shows them."""
        return []

    def adopt_final_model(self) -> None:  # noqa: B027  (does nothing without local servers)
        """Replaces the local servers' models by the final model, for a later run that continues from there."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of the state of the servers and the messages in flight, of tensors and plain values."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state of :meth:`state_dict`. Call it before :meth:`load_schedule`."""

    def schedule(self) -> dict[str, Any]:
        """Returns the rounds in progress and the leased data, as plain values that are the same for all processes."""
        running = [dataclasses.astuple(self.rounds[worker]) for worker in sorted(self.rounds)]
        return {"next": self._next, "steps": self.steps, "running": running, "left": list(self._left)}

    def load_schedule(self, schedule: Mapping[str, Any]) -> None:
        """Restores the rounds of :meth:`schedule`."""
        self._next, self.steps, self._left = schedule["next"], schedule["steps"], list(schedule["left"])
        self._used.add([(0, self.handed_out)])
        rounds = [Round(*fields) for fields in schedule["running"]]
        self.rounds = {r.worker: r for r in rounds}
        self.now = max((r.begin for r in rounds), default=0.0)

    def replay(self) -> Iterator[Round]:
        """Runs without vectors. Yields all rounds that have steps, in order; first the rounds in progress."""
        self.start()
        self._begun = self.running()
        while True:
            begun, self._begun = self._begun, []
            yield from sorted((r for r in begun if r.steps), key=lambda r: r.first)
            if not (ended := self.due()):
                return
            self.finish([Push(r.worker, 0, r.steps, r.steps, 0.0, final=not r.steps) for r in ended])
            self.outbox.clear()

    @abstractmethod
    def _begin_all(self, pulls: Mapping[int, Pull]) -> None:
        """Starts rounds now, with the answers of the servers."""

    @abstractmethod
    def _lease(self, worker: int, steps: int) -> int:
        """Leases the next data to a worker. Returns its local steps, 0 if no data is left."""

    def _begin(self, worker: int, pull: Pull, position: int | None = None) -> Round:
        """Starts a round with the local steps of the pull, or with those that are left, which it writes to the pull.

        By default the schedules start at the local steps that were leased before, divided by the number of workers.
        """
        planned, first = 0 if pull.stop else pull.local_steps, self._next
        while (missing := planned - (self._next - first)) and (leased := self._lease(worker, missing)):
            self._next += leased
        steps = self._next - first
        position = first // self._workers if position is None else position
        pull.stop = not steps and (pull.stop or not self.work.ends_with_data)
        if steps:
            pull.local_steps, pull.position = steps, position
        begun = self.rounds[worker] = Round(worker, self.now, self.now, first, steps, position)
        if self._begun is not None:
            self._begun.append(begun)
        return begun

    def _end(self, push: Push) -> None:
        """Ends the round of a push, and replaces the push's durations by virtual ones."""
        ended = self._take_ended(push)
        self.now = ended.end
        self.steps += push.steps
        push.seconds = self._timing.compute(ended.worker, ended.steps) / 1e3
        push.waited = ((ended.leaves or ended.end) - ended.begin) / 1e3 - push.seconds
        if push.final:
            self._left.append(push.worker)

    def _take_ended(self, push: Push) -> Round:
        """Removes the round that a push ends, and returns it."""
        return self.rounds.pop(push.worker)

    def _note(
        self, kind: str, version: int, model: Tensor | None, server: int = -1, worker: int = -1, staleness: int = 0
    ) -> None:
        parameters = model.clone() if self._timing.cluster.record_parameters and model is not None else None
        steps = self.work.earlier + self.steps
        self.history.append(Event(self.now, kind, server, worker, version, steps, staleness, parameters))
