"""Durations on a described cluster, in milliseconds, by the formulas of the paper's simulator (HALoS, section 5.1).

This file has formulas only, no events and no state.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

from lightning_halos.core.schedule import dynamic_local_steps
from lightning_halos.simulation.cluster import SimulatedCluster

# Tie-break as in the published simulator: rank * 1e-6 ms, so that the order of simultaneous events is defined.
_TIE = 1e-6
_FEW_REGIONS = 8  # up to this number of regions, all rings are tried
_EFFORT = 100  # largest number of steps of a search, per region


class Timing:
    """The durations on a cluster.

    Args:
        cluster: The cluster.
        message_bytes: Size of a message that contains a model.
    """

    def __init__(self, cluster: SimulatedCluster, message_bytes: int) -> None:
        self.cluster = cluster
        self.message_bytes = message_bytes
        self._speeds = cluster.relative_speeds
        self._regions = cluster.region_of

    def local_steps(self, local_steps: int, dynamic: bool) -> list[int]:
        """Returns the local steps per round of each worker, by rank.

        Args:
            local_steps: Local steps of the fastest worker (``H``).
            dynamic: Whether slower workers run fewer local steps.
        """
        return [dynamic_local_steps(local_steps, speed, 1.0) if dynamic else local_steps for speed in self._speeds]

    def transfer(self, source: int, target: int) -> float:
        """Returns the milliseconds that a message takes from one region to another: ``bits / bandwidth``."""
        return self.message_bytes * 8 / (self.cluster.bandwidths[source][target] * 1e9) * 1e3

    def compute(self, worker: int, steps: int) -> float:
        """Returns the milliseconds that ``steps`` local steps of a worker take."""
        return self.cluster.step_ms * steps / self._speeds[worker]

    def round(self, worker: int, server_region: int, steps: int) -> float:
        """Returns the milliseconds of a round: from sending the server's model until the pseudo-gradient arrives."""
        there_and_back = 2 * self.transfer(server_region, self._regions[worker])
        return there_and_back + self.compute(worker, steps) + worker * _TIE

    def all_reduce(self) -> float:
        """Returns the milliseconds of a ring all-reduce over n workers: ``2 (n - 1) / n * bits / ring_bandwidth``."""
        workers = self.cluster.num_workers
        bits = self.message_bytes * 8
        return (2 * (workers - 1) * (bits / workers)) / (self.ring_bandwidth() * 1e9) * 1e3

    def ring_bandwidth(self) -> float:
        """Returns the Gbit/s of the slowest link of the best ring over the regions; of the network of a single region.

        With more than 8 regions a limited search finds the ring, so a better one may exist.
        """
        table = self.cluster.bandwidths
        regions = len(table)
        if regions > _FEW_REGIONS:
            return _search_ring(table)
        rings = ((0, *rest) for rest in permutations(range(1, regions)))
        return max(min(table[a][b] for a, b in zip(ring, (*ring[1:], ring[0]), strict=True)) for ring in rings)


def _search_ring(table: Sequence[Sequence[float]]) -> float:
    """Finds the largest bandwidth with a ring of links that are at least as fast, by bisection."""
    import numpy as np

    links = np.array(table)
    np.fill_diagonal(links, 0.0)  # a link of a ring connects two different regions
    candidates = np.unique(links[links > 0])
    found, missed = 0, len(candidates)
    while missed - found > 1:
        middle = (found + missed) // 2
        if _has_ring((links >= candidates[middle]).tolist()):
            found = middle
        else:
            missed = middle
    return float(candidates[found])


def _has_ring(usable: list[list[bool]]) -> bool:
    """Returns whether a limited depth-first search finds a ring of usable links.

    It tries the hardest region first: the one with the fewest usable links to and from the remaining regions.
    """
    regions = range(len(usable))
    after = [{b for b in regions if usable[a][b]} for a in regions]
    before = [{a for a in regions if usable[a][b]} for b in regions]
    left = set(regions[1:])

    def hardest_last(region: int) -> list[int]:
        return sorted(after[region] & left, key=lambda b: len(before[b] & left) + len(after[b] & left), reverse=True)

    path, untried = [0], [hardest_last(0)]
    effort = _EFFORT * len(usable)
    while path:
        if not left and 0 in after[path[-1]]:
            return True
        if not untried[-1]:
            untried.pop()
            left.add(path.pop())
        elif effort:
            effort -= 1
            path.append(untried[-1].pop())
            left.remove(path[-1])
            untried.append(hardest_last(path[-1]))
        else:
            return False
    return False
