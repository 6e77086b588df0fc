"""What regions are told when they enrol before a run has begun, and must be told again after a restart of the server.

Numbers only. The founding decides when a region may enrol, and ``serving`` writes them to disk before they are told.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from lightning_halos.core.members import Member
from lightning_halos.core.messages import Enrolled
from lightning_halos.core.protocol import Send
from lightning_halos.core.roster import Roster

log = logging.getLogger(__name__)


class Enrolment:
    """The regions that have enrolled, in this order.

    Args:
        min_regions: Number of members that the run begins with.
        workers: Number of workers that a global step is divided by. Default: those of the first ``min_regions``
            members that enrol.

    Attributes:
        workers: Number of workers that a global step is divided by; ``None`` while too few have enrolled.
    """

    def __init__(self, members: Roster, min_regions: int, workers: int | None) -> None:
        self.workers = workers
        self._members = members
        self._min_regions = min_regions
        self._enrolled: list[Member] = []
        self._asked: list[Member] = []  # those that wait for an answer

    def enrol(self, member: Member, workers: int) -> None:
        """Enrols a member, unless it has enrolled."""
        if member not in self._enrolled:
            self._members.enrol(member, workers)
            self._enrolled.append(member)
        first = self._enrolled[: self._min_regions]
        if self.workers is None and len(first) == self._min_regions:
            self.workers = sum(member.workers for member in first)

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
        return [Send(member.index, Enrolled(self.workers, member.first)) for member in asked]

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        regions = [{"name": m.name, "first": m.first, "workers": m.workers} for m in self._enrolled]
        return {"workers": self.workers, "regions": regions}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state of :meth:`state_dict`, before anybody has enrolled."""
        for region in state["regions"]:
            member = self._members.add(region["name"])
            member.first, member.workers = region["first"], region["workers"]
            self._enrolled.append(member)
        told = state["workers"]
        if told is not None:
            if self.workers not in (None, told):
                log.warning("A global step stays divided by %d workers, as the regions have been told.", told)
            self.workers = told
