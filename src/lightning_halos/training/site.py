"""This process's place among all workers: its rank, the regions, and its connections.

A site is made once, when an entry point of the Trainer has started the processes, and outlives every fit.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.distributed import PrefixStore, Store

from lightning_halos.core.topology import REGION_VARIABLE, Topology, regions_by_place
from lightning_halos.transport.collectives import Collectives
from lightning_halos.transport.groups import Groups, gather_through
from lightning_halos.transport.link import MIN_PATIENCE


class Site:
    """This process's place, and its connections. Making it connects all processes, so all of them must do so.

    Args:
        store: The store of all processes.
        rank: Global rank of this process.
        size: Number of workers.
        topology: The regions and servers.
        one_machine: Whether all processes are on one machine, to simulate the regions.
        timeout: Limit for any wait for a peer, in seconds.
        interrupted: Called several times a second while the main thread waits; may raise.

    Attributes:
        patience: Limit for a wait before and after training, in seconds.
        collectives: Collectives over all workers, for use when they are in step.
        groups: Pairs of processes for links; on one machine, of rank 0 with each other worker.

    Raises:
        PeerLostError: If not all processes connect in time.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        topology: Topology,
        one_machine: bool,
        timeout: float,
        interrupted: Callable[[], None],
    ) -> None:
        self.rank = rank
        self.size = size
        self.topology = topology
        self.timeout = timeout
        self.interrupted = interrupted
        self.store = store
        self._among: dict[tuple[int, ...], Collectives] = {}
        self._numbers = itertools.count()  # of groups that are made later, in the same order on all processes
        places = Topology.build([range(size)], servers_per_region=1) if one_machine else topology
        # Other workers may have to wait while rank 0 validates the final model.
        self.patience = max(timeout, MIN_PATIENCE)
        self._regions = [group.ranks for group in places.groups]
        self.collectives = self._connect("collectives", self._regions, self.patience)
        self.groups = Groups(self.store, places, rank, timeout, interrupted)

    @property
    def here(self) -> str:
        """Name of this process's worker, for messages."""
        return self.topology.describe(self.rank)

    def collectives_among(self, ranks: tuple[int, ...]) -> Collectives:
        """Returns collectives over some workers, for use when they are in step. Their first call connects them."""
        if ranks == tuple(range(self.size)):
            return self.collectives
        if ranks not in self._among:
            self._among[ranks] = Collectives(
                [[ranks.index(rank) for rank in region if rank in ranks] for region in self._regions],
                ranks.index(self.rank),
                PrefixStore(f"among/{'-'.join(map(str, ranks))}", self.store),
                self.interrupted,
                lambda index: self.topology.describe(ranks[index]),
                self.patience,
            )
        return self._among[ranks]

    def store_of_a_fit(self) -> Store:
        """Returns a store that all processes share, with the names of one fit. All processes must call this."""
        return PrefixStore(f"fit/{next(self._numbers)}", self.store)

    def collectives_of_a_fit(self) -> Collectives:
        """Connects all workers for the synchronous rounds of one fit, in which waits are limited by the timeout."""
        return self._connect(f"collectives/{next(self._numbers)}", self._regions, self.timeout)

    def broadcast_from_leader_(self, tensor: Tensor) -> None:
        """Overwrites a tensor on the workers of each local server with that of the server's leader."""
        group = self.topology.group_of(self.rank)
        name = f"collectives/{next(self._numbers)}/{group.leader}"
        self._connect(name, [group.ranks], self.timeout).broadcast_([tensor], group.leader)

    def _connect(self, name: str, regions: Sequence[Sequence[int]], timeout: float) -> Collectives:
        """Connects the workers of some regions, all of which must call this."""
        store, describe = PrefixStore(name, self.store), self.topology.describe
        return Collectives(regions, self.rank, store, self.interrupted, describe, timeout)


def regions_of_processes(
    store: Store, rank: int, size: int, node: int, timeout: float, interrupted: Callable[[], None]
) -> tuple[list[list[int]], list[str]]:
    """Returns the ranks and the name of each region, by what each process says of its own place.

    All processes must call it.

    Args:
        store: The store of all processes.
        rank: Global rank of this process.
        size: Number of processes.
        node: Number of this process's node.
        timeout: Limit for the wait, in seconds.
        interrupted: Called several times a second while waiting; may raise.

    Raises:
        ValueError: If only some processes name their region with ``HALOS_REGION``.
        PeerLostError: If not all processes connect in time.
    """
    place = f"{node} {os.environ.get(REGION_VARIABLE, '')}"
    places = gather_through(store, REGION_VARIABLE, rank, size, place, interrupted, timeout)
    nodes, _, names = zip(*(place.partition(" ") for place in places), strict=True)
    return regions_by_place(names, [int(node) for node in nodes])
