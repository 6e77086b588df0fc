"""What a message of a member must be like, and how much of everything a member may send.

Nothing changes here. A wrong message raises a ``ProtocolError`` before it has changed anything, so that it costs its
sender the membership and not the run.
"""

from __future__ import annotations

import math

from torch import Tensor

from lightning_halos.core import description as descriptions
from lightning_halos.core.cursor import Spans
from lightning_halos.core.members import Member, brief, is_possible
from lightning_halos.core.messages import Join, Message, Progress, Publish, RegionUpdate, RunDescription
from lightning_halos.core.open_region_node import MOST_KEPT
from lightning_halos.core.protocol import ProtocolError

_MOST_AHEAD = 2 * MOST_KEPT  # updates between the last one of a member and the one that a report announces
_MOST_UNCOVERED = 2**18  # reports of a member whose updates have not arrived
_MOST_RANGES = 2**14  # of data in a report
_MOST_HELD = 2**16  # ranges of data that a member that joins may hold
_MOST_PUBLISHED = 1000  # steps of plateau schedulers in a publication
_MOST_METRICS, _MOST_CHARACTERS = 2**16, 2**21  # metrics in a publication, and characters of their names together


def check(holds: bool, member: Member, message: Message) -> None:
    """Raises a :class:`ProtocolError` unless a message of a member is as it must be."""
    if not holds:
        raise ProtocolError(f"{member} must not send this now: {brief(message)}.")


def check_join(member: Member, join: Join) -> None:
    """Checks the fields of a join that need no comparison with the run."""
    check(is_possible(join) and len(join.held) <= _MOST_HELD, member, join)
    check(bool(join.run) or not has_history(join), member, join)


def has_history(join: Join) -> bool:
    """Whether a process that joins says that it has taken part in a run."""
    return bool(join.held or join.saved or join.saved_report or join.saved_publication or join.is_flushed)


def check_update(member: Member, update: RegionUpdate, model: Tensor) -> None:
    """Checks an update that has not arrived before."""
    vector = update.vector
    check(update.number == member.update + len(member.waiting) + 1, member, update)
    check(not member.is_flushed and not (member.waiting and member.waiting[-1][0].final), member, update)
    check(vector is not None and vector.shape == model.shape and vector.dtype == model.dtype, member, update)
    check(update.final or not update.leave, member, update)


def check_report(member: Member, report: Progress, description: RunDescription) -> None:
    """Checks a report that has not arrived before."""
    last = member.uncovered[-1].update if member.uncovered else member.update + 1
    numbers = (report.seconds, report.waited, report.fastest)
    check(report.number == member.report + 1 and last <= report.update, member, report)
    check(report.update <= member.update + _MOST_AHEAD, member, report)
    check(len(member.uncovered) < _MOST_UNCOVERED, member, report)
    check(report.worker < member.workers and not member.is_flushed, member, report)
    check(report.steps >= 0, member, report)
    _limit("local steps in a round", report.steps, descriptions.most_steps(description), member)
    check(all(math.isfinite(number) and number >= 0 for number in numbers), member, report)
    check(len(report.data) <= _MOST_RANGES, member, report)
    data = Spans(sorted(report.data))  # in order, each range is added at the end
    check(all(start < stop for start, stop in report.data) and not data.without(member.leased).steps, member, report)


def check_publication(member: Member, publish: Publish) -> None:
    """Checks a publication that has not arrived before."""
    check(publish.number == member.publication + 1, member, publish)
    _limit("steps of plateau schedulers at once", len(publish.plateau_steps), _MOST_PUBLISHED, member)
    _limit("metrics", len(publish.metrics), _MOST_METRICS, member)
    _limit("characters in the names of its metrics", sum(map(len, publish.metrics)), _MOST_CHARACTERS, member)


def _limit(what: str, number: int, most: int, member: Member) -> None:
    if number > most:
        raise ProtocolError(f"{member} has {number:,} {what}. A run of several jobs allows {most:,}.")
