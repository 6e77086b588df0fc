"""Regions, ranks, and the processes that host servers.

It deals with ranks and names only. It checks everything that a user can get wrong about regions, with errors that say
what to do.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

REGION_VARIABLE = "HALOS_REGION"


@dataclass(frozen=True)
class ServerGroup:
    """A local server and its workers."""

    index: int  # of the local server among all local servers
    region: int  # index of its region
    ranks: tuple[int, ...]  # global ranks of its workers, ascending

    @property
    def leader(self) -> int:
        """Global rank of the process that hosts the local server."""
        return self.ranks[0]


@dataclass(frozen=True)
class Topology:
    """The region of each worker, and the process that hosts each server.

    The lowest rank of a server group hosts its local server; rank 0 also hosts the global server.

    Attributes:
        names: Names of the regions, by index.
        regions: Global ranks of the workers of each region, ascending.
        groups: The local servers and their workers, ordered by their lowest ranks.
        noun: What :meth:`describe` calls a worker: by its rank, which is that of its process, unless it has several.
    """

    names: tuple[str, ...]
    regions: tuple[tuple[int, ...], ...]
    groups: tuple[ServerGroup, ...]
    noun: str = "rank"

    @classmethod
    def build(
        cls, regions: Sequence[Sequence[int]], servers_per_region: int | Sequence[int], names: Sequence[str] = ()
    ) -> Topology:
        """Divides every region's workers among its servers.

        Args:
            regions: Global ranks of each region; checked by :func:`check_regions`.
            servers_per_region: Number of local servers in every region, or a list with one number per region.
            names: Names of the regions. Default: their indices.

        Raises:
            ValueError: If a region has fewer workers than servers, or the list has another length than ``regions``.
        """
        names = names or [str(index) for index in range(len(regions))]
        servers = [servers_per_region] * len(regions) if isinstance(servers_per_region, int) else servers_per_region
        if len(servers) != len(regions):
            raise ValueError(
                f"servers_per_region={servers_per_region!r} has {len(servers)} number(s) for {len(regions)} region(s)."
                " Give one number for all regions, or one for each."
            )
        parts = []
        for region, (ranks, count) in enumerate(zip(regions, servers, strict=True)):
            if len(ranks) < count:
                raise ValueError(
                    f"servers_per_region={servers_per_region} is more than the {len(ranks)} worker(s) of region"
                    f" {names[region]}. Every server needs a worker of its own: lower servers_per_region to at most"
                    f" {len(ranks)}, or put more workers into the region."
                )
            parts += [(tuple(part), region) for part in _divide(sorted(ranks), count)]
        groups = [ServerGroup(index, region, ranks) for index, (ranks, region) in enumerate(sorted(parts))]
        return cls(tuple(names), tuple(tuple(sorted(ranks)) for ranks in regions), tuple(groups))

    @property
    def leaders(self) -> list[int]:
        """Global ranks of the leaders, by the index of their server."""
        return [group.leader for group in self.groups]

    def group_of(self, rank: int) -> ServerGroup:
        """The server group of a worker."""
        return next(group for group in self.groups if rank in group.ranks)

    def region_of(self, rank: int) -> int:
        """Index of a worker's region, which may be another one than its server's."""
        return next(index for index, ranks in enumerate(self.regions) if rank in ranks)

    def describe(self, rank: int) -> str:
        """Rank and region of a worker, for messages."""
        return f"{self.noun} {rank} (region {self.names[self.region_of(rank)]})"


def check_regions(regions: int | Sequence[Sequence[int]] | None) -> None:
    """Checks the argument ``regions`` as far as this is possible without the number of workers.

    Raises:
        TypeError: If it has another type.
        ValueError: If it is not positive, a region is empty, or a rank is in two regions.
    """
    if regions is None:
        return
    if isinstance(regions, int) and not isinstance(regions, bool):
        if regions < 1:
            raise ValueError(f"regions={regions} must be at least 1.")
        return
    if not _is_list_of_ranks(regions):
        raise TypeError(
            f"regions={regions!r} must be None, a number of regions such as 2, or the ranks of each region such as"
            " [[0, 1], [2, 3]]."
        )
    assert not isinstance(regions, int)
    if not regions:
        raise ValueError("regions=[] must name the ranks of at least one region, such as [[0, 1], [2, 3]].")
    home: dict[int, int] = {}
    for region, ranks in enumerate(regions):
        if not ranks:
            raise ValueError(
                f"regions={regions!r}: region {region} has no workers. Give it at least one rank or leave it out."
            )
        for rank in ranks:
            if rank in home:
                raise ValueError(
                    f"regions={regions!r}: rank {rank} is in region {home[rank]} and in region {region}. Put every rank"
                    " into exactly one region."
                )
            home[rank] = region


def assign_regions(
    regions: int | Sequence[Sequence[int]] | None, world_size: int, num_nodes: int
) -> list[list[int]] | None:
    """Returns the ranks of each region, or ``None`` if only all processes together know them: :func:`regions_by_place`.

    Args:
        regions: The number of regions (with consecutive ranks, of sizes as equal as possible), the ranks of each
            region, or ``None``: then ``HALOS_REGION`` counts if this process has it, else each node is a region.
        world_size: Number of workers.
        num_nodes: Number of nodes, which may have different numbers of workers.

    Raises:
        ValueError: If there are more regions than workers, or the ranks do not match the workers.
    """
    if regions is None:
        return None if os.environ.get(REGION_VARIABLE) or num_nodes > 1 else [list(range(world_size))]
    if isinstance(regions, int):
        if regions > world_size:
            raise ValueError(
                f"regions={regions} is more than the {world_size} worker(s) of the job. Every region needs a worker:"
                f" use regions={world_size} or fewer, or more devices."
            )
        return _divide(list(range(world_size)), regions)
    named = sorted(rank for ranks in regions for rank in ranks)
    if named != list(range(world_size)):
        missing = sorted(set(range(world_size)) - set(named))
        unknown = sorted(set(named) - set(range(world_size)))
        raise ValueError(
            f"regions={[list(ranks) for ranks in regions]} does not fit the {world_size} worker(s) of the job: ranks"
            f" without a region: {missing}, ranks that do not exist: {unknown}. Name every rank from 0 to"
            f" {world_size - 1} exactly once."
        )
    return [list(ranks) for ranks in regions]


def regions_by_place(names: Sequence[str], nodes: Sequence[int]) -> tuple[list[list[int]], list[str]]:
    """Returns the ranks of each region and the regions' names, ordered by their lowest ranks.

    Processes with the same name are a region. If no process has a name, each node is a region, whose name is its index.

    Args:
        names: The value of ``HALOS_REGION`` in each process, by rank; empty if it is not set.
        nodes: The number of each process's node, by rank.

    Raises:
        ValueError: If some processes have ``HALOS_REGION`` and others do not.
    """
    if not any(names):
        regions = _ranks_by(nodes)
        return regions, [str(index) for index in range(len(regions))]
    unnamed = [rank for rank, name in enumerate(names) if not name]
    if unnamed:
        raise ValueError(
            f"{REGION_VARIABLE} is set in some processes but not in rank(s) {unnamed}. Set it in the environment of"
            " every process, or pass HalosStrategy(regions=...)."
        )
    return _ranks_by(names), list(dict.fromkeys(names))


def _ranks_by(places: Sequence[object]) -> list[list[int]]:
    return [[rank for rank, its in enumerate(places) if its == place] for place in dict.fromkeys(places)]


def _divide(ranks: list[int], parts: int) -> list[list[int]]:
    size, rest = divmod(len(ranks), parts)
    ends = [(index + 1) * size + min(index + 1, rest) for index in range(parts)]
    return [ranks[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _is_list_of_ranks(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(ranks, Sequence) and not isinstance(ranks, str) for ranks in value)
        and all(isinstance(rank, int) and not isinstance(rank, bool) for ranks in value for rank in ranks)
    )
