"""Durations on a described cluster, in milliseconds, by the formulas of the paper's simulator (HALoS, section 5.1).

This file has formulas only, no events and no state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations

from lightning_halos.core.layout import Layout
from lightning_halos.core.quantization import Format, nbytes
from lightning_halos.core.schedule import dynamic_local_steps
from lightning_halos.core.vector import PART
from lightning_halos.core.wire_formats import PLAIN, WireFormats
from lightning_halos.simulation.cluster import SimulatedCluster

# Tie-break as in the published simulator: rank * 1e-6 ms, so that the order of simultaneous events is defined.
_TIE = 1e-6
_FEW_REGIONS = 8  # up to this number of regions, all rings are tried


class Timing:
    """The durations on a cluster.

    Args:
        cluster: The cluster.
        message_bytes: Bytes of a message that contains a model as it is.
        plain_bytes: Bytes among them that are not parameters, and have no other format.
        itemsize: Bytes of an element of the model.
        wire: The formats in which messages between workers and servers travel.

    Attributes:
        bytes_within: Bytes of a message with a model on a link inside a region.
        bytes_between: The same on a link between regions.
        serve: Milliseconds for which a server is busy with an update. It takes one after the other.
    """

    def __init__(
        self,
        cluster: SimulatedCluster,
        message_bytes: int,
        plain_bytes: int = 0,
        itemsize: int = 4,
        wire: WireFormats = PLAIN,
    ) -> None:
        self.cluster = cluster
        self.message_bytes = message_bytes
        self._plain_bytes, self._itemsize = plain_bytes, itemsize
        self.bytes_within, self.bytes_between = self._in_format(wire.within), self._in_format(wire.between)
        self._speeds = cluster.relative_speeds
        self._regions = cluster.region_of
        speed = cluster.server_gigabytes_per_second
        self.serve = 0.0 if speed is None else message_bytes / (speed * 1e9) * 1e3

    @classmethod
    def of(cls, cluster: SimulatedCluster, layout: Layout, itemsize: int) -> Timing:
        """Returns the durations on a cluster for a model's vector, unless the cluster says another size.

        Args:
            cluster: The cluster.
            layout: The vector's.
            itemsize: Bytes of an element.
        """
        size = cluster.message_bytes or layout.elements * itemsize
        plain = size * (layout.elements - layout.parameters) // layout.elements
        return cls(cluster, size, plain, itemsize)

    def on(self, wire: WireFormats) -> Timing:
        """Returns the durations if messages travel in other formats."""
        return Timing(self.cluster, self.message_bytes, self._plain_bytes, self._itemsize, wire)

    def _in_format(self, form: Format) -> int:
        if form == "float32":
            return self.message_bytes
        parameters = -(-(self.message_bytes - self._plain_bytes) // self._itemsize)
        return nbytes(parameters, form, self._itemsize) + self._plain_bytes

    def local_steps(self, local_steps: int, dynamic: bool) -> list[int]:
        """Returns the local steps per round of each worker, by rank. The fastest has ``local_steps``."""
        return [dynamic_local_steps(local_steps, speed, 1.0) if dynamic else local_steps for speed in self._speeds]

    def transfer(self, source: int, target: int) -> float:
        """Returns the milliseconds that a message takes from one region to another: ``bits / bandwidth``."""
        return self._milliseconds(self.bytes_within if source == target else self.bytes_between, source, target)

    def _milliseconds(self, size: int, source: int, target: int) -> float:
        return size * 8 / (self.cluster.bandwidths[source][target] * 1e9) * 1e3

    def compute(self, worker: int, steps: int) -> float:
        """Returns the milliseconds that ``steps`` local steps of a worker take."""
        return self.cluster.step_ms * steps / self._speeds[worker]

    def way(self, worker: int, server_region: int) -> float:
        """Returns the milliseconds of a model between a worker and its server, in one direction."""
        return self.transfer(server_region, self._regions[worker])

    def busy(self, worker: int, steps: int) -> float:
        """Returns the milliseconds from the start of a round until its push may leave the worker."""
        return self.compute(worker, steps) + worker * _TIE

    def round(self, worker: int, server_region: int, steps: int) -> float:
        """Returns the milliseconds of a round: from sending the server's model until the pseudo-gradient arrives."""
        there_and_back = 2 * self.way(worker, server_region)
        return there_and_back + self.compute(worker, steps) + worker * _TIE

    def all_reduce(self) -> float:
        """Returns the milliseconds of an all-reduce over all workers, of the cluster's kind."""
        return self._ring() if self.cluster.all_reduce == "ring" else self._star()

    def _ring(self) -> float:
        """A ring over n workers: ``2 (n - 1) / n * bits / ring_bandwidth``."""
        workers = self.cluster.num_workers
        bits = self.message_bytes * 8
        return (2 * (workers - 1) * (bits / workers)) / (self.ring_bandwidth() * 1e9) * 1e3

    def _star(self) -> float:
        """A star: from workers to the leader of their region, from leaders to that of the global region, and back.

        Models move in parts, in all links at once. So the slowest link decides for models of many parts, and the sum of
        all links on the way for a model of a single part. A leader's connection with its region carries the models of
        all its workers; that of the global region carries those of the other regions, too.
        """
        cluster, home = self.cluster, self.cluster.global_region
        size = self.message_bytes  # an all-reduce has models as they are
        others = [region for region in range(len(cluster.regions)) if region != home]
        inside = [
            (len(ranks) - 1 + (len(others) if region == home else 0)) * self._milliseconds(size, region, region)
            for region, ranks in enumerate(cluster.regions)
        ]
        up = max((self._milliseconds(size, region, home) for region in others), default=0.0)
        down = max((self._milliseconds(size, home, region) for region in others), default=0.0)
        parts = math.ceil(size / (4 * PART))
        slowest = max(up, down, *inside)
        return slowest + (2 * max(inside) + up + down - slowest) / parts

    def ring_bandwidth(self) -> float:
        """Returns the Gbit/s of the slowest link of the best ring over all workers.

        It goes through the regions one after the other, and over the link inside each region of several workers. With
        more than 8 regions this is an upper bound, which favors algorithms with an all-reduce. A ring reaches it, or
        nearly, unless the links are chosen to prevent that.
        """
        table = self.cluster.bandwidths
        inside = [table[region][region] for region, ranks in enumerate(self.cluster.regions) if len(ranks) > 1]
        return min([_ring_between(table), *inside])


def _ring_between(table: Sequence[Sequence[float]]) -> float:
    """Returns the slowest link of the best ring over the regions, or a bound of it."""
    regions = len(table)
    if regions > _FEW_REGIONS:
        return _bound_of_rings(table)
    rings = ((0, *rest) for rest in permutations(range(1, regions)))
    return max(min(table[a][b] for a, b in zip(ring, (*ring[1:], ring[0]), strict=True)) for ring in rings)


def _bound_of_rings(table: Sequence[Sequence[float]]) -> float:
    """Returns an upper bound of the slowest link of a ring: a ring enters and leaves each region, by two others."""
    regions = range(len(table))
    bounds = []
    for region in regions:
        others = [other for other in regions if other != region]
        incoming = sorted(others, key=lambda other: table[other][region])[-2:]
        outgoing = sorted(others, key=lambda other: table[region][other])[-2:]
        pairs = [(a, b) for a in incoming for b in outgoing if a != b]
        bounds.append(max(min(table[a][region], table[region][b]) for a, b in pairs))
    return min(bounds)
