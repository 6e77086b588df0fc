"""This process's place among all workers: its rank, the regions, and its connections.

A site is made once, when an entry point of the Trainer has started the processes, and outlives every fit.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store

from lightning_halos.core.algorithms import Algorithm
from lightning_halos.core.topology import REGION_VARIABLE, Topology, regions_by_name
from lightning_halos.transport.collectives import Collectives
from lightning_halos.transport.groups import Groups, gather_through, noting_sockets
from lightning_halos.transport.link import MIN_PATIENCE


@dataclass(frozen=True)
class Site:
    """This process's place, and its connections.

    Attributes:
        rank: Global rank.
        size: Number of workers.
        topology: The regions and servers.
        store: The store of all processes.
        collectives: Collectives over all workers, for use when they are in step.
        groups: Process groups for links; in a simulation, of all workers.
        timeout: Limit for any wait for a peer, in seconds.
        interrupted: Called several times a second while the main thread waits; may raise.
    """

    rank: int
    size: int
    topology: Topology
    store: Store
    collectives: Collectives
    groups: Groups
    timeout: float
    interrupted: Callable[[], None]

    @property
    def here(self) -> str:
        """Name of this process's worker, for messages."""
        return self.topology.describe(self.rank)

    def make_default_group(self) -> None:
        """Makes torch's default process group, for use when all workers are in step."""
        number = self.collectives.count(f"default/{self.rank}", 1, self.timeout)
        with noting_sockets():
            dist.init_process_group(
                "gloo",
                store=PrefixStore(f"default/{number}", self.store),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=max(self.timeout, MIN_PATIENCE)),
            )

    def collectives_of_a_fit(self) -> Collectives:
        """Connects all workers for the synchronous rounds of one fit, in which waits are limited by the timeout."""
        number = self.collectives.count(f"fits/{self.rank}", 1, self.timeout)
        store = PrefixStore(f"lockstep/{number}", self.store)
        everybody = [range(self.size)]  # rounds are all-reduces over all workers
        return Collectives.connect(everybody, self.rank, store, self.interrupted, self.topology.describe, self.timeout)

    def broadcast_from_leader_(self, tensor: Tensor) -> None:
        """Overwrites a tensor on the workers of a local server with that of the server's leader."""
        if self.groups.region is None:
            return
        group = self.topology.group_of(self.rank)
        Collectives(
            [range(len(group.ranks))],
            group.ranks.index(self.rank),
            self.groups.region,
            None,
            PrefixStore(f"calls/server/{group.index}", self.store),
            self.interrupted,
            lambda rank: self.topology.describe(group.ranks[rank]),
        ).broadcast_([tensor])


def connect(
    store: Store,
    rank: int,
    size: int,
    algorithm: Algorithm,
    topology: Topology | None,
    may_be_named: bool,
    is_simulated: bool,
    timeout: float,
    interrupted: Callable[[], None],
) -> Site:
    """Connects this process with those of all other workers. All of them must call it.

    Args:
        store: The store of all processes.
        rank: Global rank of this process.
        size: Number of workers.
        algorithm: Arranges the local servers.
        topology: The regions and servers, if this process knows them.
        may_be_named: Whether processes may name their regions with ``HALOS_REGION``, which replaces ``topology``.
        is_simulated: Whether the processes simulate a cluster, all on one machine.
        timeout: Limit for any wait for a peer, in seconds.
        interrupted: Called several times a second while the main thread waits; may raise.

    Raises:
        ValueError: If only some processes name their region.
        PeerLostError: If not all processes connect in time.
    """
    if may_be_named:
        mine = os.environ.get(REGION_VARIABLE, "")
        names = gather_through(store, REGION_VARIABLE, rank, size, mine, interrupted, timeout)
        if any(names):
            topology = algorithm.arrange(*regions_by_name(names))
    assert topology is not None
    places = Topology.build([range(size)], servers_per_region=1) if is_simulated else topology
    # Other workers may have to wait while rank 0 validates the final model.
    patience = max(timeout, MIN_PATIENCE)
    collectives = Collectives.connect(
        places.regions, rank, PrefixStore("collectives", store), interrupted, topology.describe, patience
    )
    return Site(rank, size, topology, store, collectives, Groups(store, places, rank, timeout), timeout, interrupted)
