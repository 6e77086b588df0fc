"""The worlds that workers train in, with one protocol: real links, synchronous rounds, and a virtual clock."""

from __future__ import annotations

from lightning_halos.core.algorithms import ServerAlgorithm
from lightning_halos.simulation.cluster import SimulatedCluster
from lightning_halos.training.start import Start
from lightning_halos.training.worlds.bystander import BystanderWorld, tell_bystanders
from lightning_halos.training.worlds.lockstep import LockstepWorld
from lightning_halos.training.worlds.member import MemberWorld
from lightning_halos.training.worlds.protocol import CheckpointedWorld, World
from lightning_halos.training.worlds.real import RealWorld
from lightning_halos.training.worlds.simulated import SimulatedWorld

__all__ = ["CheckpointedWorld", "SimulatedWorld", "World", "make_world"]


def make_world(start: Start, cluster: SimulatedCluster | None) -> World:
    """Makes the world of a fit.

    Args:
        start: The state from which the fit starts.
        cluster: The cluster to simulate; ``None`` for a real run.
    """
    site = start.site
    if not site.carries:
        return BystanderWorld(start, cluster is not None)
    world = _make(start, cluster)
    if site.lane == 0 and len(site.worker_processes) > site.lanes:
        tell_bystanders(world, site.worker_collectives)
    return world


def _make(start: Start, cluster: SimulatedCluster | None) -> SimulatedWorld | MemberWorld | RealWorld | LockstepWorld:
    if cluster is not None:
        return SimulatedWorld(start, cluster)
    if start.membership is not None:
        return MemberWorld(start, start.membership)
    return RealWorld(start) if isinstance(start.algorithm, ServerAlgorithm) else LockstepWorld(start)
