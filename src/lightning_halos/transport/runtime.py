"""The servers of one process, and the links of its worker and servers.

They are made when all processes are in step, and end with a goodbye on every link. The nodes make all decisions, and
the caller writes files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_halos.core.algorithms import ServerAlgorithm
from lightning_halos.core.cursor import DataCursor, LeaseStock, Spans
from lightning_halos.core.global_node import GlobalNode
from lightning_halos.core.messages import Marker, ShardWritten
from lightning_halos.core.protocol import GLOBAL
from lightning_halos.core.region_node import RegionNode
from lightning_halos.core.schedule import StepBudget
from lightning_halos.core.topology import Topology
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.client import WorkerClient
from lightning_halos.transport.groups import Groups
from lightning_halos.transport.hosts import GlobalHost, Host, RegionHost, Store
from lightning_halos.transport.link import GlooLink, Link, LoopbackLink, Memory, Slot


class NodeRuntime:
    """The servers and links of one process, during one fit.

    Args:
        rank: Global rank of this process.
        topology: The regions and servers.
        groups: This process's process groups.
        algorithm: The algorithm.
        model: The initial model, in the worker's vector. Servers get copies.
        shapes: Shapes of the parameters in it.
        budget: The step budget.
        cursor: The cursor over the training data at the start of training; ``None`` if the workers do not share data.
        timeout: Limit for any wait for a peer, in seconds.
        interrupted: Called several times a second while the worker waits; may raise.
        store: Writes a server's part of a snapshot in the background.
        written: Called on rank 0 when a process reports that its part of a snapshot is written.
        done: The data that was trained on before.
        server_state: State from which this process's local server resumes.
        global_state: State from which the global server resumes.

    Attributes:
        alarm: The alarm to report failures to.
        client: The worker's end of the link to its local server.
        global_host: The host of the global server; ``None`` on all ranks but 0.
    """

    def __init__(
        self,
        rank: int,
        topology: Topology,
        groups: Groups,
        algorithm: ServerAlgorithm,
        model: Tensor,
        shapes: Sequence[torch.Size],
        budget: StepBudget,
        cursor: DataCursor | None,
        timeout: float,
        interrupted: Callable[[], None],
        store: Store = lambda shard, complete: None,
        written: Callable[[ShardWritten], None] = lambda message: None,
        done: Spans | None = None,
        server_state: Mapping[str, Any] | None = None,
        global_state: Mapping[str, Any] | None = None,
    ) -> None:
        self.alarm = Alarm(topology.describe(rank))
        self.global_host: GlobalHost | None = None
        self._rank = rank
        self._topology = topology
        self._groups = groups
        self._timeout = timeout
        self._form = model.numel(), model.dtype
        self._store = store
        self._steps_before = budget.total
        self._region_host: RegionHost | None = None
        group = topology.group_of(rank)
        if rank == 0:
            node = GlobalNode(
                algorithm.global_server(len(topology.groups), model.clone(), shapes),
                len(topology.groups),
                copy.copy(budget),
                cursor,
                done,
            )
            if global_state is not None:
                node.load_state_dict(global_state)
            self.global_host = GlobalHost(node, self.alarm, store, written)
        link: Link
        if rank == group.leader:
            stock = None if cursor is None else LeaseStock(algorithm.local_steps * len(group.ranks))
            link = self._host_region(algorithm, model, shapes, budget, stock, server_state)
        else:
            leader = f"the server of {topology.describe(group.leader)}"
            # The worker's own vector, whose values were sent with the push.
            link = self._gloo_link(groups.region, 0, leader, lambda: model)
        self.client = WorkerClient(link, self.alarm, timeout, interrupted)
        self.alarm.watch(timeout)

    @property
    def has_global_model(self) -> bool:
        """Whether this process can read the global model."""
        return self.global_host is not None

    @property
    def _model_host(self) -> Host:
        """The host of the global model, which is that of a single local server."""
        host = self._region_host if len(self._topology.groups) == 1 else self.global_host
        assert host is not None
        return host

    @property
    def version(self) -> int:
        """Number of updates in the global model."""
        return self._model_host.version

    @property
    def steps(self) -> int:
        """Local steps of this run in the global model."""
        assert self.global_host is not None
        return self.global_host.applied - self._steps_before

    def read(self, out: Tensor) -> None:
        """Copies the global model into the vector ``out``."""
        self._model_host.read(out)

    def publish(self, plateau_steps: Sequence[tuple[int, float]], metrics: dict[str, float]) -> None:
        """Sends the steps of rank 0's plateau schedulers, and its metrics, to all workers."""
        assert self.global_host is not None
        self.global_host.publish(list(plateau_steps), metrics)

    def statistics(self) -> list[dict[str, Any]]:
        """Returns the counters of each local server; see :class:`~lightning_halos.HalosMonitor`."""
        assert self.global_host is not None
        return self.global_host.statistics()

    def start_snapshot(self, marker: Marker) -> bool:
        """Starts a snapshot, only on rank 0. Returns ``False`` without one if the run has ended."""
        assert self.global_host is not None
        return self.global_host.start_snapshot(marker)

    def adopt_final_model(self, model: Tensor) -> None:
        """Replaces the model of this process's local server by the final global model, when the run is over."""
        if self._region_host is not None:
            self._region_host.adopt_final_model(model)

    def state(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Returns the state from which a later run can continue, after the end of this one.

        Returns:
            The states of this process's local server and of the global server; ``None`` for those it does not host.
        """
        server = None if self._region_host is None else self._region_host.state()
        return server, None if self.global_host is None else self.global_host.state()

    def progress(self) -> dict[str, Any]:
        """Returns the progress of the run: finished local steps, and the data that was trained on."""
        assert self.global_host is not None
        return self.global_host.progress()

    def close(self, timeout: float) -> None:
        """Says goodbye to all peers and waits at most ``timeout`` seconds for their goodbyes."""
        self.alarm.close(timeout)

    def _host_region(
        self,
        algorithm: ServerAlgorithm,
        model: Tensor,
        shapes: Sequence[torch.Size],
        budget: StepBudget,
        stock: LeaseStock | None,
        state: Mapping[str, Any] | None,
    ) -> LoopbackLink:
        """Starts the local server. Returns this process's own worker's end of a link to it."""
        topology, group = self._topology, self._topology.group_of(self._rank)
        workers, servers = len(group.ranks), len(topology.groups)
        node = RegionNode(
            algorithm.local_server(group.index, servers, workers, model.clone(), shapes, topology.describe),
            algorithm.planner(budget.workers, budget.max_steps),
            group.ranks,
            copy.copy(budget),
            stock,
        )
        if state is not None:
            node.load_state_dict(state)
        slot = Slot(model.numel(), model.dtype)
        within_region = group.region == topology.group_of(0).region
        self._region_host = host = RegionHost(node, slot, self.alarm, within_region, self._store)
        here, there = f"the server of {topology.describe(self._rank)}", f"the global server of {topology.describe(0)}"
        if self.global_host is not None:
            models, control = self._loopback(there, here), self._loopback(there, here)
            self.global_host.attach(group.index, models[1], control[1])
            host.attach(GLOBAL, models[0], control[0])
            for other in topology.groups[1:]:
                peer = f"the server of {topology.describe(other.leader)}"
                self.global_host.attach(
                    other.index,
                    self._gloo_link(self._groups.models, other.index, peer),
                    self._gloo_link(self._groups.control, other.index, peer),
                )
        else:
            models_link = self._gloo_link(self._groups.models, 0, there, host.memory)
            host.attach(GLOBAL, models_link, self._gloo_link(self._groups.control, 0, there))
        mine, its = self._loopback(here, topology.describe(self._rank))
        host.attach(self._rank, its)
        for index, rank in enumerate(group.ranks[1:], start=1):
            host.attach(rank, self._gloo_link(self._groups.region, index, topology.describe(rank), slot.take))
        if self.global_host is not None:
            self.global_host.start()
        host.start()
        return mine

    def tell(self, message: ShardWritten) -> None:
        """Tells rank 0 whether a part of a snapshot has been written, by this process's worker or local server."""
        (self.client if self._region_host is None else self._region_host).tell(message)

    def _gloo_link(self, group: ProcessGroup | None, rank: int, peer: str, memory: Memory | None = None) -> GlooLink:
        assert group is not None
        link = GlooLink(group, rank, peer, self._timeout, self._form, memory)
        self.alarm.add(link)
        return link

    def _loopback(self, first: str, second: str) -> tuple[LoopbackLink, LoopbackLink]:
        pair = LoopbackLink.pair(first, second)
        self.alarm.add(*pair)
        return pair
