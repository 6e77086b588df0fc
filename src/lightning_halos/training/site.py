"""This process's place among all processes and workers, and its connections.

A site is made once, when an entry point of the Trainer has started the processes, and outlives every fit.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Sequence
from functools import cached_property

from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroup, Store

from lightning_halos.core.placement import Placement
from lightning_halos.core.topology import REGION_VARIABLE, Topology
from lightning_halos.transport.collectives import Collectives
from lightning_halos.transport.groups import Groups, gather_through
from lightning_halos.transport.link import MIN_PATIENCE


class Site:
    """This process's place, and its connections. Making it connects all processes, so all of them must do so.

    A worker has one or more processes. The processes with the same lane, one of each worker, carry the same slice of
    the model, and have servers and links of their own.

    Args:
        store: The store of all processes.
        process: Global rank of this process.
        placement: The processes of each worker.
        topology: The regions and servers of the workers.
        one_machine: Whether all processes are on one machine, to simulate the regions.
        timeout: Limit for any wait for a peer, in seconds.
        interrupted: Called several times a second while the main thread waits; may raise.

    Attributes:
        rank: Index of this process's worker.
        size: Number of workers.
        process: Global rank of this process.
        processes: Number of processes of all workers.
        lane: Number of this process inside its worker.
        lanes: Number of slices of the model. If the lane is not below it, this process carries none.
        patience: Limit for a wait before and after training, in seconds.
        collectives: Collectives over all processes, for use when they are in step.
        inner_group: torch's own process group of this worker's processes, for the strategy inside the worker; ``None``
            without one.

    Raises:
        PeerLostError: If not all processes connect in time.
    """

    def __init__(
        self,
        store: Store,
        process: int,
        placement: Placement,
        topology: Topology,
        one_machine: bool,
        timeout: float,
        interrupted: Callable[[], None],
    ) -> None:
        self.placement = placement
        self.process, self.processes = process, placement.processes
        self.rank, self.size = placement.worker_of(process), len(placement.workers)
        self.lane, self.lanes = placement.lane_of(process), placement.lanes
        self.topology = topology if placement.is_single else dataclasses.replace(topology, noun="worker")
        self.timeout = timeout
        self.interrupted = interrupted
        self.store = store
        self.inner_group: ProcessGroup | None = None
        self._among: dict[tuple[int, ...], Collectives] = {}
        self._numbers = itertools.count()  # of what is made later, in the same order on all processes
        self._numbers_of_lane = itertools.count()  # the same, on all processes of this lane
        self._numbers_of_worker = itertools.count()  # the same, on all lanes of this worker
        places = Topology.build([range(self.size)], servers_per_region=1) if one_machine else topology
        # Other workers may have to wait while rank 0 validates the final model.
        self.patience = max(timeout, MIN_PATIENCE)
        self._regions = [group.ranks for group in places.groups]
        self._regions_of_processes = [placement.expand(ranks) for ranks in self._regions]
        self.collectives = self._connect_processes("collectives", self._regions_of_processes, self.patience)
        self._lane_store = store if self.lane == 0 else PrefixStore(f"lane/{self.lane}", store)
        self._groups: Groups | None = None
        if self.carries:
            self._groups = Groups(store, places, self.rank, timeout, interrupted, self.lane, self.lanes)

    @property
    def here(self) -> str:
        """Name of this process, for messages."""
        return self.describe(self.process)

    def describe(self, process: int) -> str:
        """Name of a process, for messages."""
        worker = self.topology.describe(self.placement.worker_of(process))
        return worker if self.placement.is_single else f"rank {process} of {worker}"

    def describe_lane(self, worker: int, lane: int) -> str:
        """Name of the process that carries a lane of a worker, for messages."""
        return self.describe(self.placement.workers[worker][lane])

    @property
    def carries(self) -> bool:
        """Whether this process carries a slice of the model."""
        return self.lane < self.lanes

    @property
    def worker_processes(self) -> tuple[int, ...]:
        """Global ranks of the processes of this worker."""
        return self.placement.workers[self.rank]

    def stand_in(self, process: int) -> int:
        """Returns the process of this worker that stands for any process: itself, or the one with its lane."""
        return self.placement.in_place_of(process, self.rank)

    @property
    def groups(self) -> Groups:
        """Pairs of processes of this lane for links; on one machine, of the first worker with each other one."""
        assert self._groups is not None, f"{self.here} carries no slice"
        return self._groups

    # ------------------------------------------------------------------ collectives

    @cached_property
    def lane_collectives(self) -> Collectives:
        """Collectives over the processes of this lane, by worker, when all are in step. The first use connects them."""
        if self.placement.is_single:
            return self.collectives
        return self._connect_lane("lane collectives", self._regions, self.patience)

    @property
    def worker_collectives(self) -> Collectives:
        """Collectives over the processes of this worker, which are always in step. The first use connects them.

        Their ranks are the lanes.
        """
        return self.collectives_among(self.worker_processes)

    def collectives_among(self, ranks: tuple[int, ...]) -> Collectives:
        """Returns collectives over some processes, when they are in step. Their first call connects them."""
        if ranks == tuple(range(self.processes)):
            return self.collectives
        if ranks not in self._among:
            regions = [[ranks.index(p) for p in region if p in ranks] for region in self._regions_of_processes]
            self._among[ranks] = Collectives(
                regions,
                ranks.index(self.process),
                PrefixStore(f"among/{'-'.join(map(str, ranks))}", self.store),
                self.interrupted,
                lambda index: self.describe(ranks[index]),
                self.patience,
            )
        return self._among[ranks]

    def store_of_a_fit(self) -> Store:
        """Returns a store that all processes share, with the names of one fit. All processes must call this."""
        return PrefixStore(f"fit/{next(self._numbers)}", self.store)

    def collectives_of_a_fit(self) -> Collectives:
        """Connects this lane for the synchronous rounds of one fit, in which waits are limited by the timeout."""
        return self._connect_lane(f"collectives/{next(self._numbers_of_lane)}", self._regions, self.timeout)

    def collectives_of_lanes(self) -> Collectives:
        """Connects the lanes of this worker, all of which must call this, for another thread than the main one."""
        lanes = self.worker_processes[: self.lanes]
        store = PrefixStore(f"lanes/{self.rank}/{next(self._numbers_of_worker)}", self.store)
        return Collectives(
            [range(self.lanes)],
            self.lane,
            store,
            self.interrupted,
            lambda lane: self.describe(lanes[lane]),
            self.patience,
        )

    def broadcast_from_leader_(self, tensor: Tensor) -> None:
        """Overwrites a tensor of this lane on the workers of each local server with that of the server's leader."""
        group = self.topology.group_of(self.rank)
        name = f"collectives/{next(self._numbers_of_lane)}/{group.leader}"
        self._connect_lane(name, [group.ranks], self.timeout).broadcast_([tensor], group.leader)

    def _connect_processes(self, name: str, regions: Sequence[Sequence[int]], timeout: float) -> Collectives:
        """Connects the processes of some regions, all of which must call this."""
        store = PrefixStore(name, self.store)
        return Collectives(regions, self.process, store, self.interrupted, self.describe, timeout)

    def _connect_lane(self, name: str, regions: Sequence[Sequence[int]], timeout: float) -> Collectives:
        """Connects the processes of this lane in some regions, all of which must call this."""
        store, describe = PrefixStore(name, self._lane_store), self.topology.describe
        return Collectives(regions, self.rank, store, self.interrupted, describe, timeout)


def gather_places(
    store: Store, rank: int, size: int, node: int, timeout: float, interrupted: Callable[[], None]
) -> tuple[list[int], list[str]]:
    """Returns the number of each process's node and the value of its ``HALOS_REGION``, by rank; empty if it has none.

    All processes must call it.

    Args:
        store: The store of all processes.
        rank: Global rank of this process.
        size: Number of processes.
        node: Number of this process's node.
        timeout: Limit for the wait, in seconds.
        interrupted: Called several times a second while waiting; may raise.

    Raises:
        PeerLostError: If not all processes connect in time.
    """
    place = f"{node} {os.environ.get(REGION_VARIABLE, '')}"
    places = gather_through(store, REGION_VARIABLE, rank, size, place, interrupted, timeout)
    numbers, _, names = zip(*(place.partition(" ") for place in places), strict=True)
    return [int(number) for number in numbers], list(names)
