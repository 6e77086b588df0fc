"""The shared training data of a run whose members come and go: who holds what, and when it is leased again.

The arithmetic of ranges is in ``cursor``. The global node decides who is a member, and what of its reports counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lightning_halos.core import description as descriptions
from lightning_halos.core.cursor import DataCursor, Spans
from lightning_halos.core.member_checks import check
from lightning_halos.core.members import Member
from lightning_halos.core.messages import Join, LeaseRequest, RunDescription
from lightning_halos.core.node import grant_of
from lightning_halos.core.protocol import ProtocolError, Send
from lightning_halos.core.roster import Roster

_LARGEST_ORDER = 65  # rounds of all workers of a member that it may order data for at once; see `LeaseStock`
_MOST_UNKNOWN = 4  # largest orders of all members that may have been granted after the snapshot of a restart
_MUCH = 8  # rounds of all workers of a member: more than it needs to end the rounds that they are in
_MOST_OPEN = 64  # largest orders that a member may hold and not report; a region may order about 33 ahead


class Leasing:
    """Leases the data of a run to its members.

    - "No data is left" is said to a member only if nobody else who is not waiting, too, has data that is not reported.
      If somebody waits and holds much, it is the first to be told, and the others wait for its reports.
    - Data is leased only to members that a snapshot on disk has, and, after a restart, only when all members have
      returned or are lost. Otherwise data could be leased twice.

    Args:
        description: What the run is.
        members: The members. Their leases are in their records.
        done: Data in reports.
        awaited: Members that have not returned since the restart of the global server.

    Attributes:
        cursor: The cursor over the data; ``None`` if the workers share none.
        done: Data in reports.
        awaited: Members that have not returned since the restart of the global server.
    """

    def __init__(
        self, description: RunDescription, members: Roster, done: Spans | None = None, awaited: Iterable[int] = ()
    ) -> None:
        self.done = Spans() if done is None else done
        self.awaited = set(awaited)
        self._description = description
        self._members = members
        taken = Spans(self.done)
        for member in members:
            taken.add(member.open)
        self.cursor: DataCursor | None = descriptions.cursor(description, taken)

    @property
    def epoch(self) -> int:
        """The epoch of the run; the last one if its work is done."""
        if self.cursor is not None:
            return self.cursor.epoch
        finished, epochs = self._finished_epochs, self._description.epochs
        return finished if epochs is None else min(finished, epochs - 1)

    def epoch_of(self, member: Member) -> int:
        """Returns the epoch with which a member begins that joins now."""
        return max(member.epoch, self._finished_epochs) if self.cursor is None else self.cursor.epoch

    def order(self, member: Member, request: LeaseRequest) -> None:
        """Takes a member's order, which :meth:`lease` answers.

        Raises:
            ProtocolError: If the member must not order data.
        """
        check(self.cursor is not None, member, request)
        if (held := member.open.steps) > _MOST_OPEN * self._largest_order * member.workers:
            raise ProtocolError(
                f"{member} asks for more data, and has not reported the {held} local steps of data that it holds. A job"
                " holds so much only if its data loaders load thousands of batches ahead: lower prefetch_factor."
            )
        member.request = request

    def lease(self, is_over: bool) -> list[Send]:
        """Answers the orders that can be answered now.

        Args:
            is_over: Whether somebody has asked for the run to stop, so that there is no more data.
        """
        cursor, sends = self.cursor, list[Send]()
        if cursor is None or self.awaited:
            return sends
        present = self._members.present
        for member in present:
            request = member.request
            if request is None or not (member.is_saved or cursor.is_over):
                continue
            if cursor.is_over and not is_over and self._others_hold(member, present):
                continue  # another one may be lost, and its data come back
            steps = max(1, min(request.steps, self._largest_order * member.workers))
            lease = None if is_over else cursor.take(steps, sharers=len(present))
            member.request, member.grant = None, grant_of(lease, request.number)
            if lease is not None:
                span = lease.span(self._description.steps_per_epoch)
                member.open.add([span])
                member.leased.add([span])
            sends.append(Send(member.index, member.grant))
        return sends

    def _others_hold(self, member: Member, present: Iterable[Member]) -> bool:
        """Whether others work on data that a member can get if they are lost."""
        may_pass = self._holds_much(member)
        return any(
            other.open.steps and (other.request is None or (self._holds_much(other) and not may_pass))
            for other in present
            if other is not member
        )

    def _holds_much(self, member: Member) -> bool:
        return member.open.steps > _MUCH * int(self._description.settings["local_steps"] or 1) * member.workers

    def is_awaited(self, member: Member) -> bool:
        """Whether others wait for data that a member holds."""
        if self.cursor is None or self.awaited or member.request is not None or not list(member.open):
            return False
        others = any(other.request is not None for other in self._members.present if other is not member)
        return others and self.cursor.is_over

    def holds_old_data(self, member: Member) -> bool:
        """Whether a member holds data of an epoch such that the next one is over, too."""
        if self.cursor is None or self.cursor.is_over:
            return False
        first, _ = next(iter(member.open), (math.inf, 0))
        return first < (self.cursor.epoch - 1) * self._description.steps_per_epoch

    def report(self, member: Member, data: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Records data that a member has trained on. Returns what no other report had."""
        spans = Spans(sorted(data))  # in order, each range is added at the end
        fresh = list(spans.without(self.done))
        self.done.add(fresh)
        if self.cursor is not None:
            self.cursor.claim(fresh)  # others may have had it meanwhile, and given it back
        member.reported.add(fresh)
        member.open.remove(spans)
        return fresh

    def take_back(self, member: Member, data: Sequence[tuple[int, int]]) -> None:
        """Takes data out of a member's reports, because they do not count any more."""
        member.reported.remove(data)
        self.done.remove(data)
        self._give_back(Spans(data))

    def return_all(self, member: Member) -> None:
        """Takes a member everything that it holds, and its order."""
        member.request = None
        open_, member.open = member.open, Spans()
        self._give_back(open_)

    def check_held(self, member: Member, join: Join) -> None:
        """Checks that a member can have been leased what it says that it holds."""
        known, end = Spans(), 0.0
        if join.session == member.session:
            known = member.leased
        if self.cursor is not None and member.is_stale:
            # More may have been leased to it after the snapshot that this node was restored from.
            workers = self._members.workers + join.workers
            end = min(self.cursor.end, self.cursor.next + _MOST_UNKNOWN * workers * self._largest_order)
        check(all(0 <= start < stop for start, stop in join.held), member, join)
        check(all(stop <= end for _, stop in Spans(sorted(join.held)).without(known)), member, join)

    def claim(self, member: Member, held: Spans) -> Spans:
        """Leases to a member what it holds, and takes back what it does not hold. Returns what others have now."""
        if self.cursor is None or member.is_flushed:
            return Spans()
        surplus = member.open.without(held)
        member.open.remove(surplus)
        self._give_back(surplus)
        unknown = held.without(member.open, member.reported)
        claimed = self.cursor.claim(unknown)
        for other in [self._members[index] for index in self.awaited if member.is_stale]:
            # Since the snapshot, the other one has returned it, and will not claim it.
            moved = other.open.common(unknown)
            other.open.remove(moved)
            claimed.add(moved)
        member.open.add(claimed)
        member.leased.add(held)
        return unknown.without(claimed)

    @property
    def _finished_epochs(self) -> int:
        """Epochs that all workers have finished which still work. Without shared data each has its own."""
        working = [member.epoch for member in self._members.present if not member.is_flushed]
        return min(working) if working else max((member.epoch for member in self._members), default=0)

    @property
    def _largest_order(self) -> int:
        """Largest order of data, in local steps per worker."""
        return _LARGEST_ORDER * int(self._description.settings["local_steps"] or 1)

    def _give_back(self, spans: Spans) -> None:
        """Lets data be leased again that nobody has trained on or holds."""
        if self.cursor is not None:
            self.cursor.give_back(spans.without(self.done, *(member.open for member in self._members)))
