"""This process among those of all workers: its rank, the regions, and its connections.

All of it is made once, when an entry point of the Trainer has started the processes, and outlives every fit.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from torch import Tensor
from torch.distributed import PrefixStore, Store

from lightning_halos.core.algorithms import Algorithm
from lightning_halos.core.topology import REGION_VARIABLE, Topology, regions_by_name
from lightning_halos.transport.collectives import Collectives
from lightning_halos.transport.groups import Groups, gather_through, noting_sockets, open_store
from lightning_halos.transport.link import AT_THE_EDGES


@dataclass(frozen=True)
class Site:
    """This process's place, and its connections.

    Attributes:
        rank: Global rank.
        size: Number of workers.
        topology: Which worker is in which region.
        store: The store of all processes.
        collectives: Collectives over all workers, for when they are in step.
        groups: Process groups for links; in a simulation, of all workers.
        timeout: Seconds that any wait for a peer may last.
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
        """Names this process's worker, for messages."""
        return self.topology.describe(self.rank)

    def make_default_group(self) -> None:
        """Makes the default process group of torch, for when all workers are in step."""
        number = self.collectives.count(f"default/{self.rank}", 1, self.timeout)
        with noting_sockets():
            dist.init_process_group(
                "gloo",
                store=PrefixStore(f"default/{number}", self.store),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=max(self.timeout, AT_THE_EDGES)),
            )

    def collectives_of_a_fit(self) -> Collectives:
        """Connects all workers for the rounds of one fit, in which nobody waits longer than the timeout."""
        number = self.collectives.count(f"fits/{self.rank}", 1, self.timeout)
        store = PrefixStore(f"lockstep/{number}", self.store)
        everybody = [range(self.size)]  # rounds are all-reduces among all workers
        return Collectives.connect(everybody, self.rank, store, self.interrupted, self.topology.describe, self.timeout)

    def broadcast_from_leader_(self, tensor: Tensor) -> None:
        """Copies a tensor of the process that hosts a local server to the server's other workers, in place."""
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
    environment: ClusterEnvironment,
    rank: int,
    size: int,
    algorithm: Algorithm,
    topology: Topology | None,
    may_be_named: bool,
    is_simulated: bool,
    timeout: float,
    interrupted: Callable[[], None],
) -> Site:
    """Connects this process with those of all other workers. To be called by all of them.

    Args:
        environment: Where the store is.
        rank: Global rank of this process.
        size: Number of workers.
        algorithm: Decides which local servers there are.
        topology: Which worker is in which region, as far as this process knows.
        may_be_named: Whether processes may name their regions instead, with ``HALOS_REGION``.
        is_simulated: Whether the processes simulate a cluster, all on one machine.
        timeout: Seconds that any wait for a peer may last.
        interrupted: Called several times a second while the main thread waits; may raise.

    Raises:
        ValueError: If only some processes name their region.
        PeerLostError: If not all processes come in time.
    """
    store = open_store(environment.main_address, environment.main_port, rank, size, timeout)
    if may_be_named:
        mine = os.environ.get(REGION_VARIABLE, "")
        names = gather_through(store, REGION_VARIABLE, rank, size, mine, interrupted, timeout)
        if any(names):
            topology = algorithm.arrange(*regions_by_name(names))
    assert topology is not None
    places = Topology.build([range(size)], servers_per_region=1) if is_simulated else topology
    # Rank 0 may validate the final model while the others wait for it.
    patience = max(timeout, AT_THE_EDGES)
    collectives = Collectives.connect(
        places.regions, rank, PrefixStore("collectives", store), interrupted, topology.describe, patience
    )
    return Site(rank, size, topology, store, collectives, Groups(store, places, rank, timeout), timeout, interrupted)
