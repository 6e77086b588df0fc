"""The state of a member as plain values, for people. It decides nothing.

Its size does not depend on the number of the member's workers.
"""

from __future__ import annotations

import heapq
from typing import Any

from lightning_halos.core.counters import ServerCounters
from lightning_halos.core.members import Member

_SHOWN = 8  # workers of a member


def status_of(member: Member, rejected_updates: int) -> dict[str, Any]:
    """Returns the state of a member.

    ``outliers`` are the workers of which most pushes were rejected and, among equals, those with the stalest ones.

    Args:
        member: The member.
        rejected_updates: Number of its updates that the global server has rejected.
    """
    counters = member.counters
    applied = sum(counters.applied.values())
    computed, waited = sum(counters.computed.values()), sum(counters.waited.values())
    return {
        "state": member.state.value,
        "workers": member.workers,
        "steps": member.counted,
        "updates": member.update,
        "reports": member.report,
        "saved": member.saved[0],
        "unsent": sum(report.steps for report in member.uncovered),
        "staleness": sum(counters.staleness.values()) / applied if applied else None,
        "rejected": sum(counters.rejected.values()),
        "rejected_updates": rejected_updates,
        "is_flushed": member.is_flushed,
        "session": member.session,
        "counters": {
            **{name: value for name, value in vars(counters).items() if isinstance(value, int)},
            "rounds": counters.rounds,
            "round_seconds": computed,
            "compute_share": computed / (computed + waited) if computed + waited else None,
        },
        "outliers": _outliers(counters),
    }


def _outliers(counters: ServerCounters) -> list[dict[str, Any]]:
    def staleness_of(rank: int) -> float:
        return counters.staleness.get(rank, 0) / (counters.applied.get(rank, 0) or 1)

    def oddness(rank: int) -> tuple[int, float]:
        return counters.rejected.get(rank, 0), staleness_of(rank)

    return [
        {
            "rank": rank,
            "rounds": counters.rounds_of(rank),
            "rejected": counters.rejected.get(rank, 0),
            "staleness": staleness_of(rank),
            "round_seconds": counters.computed[rank],
        }
        for rank in heapq.nlargest(_SHOWN, counters.computed, key=oddness)
    ]
