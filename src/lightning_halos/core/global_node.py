"""The decisions about the complete run: data, budget, stop, snapshots, and the final model.

A message that arrives again is recognized by its number here, so that it is answered again but counts once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_halos.core.counters import ServerCounters
from lightning_halos.core.cursor import DataCursor, Spans
from lightning_halos.core.finding import Finding, plain_finding, update_of_snapshot
from lightning_halos.core.global_server import GlobalServer
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
    Status,
)
from lightning_halos.core.node import Node, grant_of, send_model
from lightning_halos.core.protocol import (
    GLOBAL_TRANSITIONS,
    STORAGE,
    GlobalEvent,
    GlobalState,
    ProtocolError,
    Send,
)
from lightning_halos.core.quantization import Format
from lightning_halos.core.schedule import StepBudget, global_step
from lightning_halos.core.shadow import Shadow
from lightning_halos.core.snapshot import RunSnapshot


@dataclass
class _Region:
    """The node's record of a local server."""

    update: int = 0  # number of its last update
    is_flushed: bool = False
    report: int = 0  # number of its last report
    reported: int = 0  # local steps in its reports
    fastest: float = 0.0  # its fastest worker's local steps per second
    grant: LeaseGrant | None = None  # the last one
    told: int = 0  # number of plateau steps that it was told


class GlobalNode(Node[GlobalState, GlobalEvent]):
    """The global server, and the decisions about the complete run.

    Args:
        server: The global server; ``None`` if there is one local server, whose model is the global model.
        servers: Number of local servers.
        budget: The step budget, which the node updates.
        cursor: Leases the training data; ``None`` if the workers do not share data.
        done: The data that earlier runs trained on.
        formats: The format of models to each local server, by its index. Default: they travel as they are.

    Attributes:
        server: The global server.
        counters: Counters of each local server, by its index.
        shadows: What each local server has of the global model, if it is sent differences. It is no part of the state.
    """

    server: GlobalServer | None

    def __init__(
        self,
        server: GlobalServer | None,
        servers: int,
        budget: StepBudget,
        cursor: DataCursor | None = None,
        done: Spans | None = None,
        formats: Mapping[int, Format] | None = None,
    ) -> None:
        super().__init__("The global server", GlobalState.RUNNING, GLOBAL_TRANSITIONS, budget)
        self.server = server
        self.counters = {index: ServerCounters() for index in range(servers)}
        self._cursor = cursor
        self._done = done or Spans()
        self._regions = {index: _Region() for index in range(servers)}
        self._total_before = budget.total
        self._applied_before = budget.total  # local steps behind the global model that the run began with
        self._total_at_end = 0
        self._under_way: list[dict[str, Any]] = []  # updates in flight when the snapshot of a resumed run was taken
        self._snapshots: dict[str, RunSnapshot] = {}  # in progress, by save
        self.shadows: dict[int, Shadow] = {}
        if server is not None:
            narrow = {index: form for index, form in (formats or {}).items() if form != "float32"}
            self.shadows = {index: Shadow(server.num_parameters, form) for index, form in narrow.items()}

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
        """Local steps in the global model, of all runs. Without a global server, it changes only at the end."""
        if self.state is GlobalState.FINISHED:
            return self._total_at_end
        return self._applied_before + (0 if self.server is None else self.server.steps)

    @property
    def steps(self) -> int:
        """Local steps of this run in the global model; without a global server, in the model of the local one."""
        applied = self.progress()["total"] if self.server is None else self.applied
        # After resuming, the first updates contain steps that were finished before.
        return max(0, applied - self._total_before)

    def start(self) -> list[Send]:
        """Answers the updates that were in flight when the snapshot of a resumed run was taken."""
        sends = []
        # A local server that had sent its last update waits for no answer; it takes part in the new run.
        flushed = {update["server"] for update in self._under_way if update["final"]}
        for fields in self._under_way:
            assert self.server is not None
            update, finding = update_of_snapshot(fields)
            answer = self.server.receive(update, finding)
            self._regions[update.server].update = update.number
            if update.server not in flushed:
                sends.append(self._send_model(update.server, answer))
        self._under_way = []
        return sends

    def handle(self, sender: int, message: Message, finding: Finding | None = None) -> list[Send]:
        if sender in self._regions:
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
        raise ProtocolError(f"{self._name} got an unexpected message from {sender}: {message!r}.")

    def publish(self, plateau_steps: Sequence[tuple[int, float]], metrics: dict[str, float]) -> list[Send]:
        """Sends the steps of rank 0's plateau schedulers, and its metrics, to all local servers."""
        self._move(GlobalEvent.PUBLISH)
        self._plateau_steps += plateau_steps
        self._metrics = metrics
        return self._tell_all()

    def start_snapshot(self, marker: Marker) -> list[Send]:
        """Starts a snapshot of all nodes. Others that are in progress go on.

        Raises:
            ProtocolError: If the run has ended.
        """
        self._move(GlobalEvent.SNAPSHOT)
        server = None if self.server is None else self.server.snapshot()
        state = self._state(None if server is None else server.state)
        self._snapshots[marker.save] = RunSnapshot(marker, state, server, self.budget.total, Spans(self._done))
        return self._to_all(marker)

    def progress(self) -> dict[str, Any]:
        """Returns the progress of the run: finished local steps, and the data that was trained on."""
        # When the run is finished, the last reports may still be in flight, but every step is applied.
        total = self._total_at_end if self.state is GlobalState.FINISHED else self.budget.total
        return {"total": total, "done": list(self._done)}

    def state_dict(self) -> dict[str, Any]:
        return self._state(None if self.server is None else self.server.state_dict())

    def _state(self, server: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "server": server,
            "applied": self.applied,
            "updates": [],
            "received": {index: region.update for index, region in self._regions.items()},
            "counters": {index: dataclasses.asdict(counters) for index, counters in self.counters.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.server is not None:
            self.server.load_state_dict(state["server"])
            self.server.steps = 0  # `applied` includes them
            for index, number in state["received"].items():
                self._regions[index].update = number
        self._applied_before = state["applied"]
        self._under_way = list(state["updates"])
        for index in self.counters.keys() & state["counters"].keys():
            self.counters[index] = ServerCounters(**state["counters"][index])

    def _on_update(self, server: GlobalServer, update: RegionUpdate, finding: Finding | None) -> list[Send]:
        index, region = update.server, self._regions[update.server]
        if 0 < update.number <= region.update:
            if not update.final:
                if index in self.shadows:
                    self.shadows[index].forget()  # nobody knows which one of the answers it will use
                return [Send(index, server.answer(update))]
            return [] if self._final is None else [Send(index, self._final)]
        if region.is_flushed:
            raise ProtocolError(f"Local server {index} sent an update after its last one.")
        if not update.final:
            self._move(GlobalEvent.UPDATE)
        for snapshot in self._snapshots.values():
            snapshot.add_update(update, plain_finding(finding))
        region.update = update.number
        answer = server.receive(update, finding)
        if not update.final:
            sends = [self._send_model(index, answer)]
        else:
            sends = self._flush(index, update.stop, GlobalModel(server.version, vector=server.model), self.applied)
        return [*sends, *self._complete_snapshots()]

    def _send_model(self, index: int, answer: GlobalModel) -> Send:
        shadow = self.shadows.get(index)
        return Send(index, answer) if shadow is None else send_model(index, answer, shadow)

    def _on_model(self, message: RegionModel) -> list[Send]:
        if self._final is not None:
            return [Send(message.server, self._final)]
        total = self._applied_before + message.steps
        return self._flush(message.server, message.stop, GlobalModel(0, vector=message.vector), total)

    def _flush(self, index: int, stop: bool, model: GlobalModel, total: int) -> list[Send]:
        """Handles a local server's last message. After that of the last one, the run ends with the model."""
        self._asked_to_stop = self._asked_to_stop or stop
        self._regions[index].is_flushed = True
        if not all(region.is_flushed for region in self._regions.values()):
            self._move(GlobalEvent.LAST_UPDATE)
            return []
        self._move(GlobalEvent.ALL_UPDATES)
        model.final, model.stopped = True, self._asked_to_stop
        model.position = global_step(total, self.budget.workers, self.budget.max_steps)
        self._final, self._total_at_end = model, total
        # Nothing writes to the model any more, so all receivers in this process may share its memory.
        return self._to_all(model)

    def _on_progress(self, report: Progress) -> list[Send]:
        index, region = report.server, self._regions[report.server]
        if report.number <= region.report:
            return [self._tell(index)]
        self._move(GlobalEvent.PROGRESS)
        region.report = report.number
        region.reported += report.steps
        region.fastest = report.fastest
        self.budget.total += report.steps
        self._done.add(report.data)
        for snapshot in self._snapshots.values():
            snapshot.add_report(report)
        self.counters[index].add(report)
        if self.state is GlobalState.RUNNING and (report.stop or self.budget.exhausted):
            self._move(GlobalEvent.STOP)
            return self._tell_all()
        # Local servers that have flushed wait for the final model; the status shows them that the run goes on.
        waiting = [other for other, region in self._regions.items() if region.is_flushed]
        return [self._tell(other) for other in dict.fromkeys([index, *waiting])]

    def _to_all(self, message: Message) -> list[Send]:
        return [Send(index, message) for index in self._regions]

    def _tell_all(self) -> list[Send]:
        return [self._tell(index) for index in self._regions]

    def _tell(self, index: int) -> Send:
        region = self._regions[index]
        first, region.told = region.told, len(self._plateau_steps)
        status = Status(
            total=self.budget.total,
            fastest=max(other.fastest for other in self._regions.values()),
            stop=self.state is not GlobalState.RUNNING,
            counted=region.reported,
            first_plateau_step=first,
            plateau_steps=self._plateau_steps[first:],
            metrics=self._metrics,
        )
        return Send(index, status)

    def _on_lease_request(self, index: int, request: LeaseRequest) -> list[Send]:
        region = self._regions[index]
        if region.grant is not None and 0 < request.number <= region.grant.number:
            return [Send(index, region.grant)] if request.number == region.grant.number else []
        self._move(GlobalEvent.LEASE_REQUEST)
        if self._cursor is None:
            raise ProtocolError(f"Local server {index} ordered data, but the workers do not share any.")
        region.grant = grant_of(self._cursor.take(request.steps, sharers=len(self._regions)), request.number)
        return [Send(index, region.grant)]

    def _on_reply(self, reply: MarkerReply) -> list[Send]:
        self._move(GlobalEvent.MARKER_REPLY)
        if reply.save in self._snapshots:
            self._snapshots[reply.save].add_reply(reply)
        return self._complete_snapshots()

    def _complete_snapshots(self) -> list[Send]:
        """Sends the snapshots to storage whose channel state has arrived."""
        arrived = {i: math.inf if self.server is None else region.update for i, region in self._regions.items()}
        complete = [save for save, snapshot in self._snapshots.items() if snapshot.is_complete(arrived)]
        return [Send(STORAGE, self._snapshots.pop(save).shard()) for save in complete]
