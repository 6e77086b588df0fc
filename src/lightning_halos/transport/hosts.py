"""Hosts: they put the servers of ``core`` behind links.

Rules of this room: a host owns a server and a lock; links call it from their threads. Under the lock it computes,
decides and posts, so that messages leave in the order in which they were decided. No host ever waits for a peer: to
post is to put into a queue.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_halos.checkpoint.manifest import GLOBAL, server_shard
from lightning_halos.checkpoint.saves import Saves
from lightning_halos.core.cursor import DataCursor, Lease, LeaseStock, Spans
from lightning_halos.core.messages import (
    Failure,
    GlobalModel,
    LeaseGrant,
    LeaseRequest,
    Marker,
    Message,
    Preempted,
    Progress,
    Pull,
    Push,
    RegionUpdate,
    ShardWritten,
    Status,
)
from lightning_halos.core.schedule import RoundPlanner, StepBudget, global_step
from lightning_halos.core.servers import Finding, GlobalServer, LocalServer
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.link import Filled, Filling, Link, Slot, whole


@dataclass
class Cut:
    """A consistent state of all servers, while it is taken (Chandy and Lamport, "Distributed Snapshots", 1985).

    What a local server sent before the marker passed it, and the global server got after it was marked itself, belongs
    to the state: on the link for models that is an update at most, on the link for control it is progress.

    Attributes:
        marker: Which save.
        server: State of the global server.
        applied: Local steps behind the updates in it.
        total: Local steps that all workers had finished.
        done: The data that they trained on.
        updates: Updates that were on their way.
        models: Local servers whose marker has not come back yet on the link for models.
        controls: Those of which it has not on the link for control.
    """

    marker: Marker
    server: dict[str, Any]
    applied: int
    total: int
    done: Spans
    models: set[int]
    controls: set[int]
    updates: list[dict[str, Any]] = field(default_factory=list)

    @property
    def state(self) -> dict[str, Any]:
        """What the global server goes on from."""
        return {"server": self.server, "applied": self.applied, "updates": self.updates}


class GlobalHost:
    """Hosts the global server, the step budget, and what rank 0 decides for everybody.

    Args:
        server: The global server.
        budget: The step budget.
        cursor: Hands out the training data; ``None`` if the workers do not share any.
        alarm: Where failures go.
        saves: The saves under way.
        done: The data that was trained on before.
        state: What to go on from; see :class:`Cut`. Without a server in it that begins anew.
    """

    def __init__(
        self,
        server: GlobalServer,
        budget: StepBudget,
        cursor: DataCursor | None,
        alarm: Alarm,
        saves: Saves,
        done: Spans,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.server = server
        self.budget = budget
        self._cursor = cursor
        self._alarm = alarm
        self._lock = threading.RLock()  # a signal's handler may save a checkpoint while the main thread reads
        self._models: dict[int, Link] = {}
        self._controls: dict[int, Link] = {}
        self._fastest: dict[int, float] = {}
        self._statistics: dict[int, dict[str, Any]] = {}
        self._initial_total = budget.total
        self._saves = saves
        self._done = done
        self._cuts: dict[str, Cut] = {}
        self._on_their_way: dict[int, list[dict[str, Any]]] = {}
        if state is not None:
            if state["server"] is not None:
                server.load_state_dict(state["server"])
                server.steps, server.flushed = 0, set()  # the steps so far are in the total, and all take part anew
            self._initial_total = state["applied"]
            for update in state["updates"]:
                self._on_their_way.setdefault(update["server"], []).append(update)
        self._counted: dict[int, int] = {}
        self._stop = self._asked_to_stop = False
        self._plateaus: list[tuple[int, float]] = []
        self._metrics: dict[str, float] = {}

    def attach(self, index: int, models: Link, control: Link) -> None:
        """Serves a local server.

        Args:
            index: Index of the local server.
            models: Link for updates and models.
            control: Link for progress and status, which must not queue behind a model.
        """
        self._models[index], self._controls[index] = models, control
        self._go_on(index, self._on_their_way.pop(index, []))
        models.start(lambda message, filled: self._on_update(index, message, filled), self._alarm.fail)
        control.start(lambda message, _: self._on_control(index, message), self._alarm.fail)

    def save(self, marker: Marker) -> None:
        """Keeps the state of all servers and workers as it is now, or as it was sent by now. Does not wait for it."""
        with self._lock:
            if self.server.finished:
                self._saves.fail(marker.save, "the run has ended meanwhile")
                return
            self._cuts[marker.save] = Cut(
                marker,
                self.server.state_dict(),
                self._initial_total + self.server.steps,
                self.budget.total,
                Spans(self._done),
                set(self._models),
                set(self._controls),
            )
            for link in self._models.values():
                link.post(marker)

    def state(self) -> dict[str, Any]:
        """What a later run goes on from, when this one is over."""
        applied = self._initial_total + self.server.steps
        return {"server": self.server.state_dict(), "applied": applied, "updates": []}

    def progress(self) -> dict[str, Any]:
        """How far the run is: local steps, and the data that was trained on."""
        with self._lock:
            return {"total": self.budget.total, "done": list(self._done)}

    def publish(self, plateaus: list[tuple[int, float]], metrics: dict[str, float]) -> None:
        """Tells everybody what the plateau schedulers of rank 0 were stepped with, and its metrics."""
        with self._lock:
            self._plateaus += plateaus
            self._metrics = metrics
            self._tell_all()

    def read(self, out: Tensor) -> None:
        """Copies the global model into the vector ``out``."""
        with self._lock:
            out.copy_(self.server.model)

    def statistics(self) -> list[dict[str, Any]]:
        """The counters that each local server reported last."""
        with self._lock:
            return list(self._statistics.values())

    def _on_update(self, index: int, message: Message, filled: Filled) -> None:
        if isinstance(message, Failure | Preempted):
            self._alarm.told(message)
            return
        if isinstance(message, Marker):
            self._on_marker(message, lambda cut: cut.models.discard(index))
            return
        assert isinstance(message, RegionUpdate)
        whole(filled)
        with self._lock:
            for cut in self._cuts.values():
                if index in cut.models:
                    cut.updates.append({**vars(message), "vector": _copy(message.vector)})
            self._asked_to_stop = self._asked_to_stop or message.stop
            answer = self.server.receive(message)
            finished = self.server.finished
            total = self._initial_total + self.server.steps
            if not message.final:
                self._models[index].post(answer)
            elif finished:
                position = global_step(total, self.budget.workers, self.budget.max_steps)
                # From here on nobody writes to the model: every region may read the same memory.
                final = GlobalModel(answer.version, True, self._asked_to_stop, position, self.server.model)
                for link in self._models.values():
                    link.post(final)

    def _go_on(self, index: int, updates: list[dict[str, Any]]) -> None:
        """Applies what was on its way when the checkpoint was saved. After a final one nobody waits for an answer."""
        waits = not any(update["final"] for update in updates)
        for update in updates:
            answer = self.server.receive(RegionUpdate(**{**update, "final": False, "vector": _copy(update["vector"])}))
            if waits:
                self._models[index].post(answer)

    def _on_marker(self, marker: Marker, note: Callable[[Cut], None]) -> None:
        """A marker came back. The state is known when all have."""
        with self._lock:
            cut = self._cuts[marker.save]
            note(cut)
            if cut.models or cut.controls:
                return
            del self._cuts[marker.save]
        self._saves.know(marker.save, total=cut.total, done=list(cut.done))
        self._saves.writer.shard(marker, GLOBAL, cut.state, self._saves.written)

    def _on_control(self, index: int, message: Message) -> None:
        if isinstance(message, Failure | Preempted):
            self._alarm.told(message)
        elif isinstance(message, Marker):
            self._on_marker(message, lambda cut: cut.controls.discard(index))
        elif isinstance(message, ShardWritten):
            self._saves.written(message)
        elif isinstance(message, LeaseRequest):
            with self._lock:
                assert self._cursor is not None
                lease = self._cursor.take(message.steps, sharers=self.server.senders)
                self._controls[index].post(_grant(lease))
        else:
            assert isinstance(message, Progress)
            self._on_progress(index, message)

    def _on_progress(self, index: int, message: Progress) -> None:
        with self._lock:
            self.budget.total += message.steps
            self._done.add(message.data)
            for cut in self._cuts.values():
                if index in cut.controls:
                    cut.total += message.steps
                    cut.done.add(message.data)
            self._counted[index] = self._counted.get(index, 0) + message.steps
            self._fastest[index] = message.fastest
            self._statistics[index] = message.statistics
            stop = message.stop or self.budget.exhausted
            just_stopped, self._stop = stop and not self._stop, stop or self._stop
            if just_stopped:
                self._tell_all()
            else:
                # Who has finished waits for the others, and wants to know that they go on.
                for server in {index, *self.server.flushed}:
                    self._tell(server)

    def _tell(self, index: int) -> None:
        self._controls[index].post(
            Status(
                total=self.budget.total,
                fastest=max(self._fastest.values(), default=0.0),
                stop=self._stop,
                plateaus=list(self._plateaus),
                metrics=dict(self._metrics),
                counted=self._counted.get(index, 0),
            )
        )

    def _tell_all(self) -> None:
        for index in self._controls:
            self._tell(index)


class RegionHost:
    """Hosts a local server: answers its workers, exchanges with the global server, reports progress.

    Args:
        server: The local server.
        planner: Decides the workers' local steps.
        workers: Number of workers of the local server.
        budget: What is known here of the step budget: this server's own steps at once, those of the others as the
            global server tells them.
        slot: Memory for one push at a time.
        alarm: Where failures go.
        within_region: Whether the global server is in the same region, for counting bytes.
        stock: The workers' training data; ``None`` if they do not share any.
        saves: What this process writes.
        state: What to go on from; see :meth:`state`.
    """

    def __init__(
        self,
        server: LocalServer,
        planner: RoundPlanner,
        workers: int,
        budget: StepBudget,
        slot: Slot,
        alarm: Alarm,
        within_region: bool,
        stock: LeaseStock | None,
        saves: Saves,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.server = server
        self._saves = saves
        self._planner = planner
        self._num_workers = workers
        self._budget = budget
        self._slot = slot
        self._alarm = alarm
        self._within_region = within_region
        self._stock = stock
        self._lock = threading.RLock()  # a signal's handler may save a checkpoint while the main thread reads
        self._counted = 0
        self._workers: dict[int, Link] = {}
        self._models: Link
        self._control: Link
        self._sent: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        self._stop = self._asked_to_stop = False
        self._finished: set[int] = set()
        self._plateaus: list[tuple[int, float]] = []
        self._plateaus_told: dict[int, int] = {}
        self._metrics: dict[str, float] = {}
        self._staleness_sum = self._staleness_max = 0
        self._computed: dict[int, float] = {}
        self._waited: dict[int, float] = {}
        if state is not None:
            server.load_state_dict(state["server"])
            if server.exchanging:
                self._sent.put(torch.empty_like(server.model))  # memory for the answer that is still to come
            planner.load_state_dict(state["speeds"])
            self._staleness_sum, self._staleness_max = state["staleness"]
            self._computed, self._waited = dict(state["computed"]), dict(state["waited"])

    def state(self) -> dict[str, Any]:
        """A copy of what a later run goes on from: the server, and what is known of its workers."""
        return {
            "server": self.server.state_dict(),
            "speeds": self._planner.state_dict(),
            "staleness": [self._staleness_sum, self._staleness_max],
            "computed": dict(self._computed),
            "waited": dict(self._waited),
        }

    def connect(self, models: Link, control: Link) -> None:
        """Uses these links to the global server; see :meth:`GlobalHost.attach`. To be called before :meth:`attach`."""
        self._models, self._control = models, control
        models.start(self._on_model, self._alarm.fail)
        control.start(lambda message, _: self._on_control(message), self._alarm.fail)
        with self._lock:
            self._lease()

    def memory(self, elements: int, dtype: torch.dtype) -> Tensor:
        """Returns the memory for an answer of the global server: that of the update that it answers."""
        return self._sent.get()

    def read(self, out: Tensor) -> None:
        """Copies the local server's model into the vector ``out``."""
        with self._lock:
            out.copy_(self.server.model)

    def attach(self, rank: int, link: Link) -> None:
        """Serves a worker."""
        self._workers[rank] = link
        link.start(lambda message, filled: self._on_message(rank, message, filled), self._alarm.fail)

    def _on_message(self, rank: int, message: Message, filled: Filled) -> None:
        if isinstance(message, Failure | Preempted):
            self._alarm.told(message)
        elif isinstance(message, LeaseRequest):
            with self._lock:
                assert self._stock is not None
                self._stock.ask(rank, self._planner.known_steps(rank))
                self._lease()
        elif isinstance(message, ShardWritten):
            self._control.post(message)
        else:
            assert isinstance(message, Push)
            self._on_push(rank, message, filled)

    def _lease(self) -> None:
        """Gives workers the data that they asked for, and orders more ahead of need."""
        if self._stock is None:
            return
        for rank, lease in self._stock.serve():
            self._workers[rank].post(_grant(lease))
        if steps := self._stock.order():
            self._control.post(LeaseRequest(steps))

    def _on_push(self, rank: int, push: Push, filled: Filled) -> None:
        finding = None if push.vector is None else self.server.inspect(push.vector, filled)
        with self._lock:
            self._asked_to_stop = self._asked_to_stop or push.stop
            self._counted += push.steps
            self._budget.total += push.steps
            self._stop = self._stop or push.stop or self._budget.exhausted
            self._planner.measure(rank, push.batches, push.seconds)
            self._computed[rank] = self._computed.get(rank, 0.0) + push.seconds
            self._waited[rank] = self._waited.get(rank, 0.0) + push.waited
            update = self._answer(rank, push, finding)
            self._control.post(
                Progress(
                    self.server.index, push.steps, self._planner.fastest_here, push.stop, self._counters(), push.data
                )
            )
            if update is not None:
                self._send(update)
            if push.final:
                self._finished.add(rank)
                if len(self._finished) == self._num_workers:
                    self._send(self.server.flush(self._asked_to_stop))

    def _answer(self, rank: int, push: Push, finding: Finding | None) -> RegionUpdate | None:
        """Applies a push. Its answer leaves while it is made."""
        vector = push.vector
        if vector is None or finding is None:
            if not push.final:
                self._workers[rank].post(self._pull(rank))
            return None
        answer, is_good = self.server.accept(push, finding)
        if is_good:
            self._staleness_sum += self.server.staleness
            self._staleness_max = max(self._staleness_max, self.server.staleness)
        with Filling(answer) as filling:
            if not push.final:
                pull = self._pull(rank)
                pull.vector = answer
                self._workers[rank].post(pull, filling, sent=lambda: self._slot.give_back(vector))
            update = self.server.apply(push, is_good, answer, filling.reach)
        if push.final:
            self._slot.give_back(vector)
        return update

    def _send(self, update: RegionUpdate) -> None:
        vector = update.vector
        assert vector is not None
        self._models.post(update, sent=lambda: self._sent.put(vector))

    def _pull(self, rank: int) -> Pull:
        budget = self._budget
        told = self._plateaus_told.get(rank, 0)
        self._plateaus_told[rank] = len(self._plateaus)
        return Pull(
            version=self.server.version,
            local_steps=self._planner.local_steps(rank, budget.total),
            position=budget.position,
            stop=self._stop,
            plateaus=self._plateaus[told:],
            metrics=self._metrics,
        )

    def _on_model(self, message: Message, filled: Filled) -> None:
        if isinstance(message, Failure | Preempted):
            self._alarm.told(message)
            return
        if isinstance(message, Marker):
            self._on_marker(message)
            return
        assert isinstance(message, GlobalModel)
        whole(filled)
        if message.final:
            for link in self._workers.values():
                link.post(message)
            return
        with self._lock:
            # What was sent last is not merged once the region is flushed: the final model follows.
            if len(self._finished) < self._num_workers:
                self.server.merge(message)

    def _on_marker(self, marker: Marker) -> None:
        with self._lock:
            state = self.state()
            for link in (self._models, self._control, *self._workers.values()):
                link.post(marker)
        self._saves.writer.shard(marker, server_shard(self.server.index), state, self._control.post)

    def _on_control(self, message: Message) -> None:
        if isinstance(message, Failure | Preempted):
            self._alarm.told(message)
        elif isinstance(message, LeaseGrant):
            with self._lock:
                assert self._stock is not None
                self._stock.add(Lease(message.epoch, message.first, message.steps) if message.steps else None)
                self._lease()
        else:
            assert isinstance(message, Status)
            self._on_status(message)

    def _on_status(self, message: Status) -> None:
        with self._lock:
            self._budget.total = message.total + self._counted - message.counted
            self._planner.hear_of(message.fastest)
            self._stop = self._stop or message.stop
            self._plateaus = message.plateaus
            self._metrics = message.metrics
            for rank in self._finished:
                self._workers[rank].post(message)

    def _counters(self) -> dict[str, Any]:
        within = sum(link.bytes_sent + link.bytes_received for link in self._workers.values())
        to_global = sum(link.bytes_sent + link.bytes_received for link in (self._models, self._control))
        shares = {
            str(rank): self._computed[rank] / ((self._computed[rank] + self._waited[rank]) or 1.0)
            for rank in self._computed
        }
        return {
            "updates": self.server.version,
            "rejected": self.server.rejected,
            "rejected_of": {str(rank): count for rank, count in self.server.rejections.items()},
            "merges": self.server.merges,
            "staleness_sum": self._staleness_sum,
            "staleness_max": self._staleness_max,
            "bytes_within_regions": within + (to_global if self._within_region else 0),
            "bytes_between_regions": 0 if self._within_region else to_global,
            "round_seconds": sum(self._computed.values()),
            "compute_share": shares,
        }


def _copy(vector: Tensor | None) -> Tensor:
    assert vector is not None
    return vector.clone()


def _grant(lease: Lease | None) -> LeaseGrant:
    return LeaseGrant(0, 0, 0) if lease is None else LeaseGrant(lease.epoch, lease.first, lease.steps)
