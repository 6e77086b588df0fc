"""The rounds and servers of each kind of algorithm in a simulated cluster."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_halos.core.algorithms import Algorithm, ServerAlgorithm, SynchronousAlgorithm
from lightning_halos.core.topology import Topology
from lightning_halos.simulation.rounds import AsynchronousRounds, Rounds, SynchronousRounds
from lightning_halos.simulation.servers import NoServer, OuterServer, RegionServers, Servers
from lightning_halos.simulation.timing import Timing


class Simulated(ABC):
    """An algorithm in a simulated cluster."""

    @abstractmethod
    def rounds(self, timing: Timing, first: int, budget: float) -> Rounds:
        """Makes the rounds of a run; see :class:`~lightning_halos.simulation.rounds.Rounds`."""

    @abstractmethod
    def servers(self, timing: Timing, model: Tensor | None, shapes: Sequence[torch.Size]) -> Servers:
        """Makes the servers.

        Args:
            timing: The durations.
            model: The initial model, which stays as it is; ``None`` if no models are exchanged.
            shapes: Shapes of the parameters in it.
        """


class Asynchronous(Simulated):
    """Local servers, and a global server above several of them.

    Args:
        algorithm: The algorithm.
        topology: The local servers and their workers.
    """

    def __init__(self, algorithm: ServerAlgorithm, topology: Topology) -> None:
        self._algorithm = algorithm
        self._topology = topology

    def rounds(self, timing: Timing, first: int, budget: float) -> Rounds:
        local_steps = timing.local_steps(self._algorithm.local_steps, self._algorithm.dynamic_local_steps)
        regions = [self._topology.group_of(rank).region for rank in range(self._topology.world_size)]
        return AsynchronousRounds(timing, local_steps, regions, first, budget)

    def servers(self, timing: Timing, model: Tensor | None, shapes: Sequence[torch.Size]) -> Servers:
        assert model is not None
        groups, algorithm, describe = self._topology.groups, self._algorithm, self._topology.describe
        number = len(groups)
        locals_ = [
            algorithm.local_server(g.index, number, len(g.ranks), model.clone(), shapes, describe) for g in groups
        ]
        global_ = algorithm.global_server(number, model.clone(), shapes)
        return RegionServers(groups, [group.region for group in groups], locals_, global_, timing)


class Synchronous(Simulated):
    """Rounds of all workers, and one server unless they average their gradients themselves.

    Args:
        algorithm: The algorithm.
    """

    def __init__(self, algorithm: SynchronousAlgorithm) -> None:
        self._algorithm = algorithm

    def rounds(self, timing: Timing, first: int, budget: float) -> Rounds:
        local_steps = timing.local_steps(self._algorithm.local_steps, self._algorithm.dynamic_local_steps)
        return SynchronousRounds(timing, local_steps, first, budget)

    def servers(self, timing: Timing, model: Tensor | None, shapes: Sequence[torch.Size]) -> Servers:
        server = None if model is None else self._algorithm.server(model.clone(), shapes)
        return NoServer(timing.cluster.num_workers) if server is None else OuterServer(server, timing.cluster)


def simulated(algorithm: Algorithm, topology: Topology) -> Simulated:
    """Returns an algorithm as it is in a simulated cluster."""
    if isinstance(algorithm, ServerAlgorithm):
        return Asynchronous(algorithm, topology)
    assert isinstance(algorithm, SynchronousAlgorithm)
    return Synchronous(algorithm)
