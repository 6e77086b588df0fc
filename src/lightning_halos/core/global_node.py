"""The decisions about the complete run: data, budget, stop, snapshots, and the final model.

The node takes one message and returns the messages to send. It has no links, threads or clock, so that the hosts of
``transport`` and the virtual network of ``simulation`` can both drive it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_halos.core.counters import ServerCounters
from lightning_halos.core.cursor import DataCursor, Spans
from lightning_halos.core.messages import (
    GlobalModel,
    LeaseGrant,
    LeaseRequest,
    Marker,
    MarkerReply,
    Message,
    Progress,
    RegionModel,
    RegionUpdate,
    Shard,
    Status,
)
from lightning_halos.core.protocol import (
    GLOBAL_TRANSITIONS,
    STORAGE,
    GlobalEvent,
    GlobalState,
    ProtocolError,
    Send,
    StateMachine,
)
from lightning_halos.core.region_node import grant_of
from lightning_halos.core.schedule import StepBudget, global_step
from lightning_halos.core.servers import Finding, GlobalServer
from lightning_halos.core.snapshot import ServerSnapshot


@dataclass
class Snapshot:
    """A snapshot of all nodes in progress (Chandy and Lamport, "Distributed Snapshots", 1985).

    It consists of the state of the global node when it sent the markers, and of the channel state: updates and progress
    reports that local servers sent before their own snapshots and that arrived after the global node's.

    Attributes:
        marker: The marker of the snapshot.
        state: State of the global node.
        server: The copy of the global server's state in it; ``None`` without a global server.
        total: Local steps that all workers have finished.
        done: The data that they trained on.
        updates: Updates that arrived since then, by local server, as dictionaries of their fields.
        last_updates: Number of the last update before the snapshot, for each local server that has replied.
    """

    marker: Marker
    state: dict[str, Any]
    server: ServerSnapshot | None
    total: int
    done: Spans
    updates: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    last_updates: dict[int, int] = field(default_factory=dict)


class GlobalNode:
    """The global server, and the decisions about the complete run.

    Args:
        server: The global server; ``None`` if there is one local server, whose model is the global model.
        servers: Number of local servers.
        budget: The step budget, which the node updates.
        cursor: Leases the training data; ``None`` if the workers do not share data.
        done: The data that earlier runs trained on.

    Attributes:
        server: The global server.
        budget: The step budget.
        counters: Counters of each local server, by its index.
    """

    def __init__(
        self,
        server: GlobalServer | None,
        servers: int,
        budget: StepBudget,
        cursor: DataCursor | None = None,
        done: Spans | None = None,
    ) -> None:
        self.server = server
        self.budget = budget
        self.counters = {index: ServerCounters() for index in range(servers)}
        self._cursor = cursor
        self._done = done or Spans()
        self._machine = StateMachine("The global server", GlobalState.RUNNING, GLOBAL_TRANSITIONS)
        self._serving = set(range(servers))
        self._flushed: list[int] = []
        self._asked_to_stop = False
        self._applied_before = budget.total  # local steps behind the global model that the run began with
        self._total_at_end = 0
        self._under_way: dict[int, list[dict[str, Any]]] = {}
        self._fastest: dict[int, float] = {}
        self._counted = dict.fromkeys(range(servers), 0)
        self._reports = dict.fromkeys(range(servers), 0)
        self._grants: dict[int, LeaseGrant] = {}
        self._plateau_steps: list[tuple[int, float]] = []
        self._plateaus_sent = dict.fromkeys(range(servers), 0)
        self._metrics: dict[str, float] = {}
        self._snapshot: Snapshot | None = None
        self._final: GlobalModel | None = None

    @property
    def state(self) -> GlobalState:
        """The state of the node."""
        return self._machine.state

    @property
    def version(self) -> int:
        """Number of updates in the global model."""
        return 0 if self.server is None else self.server.version

    @property
    def model(self) -> Tensor:
        """The global model. Without a global server, it is only available at the end."""
        if self.server is not None:
            return self.server.model
        assert self._final is not None
        assert self._final.vector is not None
        return self._final.vector

    @property
    def applied(self) -> int:
        """Local steps in the global model. Without a global server, they are only known at the end."""
        if self.state is GlobalState.FINISHED:
            return self._total_at_end
        return self._applied_before + (0 if self.server is None else self.server.steps)

    def start(self) -> list[Send]:
        """Answers the updates that were in flight when the snapshot of a resumed run was taken."""
        sends = []
        for index, updates in self._under_way.items():
            assert self.server is not None
            # A local server that had sent its last update waits for no answer; it takes part in the new run.
            waits = not any(update["final"] for update in updates)
            for fields in updates:
                update = RegionUpdate(**{**fields, "vector": fields["vector"].clone()})
                answer = self.server.receive(update)
                if waits:
                    sends.append(Send(index, answer))
        self._under_way = {}
        return sends

    def inspect(self, message: Message, progress: Iterable[int]) -> Finding | None:
        """Inspects the vector of a message while it arrives. Reads nothing that :meth:`handle` changes.

        Args:
            message: The message.
            progress: Yields the number of elements that have arrived so far.
        """
        if isinstance(message, RegionUpdate) and message.vector is not None and self.server is not None:
            return self.server.inspect(message.vector, progress)
        for _ in progress:
            pass
        return None

    def handle(self, sender: int, message: Message, finding: Finding | None = None) -> list[Send]:
        """Handles a message.

        Args:
            sender: Index of a local server.
            message: The message. Its vector may be written to.
            finding: The result of :meth:`inspect`. Default: inspect the vector now.

        Returns:
            The messages to send, in this order.

        Raises:
            ProtocolError: If the node's state does not allow the message, or the sender may not send it.
        """
        if sender in self._counted:
            match message:
                case RegionUpdate(server=index, vector=Tensor()) if index == sender and self.server is not None:
                    return self._on_update(self.server, message, finding)
                case RegionModel(server=index, vector=Tensor()) if index == sender and self.server is None:
                    return self._on_model(message)
                case Progress(server=index) if index == sender:
                    return self._on_progress(message)
                case LeaseRequest():
                    return self._on_lease_request(sender, message)
                case MarkerReply(server=index) if index == sender:
                    return self._on_reply(message)
        raise ProtocolError(f"The global server got an unexpected message from {sender}: {message!r}.")

    def publish(self, plateau_steps: Sequence[tuple[int, float]], metrics: dict[str, float]) -> list[Send]:
        """Sends the steps of rank 0's plateau schedulers, and its metrics, to all local servers."""
        self._machine.move(GlobalEvent.PUBLISH)
        self._plateau_steps += plateau_steps
        self._metrics = metrics
        return self._tell_all()

    def start_snapshot(self, marker: Marker) -> list[Send]:
        """Starts a snapshot of all nodes. An unfinished snapshot is abandoned.

        Raises:
            ProtocolError: If the run has ended.
        """
        self._machine.move(GlobalEvent.SAVE)
        server = None if self.server is None else self.server.snapshot()
        state = self._state(None if server is None else server.state)
        self._snapshot = Snapshot(marker, state, server, self.budget.total, Spans(self._done))
        return [Send(index, marker) for index in self._counted]

    def progress(self) -> dict[str, Any]:
        """Returns the progress of the run: finished local steps, and the data that was trained on."""
        # When the run is finished, the last reports may still be in flight, but every step is applied.
        total = self._total_at_end if self.state is GlobalState.FINISHED else self.budget.total
        return {"total": total, "done": list(self._done)}

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of the state from which a later run can continue, without messages in flight."""
        return self._state(None if self.server is None else self.server.state_dict())

    def _state(self, server: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "server": server,
            "applied": self.applied,
            "updates": [],
            "received": {} if self.server is None else dict(self.server.received),
            "counters": {index: dataclasses.asdict(counters) for index, counters in self.counters.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state of :meth:`state_dict` or of a snapshot, before :meth:`start`."""
        if self.server is not None:
            self.server.load_state_dict(state["server"])
            self.server.steps = 0  # `applied` includes them
            self.server.received = dict(state["received"])
        self._applied_before = state["applied"]
        for update in state["updates"]:
            self._under_way.setdefault(update["server"], []).append(update)
        for index, counters in state["counters"].items():
            if index in self.counters:
                self.counters[index] = ServerCounters(**counters)

    def _on_update(self, server: GlobalServer, update: RegionUpdate, finding: Finding | None) -> list[Send]:
        index = update.server
        if 0 < update.number <= server.received.get(index, 0):
            if update.final:
                return [] if self._final is None else [Send(index, self._final)]
            return [Send(index, server.receive(update))]
        if index not in self._serving:
            raise ProtocolError(f"Local server {index} sent an update after its last one.")
        if self._snapshot is not None and update.number <= self._snapshot.last_updates.get(index, update.number):
            vector = update.vector
            assert vector is not None
            kept = {**vars(update), "vector": vector.clone()}
            self._snapshot.updates.setdefault(index, []).append(kept)
        self._asked_to_stop = self._asked_to_stop or update.stop
        if not update.final:
            self._machine.move(GlobalEvent.UPDATE)
            sends = [Send(index, server.receive(update, finding))]
        else:
            server.receive(update, finding)
            sends = []
            self._flush(index)
            if self.state is GlobalState.FINISHED:
                total = self._applied_before + server.steps
                sends = self._finish(GlobalModel(server.version, vector=server.model), total)
        return [*sends, *self._complete_snapshot()]

    def _on_model(self, message: RegionModel) -> list[Send]:
        if self._final is not None:
            return [Send(message.server, self._final)]
        self._asked_to_stop = self._asked_to_stop or message.stop
        self._flush(message.server)
        return self._finish(GlobalModel(0, vector=message.vector), self._applied_before + message.steps)

    def _flush(self, index: int) -> None:
        is_last = self._serving == {index}
        self._machine.move(GlobalEvent.ALL_UPDATES if is_last else GlobalEvent.LAST_UPDATE)
        self._serving.remove(index)
        self._flushed.append(index)

    def _finish(self, final: GlobalModel, total: int) -> list[Send]:
        """Ends the run. Nothing writes to the model any more, so all receivers in this process may share its memory."""
        final.final, final.stopped = True, self._asked_to_stop
        final.position = global_step(total, self.budget.workers, self.budget.max_steps)
        self._final, self._total_at_end = final, total
        return [Send(index, final) for index in self._counted]

    def _on_progress(self, message: Progress) -> list[Send]:
        index = message.server
        if message.number <= self._reports[index]:
            return [self._tell(index)]
        self._machine.move(GlobalEvent.PROGRESS)
        self._reports[index] = message.number
        self.budget.total += message.steps
        self._done.add(message.data)
        if self._snapshot is not None and index not in self._snapshot.last_updates:
            self._snapshot.total += message.steps
            self._snapshot.done.add(message.data)
        self._counted[index] += message.steps
        self._fastest[index] = message.fastest
        self.counters[index].add(message)
        if self.state is GlobalState.RUNNING and (message.stop or self.budget.exhausted):
            self._machine.move(GlobalEvent.STOP)
            return self._tell_all()
        # Local servers that have flushed wait for the final model; the status shows them that the run goes on.
        return [self._tell(server) for server in dict.fromkeys([index, *self._flushed])]

    def _tell_all(self) -> list[Send]:
        return [self._tell(index) for index in self._counted]

    def _tell(self, index: int) -> Send:
        first, self._plateaus_sent[index] = self._plateaus_sent[index], len(self._plateau_steps)
        status = Status(
            total=self.budget.total,
            fastest=max(self._fastest.values(), default=0.0),
            stop=self.state is not GlobalState.RUNNING,
            counted=self._counted[index],
            first_plateau_step=first,
            plateau_steps=self._plateau_steps[first:],
            metrics=self._metrics,
        )
        return Send(index, status)

    def _on_lease_request(self, index: int, request: LeaseRequest) -> list[Send]:
        last = self._grants.get(index)
        if last is not None and 0 < request.number <= last.number:
            return [Send(index, last)] if request.number == last.number else []
        self._machine.move(GlobalEvent.LEASE_REQUEST)
        if self._cursor is None:
            raise ProtocolError(f"Local server {index} ordered data, but the workers do not share any.")
        lease = self._cursor.take(request.steps, sharers=len(self._counted))
        grant = self._grants[index] = grant_of(lease, request.number)
        return [Send(index, grant)]

    def _on_reply(self, reply: MarkerReply) -> list[Send]:
        self._machine.move(GlobalEvent.MARKER_REPLY)
        if self._snapshot is None or reply.save != self._snapshot.marker.save:
            return []
        self._snapshot.last_updates[reply.server] = reply.updates
        return self._complete_snapshot()

    def _complete_snapshot(self) -> list[Send]:
        """Sends the snapshot to storage if all of its channel state has arrived."""
        snapshot = self._snapshot
        if snapshot is None or len(snapshot.last_updates) < len(self._counted):
            return []
        received = {} if self.server is None else self.server.received
        if any(
            received.get(index, 0) < last for index, last in snapshot.last_updates.items() if self.server is not None
        ):
            return []
        self._snapshot = None
        updates = [
            u for index, own in snapshot.updates.items() for u in own if u["number"] <= snapshot.last_updates[index]
        ]
        progress = {"total": snapshot.total, "done": list(snapshot.done)}
        state = {**snapshot.state, "updates": updates}
        return [Send(STORAGE, Shard(snapshot.marker, None, state, snapshot.server, progress))]
