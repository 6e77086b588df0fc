"""How long things take on a described cluster.

Rules of this room: formulas only, in milliseconds; no events, no state. The formulas are those of the paper's
simulator (HALoS, section 5.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

from lightning_halos.core.schedule import dynamic_local_steps
from lightning_halos.simulation.cluster import SimulatedCluster

# A worker's rank shifts the end of its rounds by less than anybody can measure, so that no two ever end together.
_TIE = 1e-6
_FEW_REGIONS = 8  # up to so many, every ring is tried
_EFFORT = 100  # steps of a search, per region


class Timing:
    """The durations on a cluster.

    Args:
        cluster: The cluster.
        message_bytes: Bytes of one message with a model in it.
    """

    def __init__(self, cluster: SimulatedCluster, message_bytes: int) -> None:
        self.cluster = cluster
        self.message_bytes = message_bytes
        self._speeds = cluster.relative_speeds
        self._regions = cluster.region_of

    def local_steps(self, local_steps: int, dynamic: bool) -> list[int]:
        """Local steps of a round of each worker, by rank.

        Args:
            local_steps: Those of the fastest worker (``H``).
            dynamic: Whether slower workers run fewer.
        """
        return [dynamic_local_steps(local_steps, speed, 1.0) if dynamic else local_steps for speed in self._speeds]

    def transfer(self, source: int, target: int) -> float:
        """Of one message from a region to a region: ``bits / bandwidth``."""
        return self.message_bytes * 8 / (self.cluster.bandwidths[source][target] * 1e9) * 1e3

    def compute(self, worker: int, steps: int) -> float:
        """Of so many local steps of a worker."""
        return self.cluster.step_ms * steps / self._speeds[worker]

    def round(self, worker: int, server_region: int, steps: int) -> float:
        """From a server's model being sent to a worker until its pseudo-gradient is there."""
        there_and_back = 2 * self.transfer(server_region, self._regions[worker])
        return there_and_back + self.compute(worker, steps) + worker * _TIE

    def all_reduce(self) -> float:
        """Of a ring all-reduce over all workers: ``2 (n - 1) / n * bits / slowest link of the best ring``."""
        workers = self.cluster.num_workers
        bits = self.message_bytes * 8
        return (2 * (workers - 1) * (bits / workers)) / (self.ring_bandwidth() * 1e9) * 1e3

    def ring_bandwidth(self) -> float:
        """Gbit/s of the slowest link of the best ring over the regions; in a single region, of its own network.

        For more than a handful of regions it is the best that a search finds, which may be below the best there is.
        """
        table = self.cluster.bandwidths
        regions = len(table)
        if regions > _FEW_REGIONS:
            return _search_ring(table)
        rings = ((0, *rest) for rest in permutations(range(1, regions)))
        return max(min(table[a][b] for a, b in zip(ring, (*ring[1:], ring[0]), strict=True)) for ring in rings)


def _search_ring(table: Sequence[Sequence[float]]) -> float:
    """Halves the range of bandwidths until it has the most with which a ring of no slower links is found."""
    import numpy as np

    links = np.array(table)
    np.fill_diagonal(links, 0.0)  # a ring goes from each region to another
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
    """Whether a ring of usable links is found, by trying first the regions that are the hardest to reach later on."""
    regions = range(len(usable))
    after = [{b for b in regions if usable[a][b]} for a in regions]
    before = [{a for a in regions if usable[a][b]} for b in regions]
    left = set(regions[1:])

    def easiest_first(region: int) -> list[int]:
        return sorted(after[region] & left, key=lambda b: len(before[b] & left) + len(after[b] & left), reverse=True)

    path, untried = [0], [easiest_first(0)]
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
            untried.append(easiest_first(path[-1]))
        else:
            return False
    return False
