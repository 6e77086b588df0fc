"""The decisions about a run whose members come and go: who takes part, and what counts of what they did.

The run goes on whatever happens to a member. A message is checked before anything changes, so that a wrong one costs
its sender the membership and not the run. The caller measures time: it says when a member is lost.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_halos.core import description as descriptions
from lightning_halos.core.cursor import Spans
from lightning_halos.core.membership import Member, MemberEvent, MemberState, Report, brief, is_possible
from lightning_halos.core.messages import (
    Decide,
    Enrol,
    Enrolled,
    GlobalModel,
    Join,
    LeaseRequest,
    Marker,
    Message,
    ModelCopy,
    ModelRequest,
    Progress,
    Publish,
    Refusal,
    RegionUpdate,
    RunDescription,
    Status,
    Welcome,
)
from lightning_halos.core.node import Node, grant_of
from lightning_halos.core.open_region_node import MOST_KEPT
from lightning_halos.core.protocol import (
    OPEN_GLOBAL_TRANSITIONS,
    STORAGE,
    GlobalState,
    OpenEvent,
    ProtocolError,
    Send,
)
from lightning_halos.core.schedule import StepBudget
from lightning_halos.core.servers import Finding, GlobalServer
from lightning_halos.core.snapshot import Shard

log = logging.getLogger(__name__)

_LARGEST_ORDER = 65  # rounds of all workers of a member that it may order data for at once; see `LeaseStock`
_MOST_UNKNOWN = 4  # largest orders of all members that may have been granted after the snapshot of a restart
_SHOWN = 500  # characters of the reason of a refusal
_MOST_REFUSED = 1000  # sessions that are remembered as refused
_MOST_AHEAD = 2 * MOST_KEPT  # updates between the last one of a member and the one that a report announces
_MOST_UNCOVERED = 2**18  # reports of a member whose updates have not arrived
_MOST_OPEN = 64  # largest orders that a member may hold and not report; a region may order about 33 ahead
_MOST_RANGES = 2**14  # of data in a report
_MOST_HELD = 2**16  # ranges of data that a member that joins may hold
_MOST_PUBLISHED = 1000  # steps of plateau schedulers in a publication
_MOST_PLATEAU_STEPS = 2**19  # in a run: a welcome has all of them, and must not be larger than a message may be
_MOST_METRICS, _MOST_CHARACTERS = 2000, 2**16  # metrics in a publication, and characters of their names together


class OpenGlobalNode(Node[GlobalState, OpenEvent]):
    """The global server of a star of jobs, and the decisions about the run.

    - A member with a new session begins anew, and its old session is lost. One with the same session goes on.
    - When a member is lost, its reports are taken back whose pushes are in no update that has arrived, and its data is
      leased to others.
    - An update is applied when the reports of all its pushes have arrived, so that the local steps in the global model
      are always the reported ones.
    - The weight of buffers and the default rates follow the number of members that are present (active or
      disconnected), at once: :meth:`GlobalServer.follow`.
    - The member that decides keeps its part until it leaves or is lost, or the preferred one becomes active. The next
      one is the active member with the lowest index.
    - "No data is left" is said to a member only if nobody else who is not waiting, too, has data that is not reported.
      Data is leased only to members that a snapshot on disk has, and, after a restart, only when all members have
      returned or are lost. Otherwise data could be leased twice.
    - Only a member that decides, or has decided, may ask for the run to stop; the others' wish is ignored.
    - The run is finished when the budget is used up, the data is over or somebody has asked for it, and all members
      that are present have sent their last updates.

    Args:
        model: The initial model. The server owns it from here on.
        description: What the run is.
        workers: Number of workers that a global step is divided by.
        members: The members; those that are joining are welcomed by :meth:`start`.
        preferred: Name of the member that decides if it is active.
        refused: Sessions that may not join, as pairs of a member's index and its session, with the reasons.

    Attributes:
        server: The global server.
        description: What the run is.
    """

    server: GlobalServer

    def __init__(
        self,
        model: Tensor,
        description: RunDescription,
        workers: int,
        members: Iterable[Member] = (),
        preferred: str | None = None,
        refused: Mapping[tuple[int, str], str] | None = None,
    ) -> None:
        budget = StepBudget(workers, description.max_steps)
        super().__init__("The global server", GlobalState.RUNNING, OPEN_GLOBAL_TRANSITIONS, budget)
        self.description = description
        shapes = [torch.Size(shape) for shape in description.shapes]
        self.server = GlobalServer(model, descriptions.global_optimizer(description, 1), shapes)
        self._members = {member.index: member for member in members}
        self._preferred = preferred
        self._decider: int | None = None
        self._callbacks = ""
        self._done = Spans()  # data in reports
        self._cursor = descriptions.cursor(description, Spans())
        self._is_restored = False
        self._awaited: set[int] = set()  # members that have not returned since the restart of the global server
        self._refused = dict(refused or {})
        # What the snapshots under way have of each member: session, update and publication; of the present ones only.
        self._snapshots: dict[str, dict[int, tuple[str, int, int]]] = {}
        self._snapshot = 0  # number of the last one

    @classmethod
    def restored(cls, state: Mapping[str, Any], preferred: str | None = None) -> OpenGlobalNode:
        """Returns the node of a snapshot on disk. None of its members is connected."""
        fields = state["description"]
        description = RunDescription(
            **{**fields, "buffers": [(name, list(shape)) for name, shape in fields["buffers"]]}
        )
        elements, dtype = descriptions.form(description)
        node = cls(torch.zeros(elements, dtype=dtype), description, state["workers"], preferred=preferred)
        node.load_state_dict(state)
        return node

    @property
    def form(self) -> tuple[int, torch.dtype]:
        """Number of elements and dtype of the model."""
        return self.server.model.numel(), self.server.model.dtype

    @property
    def present(self) -> int:
        """Number of members that are connected."""
        return sum(member.is_active for member in self._members.values())

    @property
    def wants_snapshot(self) -> bool:
        """Whether a member waits for a snapshot that has it."""
        under_way = list(self._snapshots.values())
        return any(
            member.is_active
            and not member.is_saved
            and not any(saved.get(member.index, ("",))[0] == member.session for saved in under_way)
            for member in self._members.values()
        )

    def index_of(self, name: str) -> int:
        """Returns the index of the member with a name, which is the same for ever."""
        for member in self._members.values():
            if member.name == name:
                return member.index
        index = len(self._members)
        first = sum(member.workers for member in self._members.values())
        self._members[index] = Member(name, index, first, is_stale=self._is_restored)
        return index

    def name_of(self, index: int) -> str:
        return self._members[index].name

    def start(self) -> list[Send]:
        """Welcomes the members that are joining."""
        joining = [m for m in self._members.values() if m.session and m.state is MemberState.JOINING]
        for member in joining:
            member.move(MemberEvent.WELCOME)
        self._choose_decider()
        self._follow()
        return [self._welcome(member, is_new=True) for member in joining]

    def handle(self, sender: int, message: Message, finding: Finding | None = None) -> list[Send]:
        member = self._members.get(sender)
        if member is None:
            raise ProtocolError(f"{self._name} got an unexpected message from {sender}: {brief(message)}.")
        match message:
            case Enrol():
                return self._on_enrol(member, message)
            case Join():
                return self._on_join(member, message)
        if member.state is MemberState.JOINING:
            raise ProtocolError(f"{member} has not joined: {brief(message)}.")
        if not member.is_active:
            return []  # it repeats what is needed when it is back
        if self.state is GlobalState.FINISHED and isinstance(message, RegionUpdate | Progress | Publish):
            return []  # it has not got the final model yet
        match message:
            case RegionUpdate(server=index) if index == sender:
                return self._on_update(member, message, finding)
            case Progress(server=index) if index == sender:
                return self._on_progress(member, message)
            case LeaseRequest():
                return self._on_lease_request(member, message)
            case ModelRequest():
                return self._on_model_request(member, message)
            case Publish():
                return self._on_publish(member, message)
        raise ProtocolError(f"{member} must not send this: {brief(message)}.")

    def disconnected(self, index: int) -> list[Send]:
        """Records that the connection of a member is lost."""
        return self._go(index, MemberEvent.DISCONNECT)

    def lose(self, index: int) -> list[Send]:
        """Gives a member up that was silent for too long. It may return."""
        return self._go(index, MemberEvent.LOSE)

    def expel(self, index: int, reason: str) -> list[Send]:
        """Loses a member, and refuses its session from now on. A new session of the same name may join."""
        self._refuse(self._members[index], reason)
        return [Send(index, Refusal(reason)), *self.lose(index)]

    def end(self) -> list[Send]:
        """Asks all members to stop, as a worker can."""
        if self.state is GlobalState.FINISHED:
            return []
        self._asked_to_stop = True
        return self._settle()

    def begin_snapshot(self) -> list[Send]:
        """Starts a snapshot. Returns a shard for storage, whose marker's ``save`` is for :meth:`saved`."""
        self._move(OpenEvent.SNAPSHOT)
        self._snapshot += 1
        token, snapshot = str(self._snapshot), self.server.snapshot()
        members = [m for m in self._members.values() if m.is_present or m.state is MemberState.JOINING]
        self._snapshots[token] = {m.index: (m.session, m.update, m.publication) for m in members}
        return [Send(STORAGE, Shard(Marker(token, ""), None, self._state(snapshot.state), snapshot))]

    def saved(self, save: str) -> list[Send]:
        """Records that a snapshot is on disk, and tells the members, which need not repeat what it has."""
        for token in [token for token in self._snapshots if int(token) < int(save)]:
            del self._snapshots[token]
        sends = []
        for index, (session, update, publication) in self._snapshots.pop(save).items():
            member = self._members[index]
            if member.session == session:
                member.is_saved, member.saved = True, (update, publication)
                if member.is_active:
                    sends.append(self._tell(member))
        return [*sends, *self._lease()]

    def status(self) -> dict[str, Any]:
        """Returns the state of the run and of its members, as plain values."""
        run = {
            "state": self.state.value,
            "global_step": self.budget.position,
            "max_steps": self.budget.max_steps,
            "epoch": self._epoch,
            "epochs": self.description.epochs,
            "workers": self.budget.workers,
            "total": self.budget.total,
            "applied": self.server.steps,
            "version": self.version,
            "metrics": dict(self._metrics),
            "decider": None if self._decider is None else self._members[self._decider].name,
        }
        members = {member.name: self._status_of(member) for member in self._members.values() if member.session}
        return {"run": run, "members": members}

    def _status_of(self, member: Member) -> dict[str, Any]:
        counters = member.counters.statistics()
        applied = sum(member.counters.applied.values())
        return {
            "state": member.state.value,
            "workers": member.workers,
            "steps": member.counted,
            "updates": member.update,
            "reports": member.report,
            "saved": member.saved[0],
            "unsent": sum(report.steps for report in member.uncovered),
            "staleness": counters["staleness_sum"] / applied if applied else None,
            "rejected": counters["rejected"],
            "rejected_updates": self.server.rejections.get(member.index, 0),
            "is_flushed": member.is_flushed,
            "session": member.session,
            "counters": counters,
        }

    def state_dict(self) -> dict[str, Any]:
        return self._state(self.server.state_dict())

    def _state(self, server: dict[str, Any]) -> dict[str, Any]:
        return {
            "description": dataclasses.asdict(self.description),
            "workers": self.budget.workers,
            "total": self.budget.total,
            "state": self.state.value,
            "asked_to_stop": self._asked_to_stop,
            "done": list(self._done),
            "members": [member.state_dict() for member in self._members.values()],
            "decider": self._decider,
            "plateau_steps": list(self._plateau_steps),
            "metrics": dict(self._metrics),
            "callbacks": self._callbacks,
            "refused": dict(self._refused),
            "server": server,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        # Has the rates of the snapshot's number of members, so that the optimizer's windows go on.
        senders = state["server"]["senders"]
        self.server.follow(senders, descriptions.global_rates(self.description, senders))
        self.server.load_state_dict(state["server"])
        self.budget.total = state["total"]
        self.state = GlobalState(state["state"])
        self._asked_to_stop = state["asked_to_stop"]
        self._done = Spans(state["done"])
        self._members = {fields["index"]: Member.restored(fields) for fields in state["members"]}
        self._is_restored = True
        self._awaited = {index for index, member in self._members.items() if member.is_present}
        self._decider = state["decider"]
        self._plateau_steps = [(index, value) for index, value in state["plateau_steps"]]
        self._metrics, self._callbacks = dict(state["metrics"]), state["callbacks"]
        self._refused = dict(state["refused"])
        taken = Spans(self._done)
        for member in self._members.values():
            taken.add(member.open)
        self._cursor = descriptions.cursor(self.description, taken)
        if self.state is GlobalState.FINISHED:
            self._final = self._model_at_end()
        self._follow()

    # ------------------------------------------------------------------ members

    def _on_enrol(self, member: Member, enrol: Enrol) -> list[Send]:
        _check(is_possible(enrol), member, enrol)
        self._move(OpenEvent.ENROL)
        member.workers = member.workers or enrol.workers
        return [Send(member.index, Enrolled(self.budget.workers, member.first))]

    def _on_join(self, member: Member, join: Join) -> list[Send]:
        if reason := self._reason_against(member, join):
            return [Send(member.index, Refusal(reason))]
        self._move(OpenEvent.JOIN)
        is_new = join.session != member.session
        has_unsent = is_new and bool(member.uncovered)
        if is_new:
            if member.is_present:
                self._lose(member)
            self._refuse(member, "Another process of this region has joined since. Start this one anew.")
            member.begin(join.session, join.workers)
            member.move(MemberEvent.JOIN)
            member.move(MemberEvent.WELCOME)
        else:
            member.disconnect()
            member.move(MemberEvent.RETURN)
        self._awaited.discard(member.index)
        self._forget(member, join)
        lost = self._claim(member, Spans(sorted(join.held)))
        member.is_stale = False
        before = self._decider
        self._choose_decider()
        welcome = self._welcome(member, is_new, lost)
        final = self._final
        if member.state is MemberState.LEFT and final is None:
            final = self._farewell(member, self.model.clone())
        sends = [welcome, *self._new_decider(before, besides=member)]
        sends += [*([] if final is None else [Send(member.index, final)]), *self._settle()]
        return [*sends, *self._tell_all()] if has_unsent else sends

    def _reason_against(self, member: Member, join: Join) -> str:
        """Returns the reason why a member may not join, or an empty text. Raises an error if the message is wrong."""
        _check(is_possible(join) and len(join.held) <= _MOST_HELD, member, join)
        if reason := self._refused.get((member.index, join.session)):
            return reason
        if reason := descriptions.reason_against(self.description, join.description):
            return reason
        known, end = Spans(), 0.0
        if join.session == member.session:
            _check(join.workers == member.workers, member, join)
            known = member.leased
        elif not member.is_stale and (join.held or join.saved or join.saved_report or join.is_flushed):
            return "The global server has no record of this process. Start it anew."
        if self._cursor is not None and member.is_stale:
            # More may have been leased to it after the snapshot that this node was restored from.
            workers = sum(other.workers for other in self._members.values()) + join.workers
            end = min(self._cursor.end, self._cursor.next + _MOST_UNKNOWN * workers * self._largest_order)
        _check(all(0 <= start < stop for start, stop in join.held), member, join)
        _check(all(stop <= end for _, stop in Spans(sorted(join.held)).without(known)), member, join)
        return ""

    @property
    def _largest_order(self) -> int:
        """Largest order of data, in local steps per worker."""
        return _LARGEST_ORDER * int(self.description.settings["local_steps"] or 1)

    def _refuse(self, member: Member, reason: str) -> None:
        """Refuses a member's session from now on."""
        if member.session:
            self._refused[member.index, member.session] = reason[:_SHOWN]
        while len(self._refused) > _MOST_REFUSED:
            del self._refused[next(iter(self._refused))]

    def _forget(self, member: Member, join: Join) -> None:
        """Gives up what a member cannot repeat: a snapshot had it, but this node was restored from an older one."""
        gone = [report for report in member.uncovered if report.update <= join.saved]
        self._take_back(member, gone)
        member.uncovered = type(member.uncovered)(report for report in member.uncovered if report.update > join.saved)
        member.update = max(member.update, join.saved)
        member.report = max(member.report, join.saved_report)
        member.publication = max(member.publication, join.saved_publication)
        if join.is_flushed and not member.is_flushed:
            member.is_flushed = True
            self._return_leases(member)

    def _claim(self, member: Member, held: Spans) -> Spans:
        """Leases to a member what it holds, and takes back what it does not hold. Returns what others have now."""
        if self._cursor is None or member.is_flushed:
            return Spans()
        surplus = member.open.without(held)
        member.open.remove(surplus)
        self._give_back(surplus)
        unknown = held.without(member.open, member.reported)
        claimed = self._cursor.claim(unknown)
        for other in [self._members[index] for index in self._awaited if member.is_stale]:
            # Since the snapshot, the other one has returned it, and will not claim it.
            moved = other.open.common(unknown)
            other.open.remove(moved)
            claimed.add(moved)
        member.open.add(claimed)
        member.leased.add(held)
        return unknown.without(claimed)

    def _welcome(self, member: Member, is_new: bool, lost: Spans | None = None) -> Send:
        status = self._status(member)
        status.first_plateau_step, status.plateau_steps = 0, list(self._plateau_steps)
        welcome = Welcome(
            member=member.index,
            workers=self.budget.workers,
            status=status,
            is_new=is_new,
            received=member.update,
            reports=member.report,
            publications=member.publication,
            epoch=self._epoch,
            lost=list(lost or ()),
            callbacks=self._callbacks if status.decides else "",
        )
        return Send(member.index, welcome)

    def _go(self, index: int, event: MemberEvent) -> list[Send]:
        member = self._members[index]
        self._move(OpenEvent.GO)
        if event is MemberEvent.DISCONNECT:
            member.disconnect()
            member.move(event)
            return self._settle()
        has_unsent, before = bool(member.uncovered), self.state
        self._lose(member)
        sends = self._settle()
        # All members must know that there are fewer steps than they were told.
        return [*sends, *self._tell_all()] if has_unsent and self.state is before else sends

    def _lose(self, member: Member) -> None:
        """Loses a member: what is not in the global model was never done."""
        self._awaited.discard(member.index)
        member.disconnect()
        member.move(MemberEvent.LOSE)
        if member.uncovered:
            member.report = member.uncovered[0].number - 1
        member.is_saved = False  # if it returns, a snapshot must know of it before it gets data
        for saved in self._snapshots.values():
            saved.pop(member.index, None)
        self._take_back(member, member.uncovered)
        member.uncovered.clear()
        self._return_leases(member)

    def _take_back(self, member: Member, reports: Iterable[Report]) -> None:
        for report in reports:
            self.budget.total -= report.steps
            member.counted -= report.steps
            member.reported.remove(report.counted)
            self._done.remove(report.counted)
            self._give_back(Spans(report.counted))

    def _return_leases(self, member: Member) -> None:
        member.request = None
        open_, member.open = member.open, Spans()
        self._give_back(open_)

    def _give_back(self, spans: Spans) -> None:
        """Lets data be leased again that nobody has trained on or holds."""
        if self._cursor is not None:
            self._cursor.give_back(spans.without(self._done, *(member.open for member in self._members.values())))

    def _choose_decider(self) -> None:
        if self.state is GlobalState.FINISHED:
            return
        active = [member for member in self._members.values() if member.is_active]
        preferred = [member.index for member in active if member.name == self._preferred]
        if preferred:
            self._decider = preferred[0]
        elif self._decider is None or not self._members[self._decider].is_present:
            self._decider = min((member.index for member in active), default=None)
        if self._decider is not None:
            self._members[self._decider].has_decided = True

    def _new_decider(self, before: int | None, besides: Member | None = None) -> list[Send]:
        """Tells the members concerned, except one that is told in another way, who decides from now on."""
        if before == self._decider:
            return []
        sends = []
        for index in (before, self._decider):
            member = None if index is None else self._members[index]
            if member is not None and member.is_active and member is not besides:
                sends.append(self._tell(member))
                sends += [Send(member.index, Decide(self._callbacks))] if index == self._decider else []
        return sends

    def _follow(self) -> None:
        """Adapts the server to the number of members."""
        present = max(1, sum(member.is_present for member in self._members.values()))
        self.server.follow(present, descriptions.global_rates(self.description, present))

    # ------------------------------------------------------------------ the state of the run

    def _settle(self) -> list[Send]:
        """Draws the conclusions of a change: who decides, whether the run stops, goes on or ends, and who gets data."""
        if self.state is GlobalState.FINISHED:
            return self._lease()
        before = self._decider
        self._choose_decider()
        self._follow()
        sends = self._new_decider(before)
        must_stop = self._asked_to_stop or self.budget.exhausted
        if self.state is GlobalState.RUNNING and must_stop:
            self._move(OpenEvent.STOP)
            sends += self._tell_all()
        elif self.state is GlobalState.STOPPING and not must_stop:
            self._move(OpenEvent.GO_ON)
            sends += self._tell_all()
        present = [member for member in self._members.values() if member.is_present]
        if all(member.is_flushed for member in present) and self._is_done(present):
            self._move(OpenEvent.FINISH)
            self._final = self._model_at_end()
            # Nothing writes to the model any more, so all receivers may share its memory.
            sends += [Send(member.index, self._final) for member in present if member.is_active]
        return [*sends, *self._lease()]

    def _is_done(self, present: Sequence[Member]) -> bool:
        """Whether the run's work is done, given that nobody works on it now."""
        if self._asked_to_stop or self.budget.exhausted:
            return True
        if self._cursor is not None:
            return self._cursor.is_over
        # Without shared data each member has its own, and sends its last update at the end of it.
        return self.description.epochs is not None and bool(present)

    def _model_at_end(self) -> GlobalModel:
        return GlobalModel(self.version, True, self._asked_to_stop, self.budget.position, self.model)

    @property
    def _epoch(self) -> int:
        return 0 if self._cursor is None else self._cursor.epoch

    def _tell_all(self) -> list[Send]:
        return [self._tell(member) for member in self._members.values() if member.is_active]

    def _tell(self, member: Member) -> Send:
        return Send(member.index, self._status(member))

    def _status(self, member: Member) -> Status:
        first, member.told = member.told, len(self._plateau_steps)
        member.status += 1
        return Status(
            total=self.budget.total,
            fastest=max((other.fastest for other in self._members.values() if other.is_present), default=0.0),
            stop=self.state is not GlobalState.RUNNING,
            counted=member.counted,
            first_plateau_step=first,
            plateau_steps=self._plateau_steps[first:],
            metrics=dict(self._metrics),
            number=member.status,
            saved=member.saved[0],
            saved_publication=member.saved[1],
            decides=self._decider == member.index,
        )

    # ------------------------------------------------------------------ messages of a member

    def _on_update(self, member: Member, update: RegionUpdate, finding: Finding | None) -> list[Send]:
        if update.number <= member.update:
            return self._repeat_answer(member, update)
        vector, model = update.vector, self.model
        _check(update.number == member.update + len(member.waiting) + 1, member, update)
        _check(not member.is_flushed and not (member.waiting and member.waiting[-1][0].final), member, update)
        _check(vector is not None and vector.shape == model.shape and vector.dtype == model.dtype, member, update)
        _check(update.final or not update.leave, member, update)
        self._move(OpenEvent.UPDATE)
        member.waiting.append((update, finding))
        return self._apply(member)

    def _repeat_answer(self, member: Member, update: RegionUpdate) -> list[Send]:
        if update.final:
            return [] if self._final is None else [Send(member.index, self._final)]
        if update.vector is None:
            update.vector = torch.empty_like(self.model)
        return [Send(member.index, self.server.answer(update))]

    def _apply(self, member: Member) -> list[Send]:
        """Applies the updates of a member of which all reports have arrived."""
        sends = []
        while member.waiting and member.waiting[0][0].reports <= member.report:
            update, finding = member.waiting[0]
            covered = [report for report in member.uncovered if report.update <= update.number]
            _check(sum(report.steps for report in covered) == update.steps, member, update)
            _check(not update.final or len(covered) == len(member.uncovered), member, update)
            member.waiting.popleft()
            member.cover(update.number)
            update.version = min(update.version, self.version)  # after a restart it may be of a later model
            answer = self.server.receive(update, finding, f"region {member.name!r}")
            if not update.final:
                sends.append(Send(member.index, answer))
                continue
            member.is_flushed = True
            self._asked_to_stop = self._asked_to_stop or (update.stop and member.has_decided)
            self._return_leases(member)
            if update.leave:
                member.move(MemberEvent.LEAVE)
                assert answer.vector is not None
                sends.append(Send(member.index, self._farewell(member, answer.vector)))
            sends += self._settle()
        return sends

    def _farewell(self, member: Member, model: Tensor) -> GlobalModel:
        """The last message to a member that leaves, while the run goes on."""
        return GlobalModel(self.version, True, False, self.budget.position, model, member.update)

    def _on_progress(self, member: Member, report: Progress) -> list[Send]:
        if report.number <= member.report:
            return [self._tell(member)]
        last = member.uncovered[-1].update if member.uncovered else member.update + 1
        numbers = (report.seconds, report.waited, report.fastest)
        _check(report.number == member.report + 1 and last <= report.update, member, report)
        _check(report.update <= member.update + _MOST_AHEAD, member, report)
        _check(len(member.uncovered) < _MOST_UNCOVERED, member, report)
        _check(report.worker < member.workers and not member.is_flushed, member, report)
        _check(0 <= report.steps <= descriptions.most_steps(self.description), member, report)
        _check(all(math.isfinite(number) and number >= 0 for number in numbers), member, report)
        _check(len(report.data) <= _MOST_RANGES, member, report)
        data = Spans(sorted(report.data))  # in order, each range is added at the end
        _check(
            all(start < stop for start, stop in report.data) and not data.without(member.leased).steps, member, report
        )
        self._move(OpenEvent.PROGRESS)
        fresh = list(data.without(self._done))
        member.report = report.number
        member.counted += report.steps
        member.fastest = report.fastest
        member.uncovered.append(Report(report.number, report.update, report.steps, fresh))
        member.counters.add(report)
        self.budget.total += report.steps
        self._done.add(fresh)
        if self._cursor is not None:
            self._cursor.claim(fresh)  # others may have had it meanwhile, and given it back
        member.reported.add(fresh)
        member.open.remove(data)
        self._asked_to_stop = self._asked_to_stop or (report.stop and member.has_decided)
        before = self.state
        sends = [*self._apply(member), *self._settle()]
        if self.state is not before:
            return sends  # all members know
        # Members that have sent their last update wait for the final model; the status shows them that the run goes on.
        told = [m for m in self._members.values() if m.is_active and (m is member or m.is_flushed)]
        return [*sends, *(self._tell(other) for other in told)]

    def _on_lease_request(self, member: Member, request: LeaseRequest) -> list[Send]:
        _check(self._cursor is not None, member, request)
        if member.is_flushed:
            return []  # its last update was faster
        if member.grant is not None and request.number <= member.grant.number:
            return [Send(member.index, member.grant)] if request.number == member.grant.number else []
        if (held := member.open.steps) > _MOST_OPEN * self._largest_order * member.workers:
            raise ProtocolError(
                f"{member} asks for more data, and has not reported the {held} local steps of data that it holds. A job"
                " holds so much only if its data loaders load thousands of batches ahead: lower prefetch_factor."
            )
        self._move(OpenEvent.LEASE_REQUEST)
        member.request = request
        return self._lease()

    def _lease(self) -> list[Send]:
        """Answers the requests for data that can be answered now."""
        cursor, sends = self._cursor, list[Send]()
        if cursor is None or self._awaited:
            return sends
        present = [member for member in self._members.values() if member.is_present]
        for member in present:
            request = member.request
            if request is None or not (member.is_saved or cursor.is_over):
                continue
            others = any(other.open.steps and other.request is None for other in present if other is not member)
            if cursor.is_over and others and not self._asked_to_stop:
                continue  # another one may be lost, and its data come back
            steps = max(1, min(request.steps, self._largest_order * member.workers))
            lease = None if self._asked_to_stop else cursor.take(steps, sharers=len(present))
            member.request, member.grant = None, grant_of(lease, request.number)
            if lease is not None:
                first = lease.epoch * self.description.steps_per_epoch + lease.first
                member.open.add([(first, first + lease.steps)])
                member.leased.add([(first, first + lease.steps)])
            sends.append(Send(member.index, member.grant))
        return sends

    def _on_model_request(self, member: Member, request: ModelRequest) -> list[Send]:
        self._move(OpenEvent.MODEL_REQUEST)
        return [Send(member.index, ModelCopy(self.version, self.server.steps, request.number, self.model.clone()))]

    def _on_publish(self, member: Member, publish: Publish) -> list[Send]:
        if publish.number <= member.publication:
            return []
        _check(publish.number == member.publication + 1, member, publish)
        _check(len(publish.plateau_steps) <= _MOST_PUBLISHED, member, publish)
        _check(len(publish.metrics) <= _MOST_METRICS, member, publish)
        _check(sum(map(len, publish.metrics)) <= _MOST_CHARACTERS, member, publish)
        self._move(OpenEvent.PUBLISH)
        member.publication = publish.number
        if member.index != self._decider:
            return []  # it has not heard yet that another one decides
        room = _MOST_PLATEAU_STEPS - len(self._plateau_steps)
        if 0 < room <= len(publish.plateau_steps):
            log.warning("The run has %d steps of plateau schedulers. Later ones are ignored.", _MOST_PLATEAU_STEPS)
        self._plateau_steps += publish.plateau_steps[:room]
        self._metrics, self._callbacks = dict(publish.metrics), publish.callbacks
        return self._tell_all()


def _check(holds: bool, member: Member, message: Message) -> None:
    """Raises a :class:`ProtocolError` unless a message of a member is as it must be."""
    if not holds:
        raise ProtocolError(f"{member} must not send this now: {brief(message)}.")
