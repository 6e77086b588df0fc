"""The world of a job that is one region of a run: its own local server, and a global server in a process of its own.

The region's server is on the job's rank 0. Nothing is decided here, and no state is kept: the run is in the global
server's directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_halos.core.algorithms import ServerAlgorithm
from lightning_halos.core.cursor import LeaseStock
from lightning_halos.core.joining import Joining
from lightning_halos.core.open_region_node import OpenRegionNode
from lightning_halos.core.protocol import GLOBAL
from lightning_halos.core.worker import WorkerRound
from lightning_halos.training.membership import Membership
from lightning_halos.training.shared_data import SharedData
from lightning_halos.training.start import Start
from lightning_halos.training.worlds.protocol import World
from lightning_halos.transport.compute import threads_beside
from lightning_halos.transport.member_host import MemberHost
from lightning_halos.transport.runtime import NodeRuntime

_MOST_ROUNDS = 32  # of data that is ordered ahead
_PARTS_OF_EPOCH = 16  # of which at most one is ordered ahead


class MemberWorld(World):
    """This process's worker in the job and, on rank 0, the region's server and its connection with the global server.

    Args:
        start: The state from which the fit starts, whose memory and module have the global model.
        membership: The job's membership in the run.
    """

    def __init__(self, start: Start, membership: Membership) -> None:
        site, algorithm, memory, budget = start.site, start.algorithm, start.memory, start.budget
        assert isinstance(algorithm, ServerAlgorithm)
        assert memory is not None
        assert start.entry is not None
        self._site = site
        joining, node = membership.joining, membership.node
        link = None
        if node is not None and node.welcome is not None:
            link = membership.connection, node.welcome
        runtime = NodeRuntime(
            site.rank,
            site.topology,
            site.groups,
            None,
            None if node is None else _region_node(start, algorithm, memory, node),
            memory,
            site.timeout,
            site.interrupted,
            membership=link,
            lane=site.lane,
            layout=start.vector.layout,
            describe=site.describe_lane,
            threads=threads_beside(start.trainer.num_devices),
            wire=algorithm.wire,
            parameters=start.vector.num_parameters,
        )
        self.wire = runtime.format
        self.alarm = runtime.alarm
        self.client = runtime.client
        host = runtime.region_host
        self._host = host if isinstance(host, MemberHost) else None
        if self._host is not None and joining is not None and membership.connection is not None:
            for message in joining.early:  # which are older than all that arrives from now on
                self._host.receive(message, ())
            membership.connection.serve(self._host, goes_on=True)
        planner = algorithm.planner(start.workers, budget.max_steps)
        local_steps, share = planner.local_steps(site.rank, budget.total), planner.share(budget.total)
        self.first_round = WorkerRound(site.rank, local_steps, budget.position, share)
        self.leases = runtime.client.leases()

    @property
    def decides(self) -> bool:
        return self._host is not None and self._host.decides

    @property
    def has_global_model(self) -> bool:
        return self.decides

    @property
    def callbacks(self) -> str:
        return "" if self._host is None else self._host.callbacks

    @property
    def version(self) -> int:
        return self._region.version

    @property
    def steps(self) -> int:
        return self._region.steps

    def read(self, out: Tensor) -> None:
        self._region.read(out, self._check)

    def publish(self, plateau_steps: Sequence[tuple[int, float]], metrics: dict[str, float], callbacks: str) -> None:
        self._region.publish(plateau_steps, metrics, callbacks)

    @property
    def rejected(self) -> int:
        return 0  # other jobs train the same model

    def statistics(self) -> list[dict[str, Any]]:
        """Returns the counters of this job's server only; ``lightning-halos status`` shows those of all regions."""
        return [self._region.statistics()]

    @property
    def _region(self) -> MemberHost:
        assert self._host is not None
        return self._host

    def _check(self) -> None:
        self.alarm.check()
        self._site.interrupted()


def _region_node(start: Start, algorithm: ServerAlgorithm, memory: Tensor, joining: Joining) -> OpenRegionNode:
    """Makes the node of the region's server, with a copy of the model."""
    topology, budget, workers, welcome = start.site.topology, start.budget, start.site.size, joining.welcome
    assert welcome is not None
    # There may always be another region, so the server exchanges.
    server = algorithm.local_server(welcome.member, 2, workers, memory.clone(), start.vector.shapes, topology.describe)
    server.num_teachers = start.vector.num_teachers
    planner = algorithm.planner(budget.workers, budget.max_steps)
    stock = None if start.data is None else LeaseStock(_ahead(algorithm.local_steps * workers, start.data))
    formats = {**dict.fromkeys(range(1, workers), algorithm.wire.within), GLOBAL: algorithm.wire.between}
    node = OpenRegionNode(server, planner, range(workers), budget, stock, joining, formats)
    if start.site.lanes > 1:
        server.feedback = None  # updates are rounded where the slices are joined
    return node


def _ahead(round_steps: int, data: SharedData) -> int:
    """Returns the data to order ahead, in local steps, so that the workers train on while the global server is away.

    Args:
        round_steps: Local steps of a round of all workers of the job.
        data: The data. Only a small part of an epoch is ordered ahead, because regions end their epochs by their data.
    """
    rounds = data.steps_per_epoch // (_PARTS_OF_EPOCH * round_steps)
    return int(max(1, min(_MOST_ROUNDS, rounds)) * round_steps)
