"""The decisions of a member's local server in a star of jobs: what it keeps, and repeats after a lost connection.

Everything else is as in ``region_node``. Its workers do not notice whether the connection to the global server is up.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_halos.core.cursor import Lease, LeaseStock, Spans
from lightning_halos.core.finding import Finding
from lightning_halos.core.joining import Joining
from lightning_halos.core.local_server import LocalServer
from lightning_halos.core.messages import (
    Decide,
    GlobalModel,
    Join,
    LeaseGrant,
    LeaseRequest,
    Message,
    Progress,
    Publish,
    Push,
    RegionUpdate,
    Status,
    Welcome,
)
from lightning_halos.core.protocol import (
    GLOBAL,
    OPEN_REGION_TRANSITIONS,
    ProtocolError,
    RegionEvent,
    RegionState,
    Send,
)
from lightning_halos.core.quantization import Format
from lightning_halos.core.region_node import RegionNode, _Worker
from lightning_halos.core.schedule import RoundPlanner, StepBudget
from lightning_halos.core.vector import Advance, ignore_progress

MOST_KEPT = 16
"""Largest number of updates that are kept. While so many are in no snapshot, only the last one of all is sent."""


class OpenRegionNode(RegionNode):
    """A local server that is a member of a star of jobs.

    It keeps its updates (a copy of each) and reports until a snapshot on the global server's disk has them. When its
    connection is lost, it sends nothing, and its workers go on. On the next connection it repeats what the global
    server does not have.

    Args:
        server: The local server, which must exchange. It starts from the model of ``joining.copy``.
        planner: See :class:`RegionNode`, like the next three.
        workers: Ranks of the workers within the job.
        budget: The step budget. Its ``workers`` are those that a global step is divided by.
        stock: Training data for the workers.
        joining: How the member joined; it is ready.
        formats: See :class:`RegionNode`.

    Attributes:
        session: The session.
        is_connected: Whether the global server hears this node.
        decides: Whether this member's rank 0 decides.
    """

    def __init__(
        self,
        server: LocalServer,
        planner: RoundPlanner,
        workers: Sequence[int],
        budget: StepBudget,
        stock: LeaseStock | None,
        joining: Joining,
        formats: Mapping[int, Format] | None = None,
    ) -> None:
        super().__init__(server, planner, workers, budget, stock, formats)
        welcome, copy, status = joining.welcome, joining.copy, joining.status
        assert welcome is not None
        assert copy is not None
        assert status is not None
        self._transitions = OPEN_REGION_TRANSITIONS
        self.session = joining.session
        self.is_connected = True
        self.decides = False
        self._description = joining.description
        self._run = welcome.run
        self._leaving = False
        self._status = -1  # number of the last status
        self._kept: deque[RegionUpdate] = deque()
        self._kept_reports: deque[Progress] = deque()
        self._publications: deque[Publish] = deque()
        self._published = 0  # number of the last publication
        self._saved = (0, 0, 0)  # numbers of the last update, report and publication that are no longer kept
        self._order: LeaseRequest | None = None  # the last one
        self._out: dict[int, Spans] = {rank: Spans() for rank in workers}  # data that workers have not reported
        server.index, server.global_version = welcome.member, copy.version
        self._on_status(status)
        for worker in self._workers.values():  # they start with the steps of the welcome
            worker.news = len(self._plateau_steps), len(self._plateau_steps)
        if joining.final is not None:
            self._on_final_model(joining.final)

    def start(self) -> list[Send]:
        return self._outgoing(super().start())

    def disconnected(self) -> list[Send]:
        """Records that the connection to the global server is lost."""
        self.is_connected = False
        return []

    def join(self) -> Join:
        """Returns the first message of the next connection."""
        self.is_connected = False
        held = Spans()
        for report in self._kept_reports:
            held.add(report.data)
        if self.state in (RegionState.SERVING, RegionState.EXCHANGING):
            held.add(lease.span(self._description.steps_per_epoch) for lease in self._stock or ())
            for spans in self._out.values():
                held.add(spans)
        is_flushed = self.state is RegionState.FLUSHED and not self._kept
        return Join(
            self.session, len(self._workers), self._description, list(held), *self._saved, is_flushed, self._run
        )

    def publish(
        self, plateau_steps: Sequence[tuple[int, float]], metrics: dict[str, float], callbacks: str
    ) -> list[Send]:
        """Tells all members the steps of this member's plateau schedulers, its metrics, and its callbacks' state."""
        self._published += 1
        self._publications.append(Publish(self._published, list(plateau_steps), dict(metrics), callbacks))
        return self._outgoing([Send(GLOBAL, self._publications[-1])])

    def handle(self, sender: int, message: Message, finding: Finding | None = None) -> list[Send]:
        if sender == GLOBAL and isinstance(message, Welcome):
            if message.needs_model:
                raise ProtocolError(f"{self._name} takes part in a run, and was asked for an initial model.")
            return self._outgoing(self._on_welcome(message))
        if sender == GLOBAL and not self.is_connected and not (isinstance(message, GlobalModel) and message.final):
            return []  # only the final model may overtake the welcome, on the models link
        if sender == GLOBAL and isinstance(message, Decide):
            self.decides = True
            return []
        return self._outgoing(super().handle(sender, message, finding))

    def _outgoing(self, sends: list[Send]) -> list[Send]:
        """Leaves out what cannot be sent or is not needed any more."""
        if self.is_connected and self._final is None:
            return sends
        return [send for send in sends if send.to != GLOBAL]

    def _lease(self) -> list[Send]:
        if self.state in (RegionState.FLUSHED, RegionState.FINISHED):
            return []  # it would hold data that others can train on
        sends = super()._lease()
        for send in sends:
            match send.message:
                case LeaseRequest():
                    self._order = send.message
                case LeaseGrant(epoch=epoch, first=first, steps=steps) if steps:
                    span = Lease(epoch, first, steps).span(self._description.steps_per_epoch)
                    self._out[send.to].add([span])
        return sends

    def _on_welcome(self, welcome: Welcome) -> list[Send]:
        self.is_connected = True
        self.server.index = welcome.member
        self._status = -1
        unknown = [report for report in self._kept_reports if report.number > welcome.reports]
        self._reported = welcome.status.counted + sum(report.steps for report in unknown)
        if self._stock is not None:
            self._stock.drop(welcome.lost, self._description.steps_per_epoch)
        sends = self._on_status(welcome.status)
        sends += [Send(GLOBAL, replace(report, server=self.server.index)) for report in unknown]
        for update in self._kept:
            if update.number > welcome.received:
                assert update.vector is not None
                again = replace(update, server=self.server.index, vector=update.vector.clone())
                sends.append(Send(GLOBAL, again))
        if self.state is RegionState.EXCHANGING and self.server.number <= welcome.received:
            # The answer was lost.
            sends.append(Send(GLOBAL, RegionUpdate(self.server.index, 0, 0, number=self.server.number)))
        if not self.decides:
            self._publications.clear()
            self._published = welcome.publications
        sends += [Send(GLOBAL, item) for item in self._publications if item.number > welcome.publications]
        is_open = self.state in (RegionState.SERVING, RegionState.EXCHANGING)
        if is_open and self._order is not None and self._order.number > self._filled_orders:
            sends.append(Send(GLOBAL, self._order))
        return sends

    def _on_status(self, message: Status) -> list[Send]:
        if message.number <= self._status:
            return []
        self._status = message.number
        self._stop = self._asked_to_stop or self._leaving or self._final is not None
        self.decides = message.decides
        self._forget(message.saved, message.saved_publication)
        return super()._on_status(message)

    def _total(self, told: int) -> int:
        return told  # it may have become smaller

    def _forget(self, saved: int, publication: int) -> None:
        """Forgets what a snapshot on the global server's disk has."""
        _, report, _ = self._saved
        while self._kept and self._kept[0].number <= saved:
            self._kept.popleft()
        while self._kept_reports and self._kept_reports[0].update <= saved:
            report = self._kept_reports.popleft().number
        while self._publications and self._publications[0].number <= publication:
            self._publications.popleft()
        self._saved = max(saved, self._saved[0]), report, max(publication, self._saved[2])

    def _on_final_model(self, message: GlobalModel) -> list[Send]:
        sends = super()._on_final_model(message)
        if self.state is not RegionState.FINISHED:  # the workers still have to finish
            self._stop = True
            if self._stock is not None:
                self._stock.add(None)
                sends += self._lease()
        return sends

    def _on_push(self, push: Push, finding: Finding | None) -> list[Send]:
        has_ended = self._final is not None
        if push.stop and not self.decides:  # only the member that decides may stop the complete run
            push.stop, push.leave = False, True
        sends = super()._on_push(push, finding)
        if has_ended and push.final and self._final is not None:
            sends = [send for send in sends if send.message is not self._final]
            sends.append(Send(push.worker, self._final))
        return sends

    def _count(self, push: Push, worker: _Worker) -> None:
        self._leaving = self._leaving or push.leave
        super()._count(push, worker)
        self._stop = self._stop or self._leaving
        self._out[push.worker].remove(push.data)
        if push.final:
            self._out[push.worker] = Spans()

    def _report(self, push: Push, staleness: int | None) -> Progress:
        report = super()._report(push, staleness)
        report.update = self.server.number + 1
        self._kept_reports.append(report)
        return report

    @property
    def _may_exchange(self) -> bool:
        return self.is_connected and self._final is None and len(self._kept) < MOST_KEPT

    def _exchange(self) -> Send:
        send = super()._exchange()
        update = send.message
        assert isinstance(update, RegionUpdate)
        update.reports = self._reports

        def fill(advance: Advance = ignore_progress) -> None:
            self.server.fill(update, advance)
            self._keep(update)

        return replace(send, fill=fill)

    def _flush(self) -> Send:
        send = super()._flush()
        update = send.message
        if not isinstance(update, RegionUpdate):
            raise ProtocolError(f"{self._name} exchanges nothing, so it cannot be a member of a star of jobs.")
        update.reports, update.leave = self._reports, self._leaving
        self._keep(update)
        if self._final is not None:
            self._move(RegionEvent.FINAL_MODEL)
        return send

    def _keep(self, update: RegionUpdate) -> None:
        assert update.vector is not None
        self._kept.append(dataclasses.replace(update, vector=update.vector.clone()))
