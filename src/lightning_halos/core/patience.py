"""Whether a member that is connected lets the others wait for too long: for data that it holds, or for its last update.

It says who does. The global node decides what follows, and the caller tells the time. A member that is not connected is
none of this: its connection has a limit of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lightning_halos.core.leasing import Leasing
from lightning_halos.core.members import Member
from lightning_halos.core.roster import Roster

_ROUNDS = 20  # of the fastest other member


class _Wait(NamedTuple):
    """What the others wait for.

    Attributes:
        what: For users.
        since: The time at which it began.
        report: Number of the member's last report then.
        held: Data that the member held then, in local steps.
    """

    what: str
    since: float
    report: int
    held: int


class Patience:
    """Notes for how long the others wait for each member.

    They wait for a member's

    - data, when all other data is leased and somebody has asked for more. This may take longer than the limit if the
      member, at the speed that it has shown meanwhile, has worked the rest off within another one.
    - last update, when no worker may start another round.
    - next report, when others have sent their last updates already, or the member holds data of an epoch that the
      others have left behind, with the one after it.

    The limit is ``seconds``, or 20 rounds of the fastest other member if these take longer: long rounds are no fault,
    and neither is to be somewhat slower than others.

    Args:
        seconds: The least limit.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._waits: dict[int, _Wait] = {}

    def exhausted(self, now: float, members: Roster, leasing: Leasing, is_stopping: bool) -> list[tuple[Member, str]]:
        """Returns the members that have let the others wait for too long, with the reasons.

        Args:
            now: The time in seconds.
            members: The members.
            leasing: Who holds which data.
            is_stopping: Whether no worker may start another round.
        """
        waits, found = {}, []
        for member in members.active:
            others = [other for other in members.present if other is not member]
            what = _awaited(member, others, leasing, is_stopping)
            if what is None:
                continue
            wait = self._waits.get(member.index)
            if wait is None or wait.what != what or (what == _REPORT and wait.report != member.report):
                wait = _Wait(what, now, member.report, member.open.steps)
            waits[member.index] = wait
            limit = max(self._seconds, _ROUNDS * (_round_of_fastest(others) or _round_of_fastest([member])))
            waited = now - wait.since
            if waited > limit and (what != _DATA or _time_left(wait, member, waited) > limit):
                found.append((member, f"The others have waited {waited:.0f} s for {what}."))
        self._waits = waits
        return found


_DATA = "data that it holds and does not report"
_LAST = "its last update"
_REPORT = "its next report"


def _awaited(member: Member, others: Sequence[Member], leasing: Leasing, is_stopping: bool) -> str | None:
    """Returns what the others wait for, if they do."""
    if member.is_flushed:
        return None
    if leasing.is_awaited(member):
        return _DATA
    if is_stopping:
        return _LAST
    if any(other.is_flushed for other in others) or (others and leasing.holds_old_data(member)):
        return _REPORT
    return None


def _round_of_fastest(members: Iterable[Member]) -> float:
    """Returns the seconds of a mean round of the fastest member, as far as they have reported any."""
    rounds = [
        (sum(counters.computed.values()) + sum(counters.waited.values())) / counters.rounds
        for counters in (member.counters for member in members)
        if counters.rounds
    ]
    return min(rounds, default=0.0)


def _time_left(wait: _Wait, member: Member, waited: float) -> float:
    """Returns the seconds that a member needs for the data that it still holds, at its speed since the wait began."""
    left = member.open.steps
    done = wait.held - left
    return left * waited / done if done > 0 else math.inf
