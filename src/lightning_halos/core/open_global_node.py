"""The decisions about a run whose members come and go: who takes part, what of their work counts, and when it ends.

The run goes on whatever happens to a member. A message is checked before anything changes, so that a wrong one costs
its sender the membership and not the run. The caller tells the time, and when a member was silent for too long. The
state is in ``open_run``, the division of the data in ``leasing``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_halos.core import description as descriptions
from lightning_halos.core.cursor import Spans
from lightning_halos.core.finding import Finding
from lightning_halos.core.joining import OTHER_RUN
from lightning_halos.core.member_checks import (
    check,
    check_join,
    check_publication,
    check_report,
    check_update,
    has_history,
)
from lightning_halos.core.members import Member, MemberEvent, MemberState, Report, brief, is_possible
from lightning_halos.core.messages import (
    Decide,
    Enrol,
    Enrolled,
    GlobalModel,
    InitialModel,
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
)
from lightning_halos.core.node import send_model
from lightning_halos.core.open_run import OpenRun
from lightning_halos.core.protocol import (
    STORAGE,
    GlobalState,
    OpenEvent,
    ProtocolError,
    Send,
)
from lightning_halos.core.shadow import Shadow
from lightning_halos.core.snapshot import Shard

log = logging.getLogger(__name__)

# Steps of plateau schedulers in a run: a welcome has all of them, and must not be larger than a message may be.
_MOST_PLATEAU_STEPS = 2**19

_NO_RECORD = "The global server has no record of this process. Start this job anew."


class OpenGlobalNode(OpenRun):
    """The global server of a star of jobs, and the decisions about the run.

    - A member of another run is refused, until somebody starts the server with the right directory.
    - A member with a new session begins anew, and its old session is lost. One with the same session goes on.
    - When a member is lost, its reports are taken back whose pushes are in no update that has arrived, and its data is
      leased to others.
    - An update is applied when the reports of all its pushes have arrived, so that the local steps in the global model
      are always the reported ones.
    - The weight of buffers and the default rates follow the number of members that are present (active or
      disconnected), at once: :meth:`GlobalServer.follow`.
    - Only a member that decides, or has decided, may ask for the run to stop; the others' wish is ignored.
    - The run is finished when the budget is used up, the data is over or somebody has asked for it, and all members
      that are present have sent their last updates.

    See :class:`OpenRun` for the arguments and attributes.
    """

    def start(self) -> list[Send]:
        """Welcomes the members that are joining."""
        joining = self._members.joining
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
        if isinstance(message, InitialModel) and member.owes_model:
            member.owes_model = False
            return []  # that of another member was faster
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
        self._members.refuse(self._members[index], reason)
        return [Send(index, Refusal(reason)), *self.lose(index)]

    def tick(self, now: float) -> list[Send]:
        """Gives members up that have let the others wait for too long; see :class:`Patience`.

        Such a member may return once, and has what nobody else has taken meanwhile. The second time it is expelled.

        Args:
            now: The time in seconds, by a clock that never goes back.
        """
        if self.state is GlobalState.FINISHED:
            return []
        is_stopping, sends = self.state is GlobalState.STOPPING, list[Send]()
        for member, reason in self._patience.exhausted(now, self._members, self._leasing, is_stopping):
            if member.was_given_up:
                sends += self.expel(member.index, f"{reason} It was the second time.")
            else:
                sends += [Send(member.index, Refusal(reason, for_good=False)), *self.lose(member.index)]
                member.was_given_up = True
        return sends

    def end(self) -> list[Send]:
        """Asks all members to stop, as a worker can."""
        if self.state is GlobalState.FINISHED:
            return []
        self._asked_to_stop = True
        return self._settle()

    def begin_snapshot(self) -> list[Send]:
        """Starts a snapshot. Returns a shard for storage, whose marker's ``save`` is for :meth:`saved`."""
        self._move(OpenEvent.SNAPSHOT)
        token, snapshot = self._confirmations.begin(), self.server.snapshot()
        return [Send(STORAGE, Shard(Marker(token, ""), None, self._state(snapshot.state), snapshot))]

    def saved(self, save: str) -> list[Send]:
        """Records that a snapshot is on disk, and tells the members, which need not repeat what it has."""
        sends = [self._tell(member) for member in self._confirmations.confirm(save) if member.is_active]
        return [*sends, *self._lease()]

    # ------------------------------------------------------------------ members

    def _on_enrol(self, member: Member, enrol: Enrol) -> list[Send]:
        check(is_possible(enrol), member, enrol)
        self._move(OpenEvent.ENROL)
        self._members.enrol(member, enrol.workers)
        return [Send(member.index, Enrolled(self.budget.workers, member.first))]

    def _on_join(self, member: Member, join: Join) -> list[Send]:
        check_join(member, join)
        if join.run not in ("", self.run):
            return [Send(member.index, Refusal(OTHER_RUN, for_good=False))]
        if reason := self._reason_against(member, join):
            return [Send(member.index, Refusal(reason))]
        self._move(OpenEvent.JOIN)
        is_new = join.session != member.session
        has_unsent = is_new and bool(member.uncovered)
        if is_new:
            if member.is_present:
                self._lose(member)
            self._members.refuse(member, "Another process of this region has joined since. Start this one anew.")
            self._members.enrol(member, join.workers)
            member.begin(join.session, join.workers, self._leasing.epoch_of(member))
            member.move(MemberEvent.JOIN)
            member.move(MemberEvent.WELCOME)
        else:
            member.disconnect()
            member.move(MemberEvent.RETURN)
        self._leasing.awaited.discard(member.index)
        self._shadows.pop(member.index, None)
        self._forget(member, join)
        lost = self._leasing.claim(member, Spans(sorted(join.held)))
        member.is_stale = False
        before = self._deciding.index
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
        if reason := self._members.refusal(member, join.session):
            return reason
        if reason := descriptions.reason_against(self.description, join.description):
            return reason
        if join.session == member.session:
            check(join.workers == member.workers, member, join)
        elif not member.is_stale and has_history(join):
            return _NO_RECORD
        self._leasing.check_held(member, join)
        return ""

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
            self._leasing.return_all(member)

    def _go(self, index: int, event: MemberEvent) -> list[Send]:
        member = self._members[index]
        self._move(OpenEvent.GO)
        self._shadows.pop(index, None)
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
        self._leasing.awaited.discard(member.index)
        member.disconnect()
        member.move(MemberEvent.LOSE)
        if member.uncovered:
            member.report = member.uncovered[0].number - 1
        self._confirmations.forget(member)
        self._take_back(member, member.uncovered)
        member.uncovered.clear()
        self._leasing.return_all(member)

    def _take_back(self, member: Member, reports: Iterable[Report]) -> None:
        for report in reports:
            self.budget.total -= report.steps
            member.counted -= report.steps
            self._leasing.take_back(member, report.counted)

    def _choose_decider(self) -> None:
        if self.state is GlobalState.FINISHED:
            return
        self._deciding.choose(self._members)

    def _new_decider(self, before: int | None, besides: Member | None = None) -> list[Send]:
        """Tells the members concerned, except one that is told in another way, who decides from now on."""
        decider = self._deciding.index
        if before == decider:
            return []
        sends = []
        for index in (before, decider):
            member = None if index is None else self._members[index]
            if member is not None and member.is_active and member is not besides:
                sends.append(self._tell(member))
                sends += [Send(member.index, Decide(self._deciding.callbacks))] if index == decider else []
        return sends

    # ------------------------------------------------------------------ the state of the run

    def _settle(self) -> list[Send]:
        """Draws the conclusions of a change: who decides, whether the run stops, goes on or ends, and who gets data."""
        if self.state is GlobalState.FINISHED:
            return self._lease()
        before = self._deciding.index
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
        present = self._members.present
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
        if self._leasing.cursor is not None:
            return self._leasing.cursor.is_over
        # Without shared data each member has its own, and sends its last update at the end of it.
        return self.description.epochs is not None and bool(present)

    def _lease(self) -> list[Send]:
        return self._leasing.lease(self._asked_to_stop)

    # ------------------------------------------------------------------ messages of a member

    def _on_update(self, member: Member, update: RegionUpdate, finding: Finding | None) -> list[Send]:
        if update.number <= member.update:
            return self._repeat_answer(member, update)
        check_update(member, update, self.model)
        self._move(OpenEvent.UPDATE)
        member.waiting.append((update, finding))
        return self._apply(member)

    def _repeat_answer(self, member: Member, update: RegionUpdate) -> list[Send]:
        if update.final:
            return [] if self._final is None else [Send(member.index, self._final)]
        if update.vector is None:
            update.vector = torch.empty_like(self.model)
        self._shadows.pop(member.index, None)  # nobody knows which one of the answers it will use
        return [Send(member.index, self.server.answer(update))]

    def _apply(self, member: Member) -> list[Send]:
        """Applies the updates of a member of which all reports have arrived."""
        sends = []
        while member.waiting and member.waiting[0][0].reports <= member.report:
            update, finding = member.waiting[0]
            covered = [report for report in member.uncovered if report.update <= update.number]
            check(sum(report.steps for report in covered) == update.steps, member, update)
            check(not update.final or len(covered) == len(member.uncovered), member, update)
            member.waiting.popleft()
            member.cover(update.number)
            update.version = min(update.version, self.version)  # after a restart it may be of a later model
            answer = self.server.receive(update, finding, f"region {member.name!r}")
            if not update.final:
                sends.append(self._send_model(member.index, answer))
                continue
            member.is_flushed = True
            self._asked_to_stop = self._asked_to_stop or (update.stop and member.has_decided)
            self._leasing.return_all(member)
            if update.leave:
                member.move(MemberEvent.LEAVE)
                assert answer.vector is not None
                sends.append(Send(member.index, self._farewell(member, answer.vector)))
            sends += self._settle()
        return sends

    def _send_model(self, index: int, answer: GlobalModel) -> Send:
        if self.description.wire == "float32":
            return Send(index, answer)
        shadow = self._shadows.setdefault(index, Shadow(self.server.num_parameters, self.description.wire))
        return send_model(index, answer, shadow)

    def _farewell(self, member: Member, model: Tensor) -> GlobalModel:
        """The last message to a member that leaves, while the run goes on."""
        return GlobalModel(self.version, True, False, self.budget.position, model, member.update)

    def _on_progress(self, member: Member, report: Progress) -> list[Send]:
        if report.number <= member.report:
            return [self._tell(member)]
        check_report(member, report, self.description)
        self._move(OpenEvent.PROGRESS)
        fresh = self._leasing.report(member, report.data)
        member.report = report.number
        member.counted += report.steps
        member.fastest = report.fastest
        member.count_epochs(report.worker, report.epoch)
        member.uncovered.append(Report(report.number, report.update, report.steps, fresh))
        member.counters.add(report)
        self.budget.total += report.steps
        self._asked_to_stop = self._asked_to_stop or (report.stop and member.has_decided)
        before = self.state
        sends = [*self._apply(member), *self._settle()]
        if self.state is not before:
            return sends  # all members know
        # Members that have sent their last update wait for the final model; the status shows them that the run goes on.
        told = [m for m in self._members.active if m is member or m.is_flushed]
        return [*sends, *(self._tell(other) for other in told)]

    def _on_lease_request(self, member: Member, request: LeaseRequest) -> list[Send]:
        check(self._leasing.cursor is not None, member, request)
        if member.is_flushed:
            return []  # its last update was faster
        if member.grant is not None and request.number <= member.grant.number:
            return [Send(member.index, member.grant)] if request.number == member.grant.number else []
        self._leasing.order(member, request)
        self._move(OpenEvent.LEASE_REQUEST)
        return self._lease()

    def _on_model_request(self, member: Member, request: ModelRequest) -> list[Send]:
        self._move(OpenEvent.MODEL_REQUEST)
        return [Send(member.index, ModelCopy(self.version, self.server.steps, request.number, self.model.clone()))]

    def _on_publish(self, member: Member, publish: Publish) -> list[Send]:
        if publish.number <= member.publication:
            return []
        check_publication(member, publish)
        self._move(OpenEvent.PUBLISH)
        member.publication = publish.number
        if not self._deciding.is_part_of(member):
            return []  # it has not heard yet that another one decides
        room = _MOST_PLATEAU_STEPS - len(self._plateau_steps)
        if 0 < room <= len(publish.plateau_steps):
            log.warning("The run has %d steps of plateau schedulers. Later ones are ignored.", _MOST_PLATEAU_STEPS)
        self._plateau_steps += publish.plateau_steps[:room]
        self._metrics, self._deciding.callbacks = dict(publish.metrics), publish.callbacks
        return self._tell_all()
