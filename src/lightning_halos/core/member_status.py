"""The state of a member as plain values, for people. It decides nothing."""

from __future__ import annotations

from typing import Any

from lightning_halos.core.membership import Member


def status_of(member: Member, rejected_updates: int) -> dict[str, Any]:
    """Returns the state of a member.

    Args:
        member: The member.
        rejected_updates: Number of its updates that the global server has rejected.
    """
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
        "rejected_updates": rejected_updates,
        "is_flushed": member.is_flushed,
        "session": member.session,
        "counters": counters,
    }
