"""Counters for monitoring, collected on the global node from the reports of the local servers. They decide nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_halos.core.messages import Progress


@dataclass
class ServerCounters:
    """Counters of a local server and its workers.

    Attributes:
        updates: Pushes applied.
        merges: Global models merged.
        staleness_sum: Sum over applied pushes of the versions between pull and push.
        staleness_max: Largest staleness of an applied push.
        bytes_within_regions: Bytes on links inside the region.
        bytes_between_regions: Bytes on links to another region.
        computed: Seconds that each worker spent computing, by rank.
        waited: Seconds that each worker waited for the server, by rank.
        rejected: Rejected pushes of each worker that has any, by rank.
    """

    updates: int = 0
    merges: int = 0
    staleness_sum: int = 0
    staleness_max: int = 0
    bytes_within_regions: int = 0
    bytes_between_regions: int = 0
    computed: dict[int, float] = field(default_factory=dict)
    waited: dict[int, float] = field(default_factory=dict)
    rejected: dict[int, int] = field(default_factory=dict)

    def add(self, report: Progress) -> None:
        """Adds the numbers of a report."""
        self.updates, self.merges = report.updates, report.merges
        self.staleness_sum += report.staleness or 0
        self.staleness_max = max(self.staleness_max, report.staleness or 0)
        self.bytes_within_regions = report.bytes_within_regions
        self.bytes_between_regions = report.bytes_between_regions
        self.computed[report.worker] = self.computed.get(report.worker, 0.0) + report.seconds
        self.waited[report.worker] = self.waited.get(report.worker, 0.0) + report.waited
        if report.rejected:
            self.rejected[report.worker] = report.rejected

    def statistics(self) -> dict[str, Any]:
        """Returns the counters by the names that :class:`~lightning_halos.HalosMonitor` shows."""
        shares = {
            str(rank): seconds / ((seconds + self.waited[rank]) or 1.0) for rank, seconds in self.computed.items()
        }
        return {
            "updates": self.updates,
            "rejected": sum(self.rejected.values()),
            "rejected_of": {str(rank): count for rank, count in self.rejected.items()},
            "merges": self.merges,
            "staleness_sum": self.staleness_sum,
            "staleness_max": self.staleness_max,
            "bytes_within_regions": self.bytes_within_regions,
            "bytes_between_regions": self.bytes_between_regions,
            "round_seconds": sum(self.computed.values()),
            "compute_share": shares,
        }
