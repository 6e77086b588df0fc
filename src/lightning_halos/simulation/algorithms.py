"""What each algorithm is in a simulated cluster: its rounds and its servers.

Rules of this room: it puts parts together. How long things take says ``timing``, what servers do ``servers``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_halos.core.settings import Settings
from lightning_halos.core.topology import Topology
from lightning_halos.simulation.rounds import AsynchronousRounds, Rounds, SynchronousRounds
from lightning_halos.simulation.servers import NoServer, OuterServer, RegionServers, Servers
from lightning_halos.simulation.timing import Timing


class Algorithm(ABC):
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


class WithRegions(Algorithm):
    """HALoS, and Async-Local-SGD if the topology has one server.

    Args:
        settings: The settings.
        topology: The local servers and their workers.
    """

    def __init__(self, settings: Settings, topology: Topology) -> None:
        self._settings = settings
        self._topology = topology

    def rounds(self, timing: Timing, first: int, budget: float) -> Rounds:
        local_steps = timing.local_steps(self._settings.local_steps, self._settings.dynamic_local_steps)
        regions = [self._region(timing, rank) for rank in range(self._topology.world_size)]
        return AsynchronousRounds(timing, local_steps, regions, first, budget)

    def servers(self, timing: Timing, model: Tensor | None, shapes: Sequence[torch.Size]) -> Servers:
        assert model is not None
        groups, settings = self._topology.groups, self._settings
        regions = [self._region(timing, group.leader) for group in groups]
        describe = self._topology.describe
        number = len(groups)
        locals_ = [
            settings.local_server(g.index, number, len(g.ranks), model.clone(), shapes, describe) for g in groups
        ]
        global_ = settings.global_server(number, model.clone(), shapes)
        return RegionServers(groups, regions, locals_, global_, timing)

    def _region(self, timing: Timing, worker: int) -> int:
        """Region of a worker's server."""
        is_alone = len(self._topology.groups) == 1
        return timing.cluster.global_region if is_alone else self._topology.group_of(worker).region


class Lockstep(Algorithm):
    """DiLoCo.

    Args:
        settings: The settings.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def rounds(self, timing: Timing, first: int, budget: float) -> Rounds:
        local_steps = timing.local_steps(self._settings.local_steps, self._settings.dynamic_local_steps)
        return SynchronousRounds(timing, local_steps, first, budget)

    def servers(self, timing: Timing, model: Tensor | None, shapes: Sequence[torch.Size]) -> Servers:
        assert model is not None
        return OuterServer(self._settings.outer_server(model.clone(), shapes), timing.cluster)


class EveryStep(Algorithm):
    """Synchronous SGD: the workers average their gradients themselves."""

    def rounds(self, timing: Timing, first: int, budget: float) -> Rounds:
        return SynchronousRounds(timing, timing.local_steps(1, dynamic=False), first, budget)

    def servers(self, timing: Timing, model: Tensor | None, shapes: Sequence[torch.Size]) -> Servers:
        return NoServer(timing.cluster.num_workers)
