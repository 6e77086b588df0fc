"""The nodes of a run on a described cluster, which deliver messages in the order of a virtual clock.

The nodes of ``core`` make all decisions of the algorithm. There are no threads and no workers here: a driver asks for
the rounds that end next, and passes the workers' pushes. The end of a round is known when it begins, and does not
depend on its result. So a network whose pushes have no vectors has the same rounds; each worker process uses one to
know its data in advance.

A local server applies one push after the other: it handles each when it arrives, and its answer leaves when all pushes
so far have had their time. Updates and global models take the cluster's time from one region to another. As in the
published simulator, all other messages take no time and are delivered at once. So is the final model, when the run is
over.
"""

from __future__ import annotations

import copy
import dataclasses
import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_halos.core.algorithms import Algorithm, ServerAlgorithm
from lightning_halos.core.cursor import DataCursor, LeaseStock, Spans
from lightning_halos.core.global_node import GlobalNode
from lightning_halos.core.messages import (
    GlobalModel,
    LeaseGrant,
    LeaseRequest,
    Message,
    Pull,
    Push,
    RegionUpdate,
)
from lightning_halos.core.protocol import GLOBAL, Send
from lightning_halos.core.region_node import RegionNode
from lightning_halos.core.schedule import StepBudget
from lightning_halos.core.servers import GlobalServer, LocalServer, SynchronousServer
from lightning_halos.core.shadow import SHADOW, Shadow
from lightning_halos.core.snapshot import Shard
from lightning_halos.core.synchronous_node import SynchronousNode
from lightning_halos.core.topology import ServerGroup
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
    """

    budget: StepBudget
    end: float = math.inf
    steps_per_epoch: int = 1 << 62
    offset: int = 0
    ends_with_data: bool = False


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
        self.now = 0.0
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
        self.history.append(Event(self.now, kind, server, worker, version, self.steps, staleness, parameters))


class RegionNetwork(Network):
    """Local servers that answer each push at once; several of them have a global server (HALoS, Async-Local-SGD)."""

    def __init__(
        self,
        timing: Timing,
        work: Work,
        algorithm: Algorithm,
        groups: Sequence[ServerGroup],
        locals_: Sequence[LocalServer],
        global_: GlobalServer | None,
    ) -> None:
        assert isinstance(algorithm, ServerAlgorithm)
        super().__init__(timing.on(algorithm.wire), work, algorithm)
        self._home = timing.cluster.global_region
        self._places = [group.region for group in groups]
        self._wire = wire = algorithm.wire
        region_of = timing.cluster.region_of
        self._group_of = {rank: group.index for group in groups for rank in group.ranks}
        self._locals = [
            RegionNode(
                server,
                self._planner,
                group.ranks,
                dataclasses.replace(work.budget),
                LeaseStock(0),
                wire.of_server(group, region_of.__getitem__, self._home),
            )
            for group, server in zip(groups, locals_, strict=True)
        ]
        formats = {group.index: wire.on(group.region, self._home) for group in groups}
        budget = dataclasses.replace(work.budget)
        self._global = GlobalNode(global_, len(groups), budget, self._cursor, formats=formats)
        self._top = locals_[0] if global_ is None else global_
        self._under_way: list[tuple[float, int, int, RegionUpdate | GlobalModel]] = []
        self._free = [0.0] * len(groups)  # when each local server has applied the pushes so far
        self._sent = 0
        self._granted = 0

    @property
    def model(self) -> Tensor:
        return self._top.model

    @property
    def version(self) -> int:
        return self._top.version

    def due(self) -> list[Round]:
        while True:
            arrival = self._under_way[0][0] if self._under_way else math.inf
            following = min(self.rounds.values(), key=lambda r: (r.end, r.worker), default=None)
            if following is not None and following.end <= arrival:
                return [following]
            if not self._under_way:
                return []
            self._deliver()

    def finish(self, pushes: Sequence[Push]) -> None:
        for push in pushes:
            self._end(push)
            worker, index, has_vector = push.worker, self._group_of[push.worker], push.vector is not None
            node = self._locals[index]
            rejected = node.server.rejected
            self._free[index] = max(self.now, self._free[index]) + (self._timing.serve if push.steps else 0.0)
            if has_vector:
                self._count_bytes(index, self._timing.cluster.region_of[worker] == self._places[index])
            sends = node.handle(worker, push)
            for send in sends:
                send.complete()
            if has_vector:
                staleness = node.server.staleness if node.server.rejected == rejected else 0
                self._note("push", node.version, node.model, index, worker, staleness)
            self._route(index, sends)
            self._begin_all({send.to: send.message for send in sends if isinstance(send.message, Pull)})

    def publish(self, plateau_steps: Sequence[tuple[int, float]], metrics: dict[str, float]) -> None:
        self._route(GLOBAL, self._global.publish(plateau_steps, metrics))

    def statistics(self) -> list[dict[str, Any]]:
        return [counters.statistics() for counters in self._global.counters.values()]

    def adopt_final_model(self) -> None:
        for node in self._locals:
            node.adopt_final_model(self.model.clone())
        for shadows in self._shadows:
            for shadow in shadows.values():
                shadow.forget()  # the workers have the final model, too, and forget theirs

    def state_dict(self) -> dict[str, Any]:
        return {
            "locals": [node.state_dict() for node in self._locals],
            "global": self._global.state_dict(),
            "shadows": [_values(shadows) for shadows in self._shadows],
            "sent": self._sent,
            "under_way": [
                (arrival, number, index, type(message).__name__, copy.deepcopy(vars(message)))
                for arrival, number, index, message in self._under_way
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for node, saved in zip(self._locals, state["locals"], strict=True):
            node.load_state_dict(saved)
        self._global.load_state_dict(state["global"])
        for shadows, saved in zip(self._shadows, state["shadows"], strict=True):
            for peer, values in saved.items():
                if peer in shadows:
                    shadows[peer].values = values[SHADOW].clone()
        self._sent = state["sent"]
        kinds = {kind.__name__: kind for kind in (RegionUpdate, GlobalModel)}
        self._under_way = [(*key, kinds[kind](**copy.deepcopy(fields))) for *key, kind, fields in state["under_way"]]

    @property
    def _shadows(self) -> list[Mapping[int, Shadow]]:
        """What the peers of each node have of its model, and the local servers of the global model."""
        return [*(node.shadows for node in self._locals), self._global.shadows]

    def schedule(self) -> dict[str, Any]:
        known = [(node.budget.total, node.first_version) for node in self._locals]
        wire = [self._wire.within, self._wire.between]
        return {**super().schedule(), "known": known, "wire": wire, "free": list(self._free)}

    def load_schedule(self, schedule: Mapping[str, Any]) -> None:
        super().load_schedule(schedule)
        self._global.budget.total = self.total
        self._free = list(schedule["free"])
        for node, (total, first_version) in zip(self._locals, schedule["known"], strict=True):
            node.budget.total, node.first_version = total, first_version
        flushes = {i for *_, i, message in self._under_way if isinstance(message, RegionUpdate) and message.final}
        for worker in self._left:  # the new nodes do not know yet that it has finished
            index = self._group_of[worker]
            for send in self._locals[index].handle(worker, Push(worker, 0, 0, 0, 0.0, final=True)):
                if not isinstance(send.message, RegionUpdate):
                    self._route(index, [send])
                elif index not in flushes:  # it had arrived
                    self._route(GLOBAL, self._global.handle(index, send.message))

    def _begin_all(self, pulls: Mapping[int, Pull]) -> None:
        for worker, pull in pulls.items():
            begun = self._begin(worker, pull)
            if begun.steps:
                index = self._group_of[worker]
                answered = max(self.now, self._free[index])
                begun.end = answered + self._timing.round(worker, self._places[index], begun.steps)

    def _lease(self, worker: int, steps: int) -> int:
        index = self._group_of[worker]
        self._route(index, self._locals[index].handle(worker, LeaseRequest(steps)))
        return self._granted

    def _deliver(self) -> None:
        self.now, _, index, message = heapq.heappop(self._under_way)
        if isinstance(message, RegionUpdate):
            version = self.version
            sends = self._global.handle(index, message)
            staleness = self._top.staleness if self.version > version else 0  # some are rejected or empty
            self._note("update", self.version, self.model, index, staleness=staleness)
            self._route(GLOBAL, sends)
            return
        node = self._locals[index]
        merges = node.server.merges
        self._route(index, node.handle(GLOBAL, message))
        if node.server.merges > merges:
            self._note("merge", node.version, node.model, index)

    def _route(self, origin: int, sends: Sequence[Send]) -> None:
        """Delivers the messages of a node: models after their transfer time, other messages at once."""
        for send in sends:
            if origin == GLOBAL:  # those of a local server are complete
                send.complete()
            to, message = send.to, send.message
            assert not isinstance(message, Shard)
            if isinstance(message, RegionUpdate):
                self._count_bytes(origin, self._places[origin] == self._home)
                sent = max(self.now, self._free[origin])
                self._post(sent + self._timing.transfer(self._places[origin], self._home), origin, message)
            elif to == GLOBAL:
                self._route(GLOBAL, self._global.handle(origin, message))
            elif origin != GLOBAL and isinstance(message, LeaseGrant):
                self._granted = message.steps
            elif origin != GLOBAL:
                self.outbox.append((to, message))
            elif isinstance(message, GlobalModel) and not message.final:
                # A global server is rarely busy, so an update does not wait for others.
                self._post(
                    self.now + (self._timing.serve + self._timing.transfer(self._home, self._places[to])), to, message
                )
            else:
                if isinstance(message, GlobalModel) and not self.finished:
                    self.finished = True
                    self._under_way = []  # answers, which local servers would ignore after their flush
                    self._note("end", self.version, None)
                self._route(to, self._locals[to].handle(GLOBAL, message))

    def _post(self, arrival: float, index: int, message: RegionUpdate | GlobalModel) -> None:
        self._sent += 1
        heapq.heappush(self._under_way, (arrival, self._sent, index, message))

    def _count_bytes(self, index: int, within_region: bool) -> None:
        """Counts the bytes of a message with a model to or from a local server, and of its answer."""
        within, between = self._locals[index].traffic
        size = 2 * (self._timing.bytes_within if within_region else self._timing.bytes_between)
        self._locals[index].traffic = (within + size, between) if within_region else (within, between + size)


class SynchronousNetwork(Network):
    """Rounds that start and end together, with an all-reduce (DiLoCo; synchronous SGD, which has no server)."""

    def __init__(self, timing: Timing, work: Work, algorithm: Algorithm, server: SynchronousServer | None) -> None:
        super().__init__(timing, work, algorithm)
        self._node = SynchronousNode(server, self._planner, dataclasses.replace(work.budget))
        self._all_reduce = timing.all_reduce() if self._workers > 1 else 0.0
        if not algorithm.averages_gradients:
            self._all_reduce += timing.serve

    @property
    def model(self) -> Tensor | None:
        return self._node.model

    @property
    def version(self) -> int:
        return self._node.version

    def due(self) -> list[Round]:
        end = min((r.end for r in self.rounds.values()), default=0.0)
        return [self.rounds[worker] for worker in sorted(self.rounds) if self.rounds[worker].end == end]

    def finish(self, pushes: Sequence[Push]) -> None:
        for push in pushes:
            self._end(push)
        vectors = [push.vector for push in pushes if push.vector is not None]
        mean = None
        if vectors:
            mean = torch.zeros_like(vectors[0])
            for vector in vectors:
                mean += vector
            mean /= len(vectors)
        answers = self._node.finish_round(pushes, mean)
        if any(push.steps for push in pushes):
            self._note("round", self.version, self.model)
        for push in pushes:
            answer = answers.get(push.worker)
            if isinstance(answer, Pull) and push.vector is not None:
                assert self.model is not None
                answer.vector = push.vector.copy_(self.model)
        self.outbox += answers.items()
        self.finished = len(self._node.finished) == self._workers
        if self.finished:
            self._note("end", self.version, None)
        else:
            self._begin_all({worker: answer for worker, answer in answers.items() if isinstance(answer, Pull)})

    def publish(self, plateau_steps: Sequence[tuple[int, float]], metrics: dict[str, float]) -> None:
        self._node.publish(plateau_steps, metrics)

    def state_dict(self) -> dict[str, Any]:
        return self._node.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._node.load_state_dict(state)

    def load_schedule(self, schedule: Mapping[str, Any]) -> None:
        super().load_schedule(schedule)
        self._node.budget.total = self.total
        self._node.finished = set(self._left)

    def _begin_all(self, pulls: Mapping[int, Pull]) -> None:
        # If all rounds have the same number of steps, all schedules start at the same global step.
        is_even = len({pull.local_steps for pull in pulls.values()}) == 1
        position = self._node.budget.position if is_even else None
        begun = [self._begin(worker, pulls[worker], position) for worker in sorted(pulls)]
        computing = max((self._timing.compute(r.worker, r.steps) for r in begun), default=0.0)
        for r in begun:
            if r.steps:
                r.end = self.now + computing + self._all_reduce

    def _lease(self, worker: int, steps: int) -> int:
        lease = self._cursor.take(steps)
        return 0 if lease is None else lease.steps


def _values(shadows: Mapping[int, Shadow]) -> dict[int, dict[str, Tensor]]:
    known = {peer: shadow.values for peer, shadow in shadows.items() if shadow.values is not None}
    return {peer: {SHADOW: values.clone()} for peer, values in known.items()}
