"""Counters for monitoring, collected on the global node from the reports of the local servers. They decide nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_halos.core.messages import Progress


@dataclass
class ServerCounters:
    """Counters of a local server, and of each of its workers by rank."""

    updates: int = 0  # pushes applied
    merges: int = 0  # global models merged
    staleness_max: int = 0
    bytes_within_regions: int = 0  # on links inside the region
    bytes_between_regions: int = 0  # on links to another region
    applied: dict[int, int] = field(default_factory=dict)  # applied pushes
    staleness: dict[int, int] = field(default_factory=dict)  # over applied pushes: the versions between pull and push
    computed: dict[int, float] = field(default_factory=dict)  # seconds spent computing
    waited: dict[int, float] = field(default_factory=dict)  # seconds waited for the server
    rejected: dict[int, int] = field(default_factory=dict)  # rejected pushes, of each worker that has any

    def add(self, report: Progress) -> None:
        """Adds the numbers of a report."""
        worker = report.worker
        self.updates, self.merges = report.updates, report.merges
        self.bytes_within_regions = report.bytes_within_regions
        self.bytes_between_regions = report.bytes_between_regions
        if report.staleness is not None:
            self.applied[worker] = self.applied.get(worker, 0) + 1
            self.staleness[worker] = self.staleness.get(worker, 0) + report.staleness
            self.staleness_max = max(self.staleness_max, report.staleness)
        self.computed[worker] = self.computed.get(worker, 0.0) + report.seconds
        self.waited[worker] = self.waited.get(worker, 0.0) + report.waited
        if report.rejected:
            self.rejected[worker] = report.rejected

    def rounds_of(self, worker: int) -> int:
        """Number of a worker's pushes."""
        return self.applied.get(worker, 0) + self.rejected.get(worker, 0)

    @property
    def rounds(self) -> int:
        """Number of all workers' pushes."""
        return sum(self.applied.values()) + sum(self.rejected.values())

    def statistics(self) -> dict[str, Any]:
        """Returns what :class:`~lightning_halos.HalosMonitor` shows. Numbers of workers are by rank."""
        return {
            **{name: value for name, value in vars(self).items() if isinstance(value, int)},
            "rejected": sum(self.rejected.values()),
            "staleness_sum": sum(self.staleness.values()),
            "round_seconds": sum(self.computed.values()),
            "rounds": {rank: self.rounds_of(rank) for rank in self.computed},
            "staleness_of": {rank: total / self.applied[rank] for rank, total in self.staleness.items()},
            "rejected_of": dict(self.rejected),
            "compute_share": {
                rank: seconds / ((seconds + self.waited[rank]) or 1.0) for rank, seconds in self.computed.items()
            },
        }
