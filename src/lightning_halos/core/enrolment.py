"""What regions are told when they enrol before a run has begun, and must be told again after a restart of the server.

Numbers only. The founding decides when a region may enrol, and ``serving`` writes them to disk before they are told.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_halos.core.members import Member
from lightning_halos.core.messages import Enrolled
from lightning_halos.core.protocol import Send
from lightning_halos.core.roster import Roster

log = logging.getLogger(__name__)

_MOST_GONE = 1000  # jobs that were told numbers, and are remembered although they are gone


@dataclass
class _Enrolled:
    """A region that has enrolled, with its job."""

    member: Member
    session: str  # empty if it is unknown
    workers: int
    is_told: bool = False


class _Told(NamedTuple):
    """What a job was told that is gone."""

    total: int  # workers that a global step is divided by
    first: int
    workers: int


class Enrolment:
    """The jobs that have enrolled, in this order, one of each region.

    Numbers stay for a job that was told them, because its module may have used them. A job that is gone is withdrawn.
    When nobody is left who was told anything, the numbers are open again.

    Args:
        members: The members. Each keeps its place, ``first``, for as long as the numbers are not open.
        min_regions: Number of members that the run begins with.
        workers: Number of workers that a global step is divided by. Default: those of the first ``min_regions``
            members that enrol.

    Attributes:
        workers: Number of workers that a global step is divided by; ``None`` while too few have enrolled.
    """

    def __init__(self, members: Roster, min_regions: int, workers: int | None) -> None:
        self.workers = workers
        self._ordered = workers
        self._members = members
        self._min_regions = min_regions
        self._enrolled: dict[int, _Enrolled] = {}
        self._asked: list[Member] = []  # those that wait for an answer
        self._gone: dict[tuple[int, str], _Told] = {}  # by member and session

    @property
    def told(self) -> list[int]:
        """Indices of the members whose jobs were told numbers."""
        return [index for index, region in self._enrolled.items() if region.is_told]

    def enrol(self, member: Member, session: str, workers: int) -> str:
        """Enrols a member's job, unless it has enrolled. Another job of the member is gone, because there can be one.

        Returns:
            The reason why the job cannot take part; an empty text if it can.
        """
        known = self._enrolled.get(member.index)
        if known is not None and known.session in ("", session):
            known.session = session
            return ""
        self.withdraw(member)
        told = self._gone.get((member.index, session))
        if told is not None:
            return self._take_back(member, session, told)
        if workers > member.workers:  # its place is too small
            member.workers = 0
        self._members.enrol(member, workers)
        self._enrolled[member.index] = _Enrolled(member, session, workers)
        self._count()
        return ""

    def withdraw(self, member: Member) -> None:
        """Forgets a member's job, which is gone."""
        self.forget(member)
        region = self._enrolled.pop(member.index, None)
        if region is None:
            return
        member.session = ""  # if it comes back after all, it begins anew
        if region.is_told and region.session:
            assert self.workers is not None
            self._gone[member.index, region.session] = _Told(self.workers, member.first, region.workers)
            while len(self._gone) > _MOST_GONE:
                del self._gone[next(iter(self._gone))]
        if not self.told:
            if region.is_told and self.workers != self._ordered:
                log.warning("No job is left that was told that a global step is divided by %d worker(s).", self.workers)
            self.workers = self._ordered
            for other in self._members:
                other.first = other.workers = 0
            self._lay_out()
            self._count()

    def disconnect(self, member: Member) -> None:
        """Withdraws a member's job that has no connection, unless it was told numbers. It enrols again on the next."""
        self.forget(member)
        if member.index not in self.told:
            self.withdraw(member)

    def ask(self, member: Member) -> None:
        """Records that a member waits for an answer, perhaps on another connection than before."""
        if member not in self._asked:
            self._asked.append(member)

    def forget(self, member: Member) -> None:
        """Forgets that a member waits for an answer."""
        self._asked = [other for other in self._asked if other is not member]

    def answer(self) -> list[Send]:
        """Answers those who wait, if enough have enrolled."""
        if self.workers is None:
            return []
        asked, self._asked = self._asked, []
        for member in asked:
            self._enrolled[member.index].is_told = True
        return [Send(member.index, Enrolled(self.workers, member.first)) for member in asked]

    def end(self) -> None:
        """Refuses the jobs that are gone and were told other numbers than those with which the run begins."""
        for (index, session), told in self._gone.items():
            member = self._members[index]
            if (told.total, told.first) != (self.workers, member.first):
                self._members.refuse(member, _reason(told), session)

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        regions = [
            {
                "name": region.member.name,
                "first": region.member.first,
                "workers": region.workers,
                "session": region.session,
                "is_told": region.is_told,
            }
            for region in self._enrolled.values()
        ]
        gone = [
            {
                "name": self._members[index].name,
                "session": session,
                "total": told.total,
                "first": told.first,
                "workers": told.workers,
            }
            for (index, session), told in self._gone.items()
        ]
        return {"workers": self.workers, "regions": regions, "gone": gone}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state of :meth:`state_dict`, or of an earlier version, before anybody has enrolled.

        Those who were told nothing enrol again.
        """
        total = state["workers"]
        for region in state["regions"]:
            if total is not None and region.get("is_told", True):
                member = self._members.add(region["name"])
                member.first, member.workers = region["first"], region["workers"]
                session = region.get("session", "")
                self._enrolled[member.index] = _Enrolled(member, session, member.workers, is_told=True)
        for job in state.get("gone", []):
            told = _Told(job["total"], job["first"], job["workers"])
            self._gone[self._members.index_of(job["name"]), job["session"]] = told
        if self._enrolled:
            if self.workers not in (None, total):
                log.warning("A global step stays divided by %d workers, as the regions have been told.", total)
            self.workers = total

    def _take_back(self, member: Member, session: str, told: _Told) -> str:
        """Enrols a job that was thought gone, with the numbers that it was told, unless others were told others."""
        others = [region for region in self._enrolled.values() if region.is_told]
        begin, end = told.first, told.first + told.workers
        is_free = all(other.member.first >= end or other.member.first + other.workers <= begin for other in others)
        if others and not (told.total == self.workers and is_free):
            return _reason(told)
        del self._gone[member.index, session]
        self.workers, member.first, member.workers = told.total, told.first, told.workers
        self._enrolled[member.index] = _Enrolled(member, session, told.workers, is_told=True)
        self._lay_out()
        return ""

    def _lay_out(self) -> None:
        """Gives those who were told nothing places behind all others, in their order."""
        waiting = [region for region in self._enrolled.values() if not region.is_told]
        for region in waiting:
            region.member.first = region.member.workers = 0
        for region in waiting:
            self._members.enrol(region.member, region.workers)

    def _count(self) -> None:
        first = list(self._enrolled.values())[: self._min_regions]
        if self.workers is None and len(first) == self._min_regions:
            self.workers = sum(region.workers for region in first)


def _reason(told: _Told) -> str:
    return (
        f"This job was told that a global step is divided by {told.total} worker(s), {told.first} of them before its"
        " own. Then it was away for too long, and other regions have been told other numbers. Start this job again."
    )
