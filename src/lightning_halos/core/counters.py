"""Counters for monitoring, collected on the global node from the reports of the local servers. They decide nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_halos.core.messages import Progress


@dataclass
class ServerCounters:
    """Counters of a local server and its workers."""

    updates: int = 0  # pushes applied
    merges: int = 0  # global models merged
    staleness_sum: int = 0  # over applied pushes: the versions between pull and push
    staleness_max: int = 0
    bytes_within_regions: int = 0  # on links inside the region
    bytes_between_regions: int = 0  # on links to another region
    computed: dict[int, float] = field(default_factory=dict)  # seconds that each worker spent computing, by rank
    waited: dict[int, float] = field(default_factory=dict)  # seconds that each worker waited for the server, by rank
    rejected: dict[int, int] = field(default_factory=dict)  # rejected pushes of each worker that has any, by rank

    def add(self, report: Progress) -> None:
        """Adds the numbers of a report."""
        worker, staleness = report.worker, report.staleness or 0
        self.updates, self.merges = report.updates, report.merges
        self.staleness_sum += staleness
        self.staleness_max = max(self.staleness_max, staleness)
        self.bytes_within_regions = report.bytes_within_regions
        self.bytes_between_regions = report.bytes_between_regions
        self.computed[worker] = self.computed.get(worker, 0.0) + report.seconds
        self.waited[worker] = self.waited.get(worker, 0.0) + report.waited
        if report.rejected:
            self.rejected[worker] = report.rejected

    def statistics(self) -> dict[str, Any]:
        """Returns the counters by the names that :class:`~lightning_halos.HalosMonitor` shows."""
        of_workers = ("computed", "waited", "rejected")
        return {
            **{name: value for name, value in vars(self).items() if name not in of_workers},
            "rejected": sum(self.rejected.values()),
            "rejected_of": {str(rank): count for rank, count in self.rejected.items()},
            "round_seconds": sum(self.computed.values()),
            "compute_share": {
                str(rank): seconds / ((seconds + self.waited[rank]) or 1.0) for rank, seconds in self.computed.items()
            },
        }
