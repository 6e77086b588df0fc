"""Hosts the nodes of one process, and connects its worker and nodes with their peers.

The nodes make all decisions, and the caller makes the nodes and writes files. All processes do this in step, and end
with a goodbye on every link. Each lane of a worker has nodes and links of its own; ``lanes`` keeps them equal.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_halos.core.error_feedback import ErrorFeedback
from lightning_halos.core.global_node import GlobalNode
from lightning_halos.core.layout import Layout
from lightning_halos.core.messages import ShardWritten, Welcome
from lightning_halos.core.open_region_node import OpenRegionNode
from lightning_halos.core.protocol import GLOBAL
from lightning_halos.core.quantization import Format
from lightning_halos.core.region_node import RegionNode
from lightning_halos.core.topology import Topology
from lightning_halos.core.wire_formats import PLAIN, WireFormats
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.client import WorkerClient
from lightning_halos.transport.compute import ComputeThreads
from lightning_halos.transport.groups import Groups
from lightning_halos.transport.hosts import Host, RegionHost, Store
from lightning_halos.transport.lanes import Lanes
from lightning_halos.transport.link import GlooLink, Link, LoopbackLink, Memory
from lightning_halos.transport.member_host import MemberHost
from lightning_halos.transport.push_memory import PUSHES
from lightning_halos.transport.server_connection import ServerConnection
from lightning_halos.transport.slices import JoiningLink, NoLink
from lightning_halos.transport.vector_parts import VectorForm


class NodeRuntime:
    """The hosts and links of one process, during one fit.

    Args:
        rank: Index of this process's worker.
        topology: The regions and servers.
        groups: Its process groups.
        global_node: On rank 0, the global node.
        region_node: On the leader of a local server, the server's node.
        memory: The worker's vector, or the slice of it that this process carries. Models from another process are
            received into it.
        timeout: Limit for any wait for a peer, in seconds.
        interrupted: Called several times a second while the worker waits; may raise.
        store: Writes a node's part of a snapshot in the background.
        written: Called on rank 0 when a process reports that its part of a snapshot is written.
        membership: On rank 0 of a job that is one region of a run, its connection with the global server, which only
            lane 0 has, and the answer to its request to join. The caller lets the region's host use the connection.
        lane: Lane of this process in its worker.
        layout: The slices of the lanes. Default: there is one lane.
        describe: Returns the name of a process, given its worker and its lane. Default: the name of its worker.
        threads: Number of threads in which the servers of this process compute.
        pushes: Number of pushes that a local server has memory for.
        wire: The formats of vectors on the links. The nodes and the worker round them before they are sent.
        parameters: Elements of the vector that are parameters, which have these formats.

    Attributes:
        format: The format on the worker's link to its local server.
        alarm: The alarm to report failures to.
        client: The worker's end of the link to its local server.
        global_host: The host of ``global_node``.
        region_host: The host of ``region_node``.
    """

    def __init__(
        self,
        rank: int,
        topology: Topology,
        groups: Groups,
        global_node: GlobalNode | None,
        region_node: RegionNode | None,
        memory: Tensor,
        timeout: float,
        interrupted: Callable[[], None],
        store: Store = lambda shard, complete: None,
        written: Callable[[ShardWritten], None] = lambda message: None,
        membership: tuple[ServerConnection | None, Welcome] | None = None,
        lane: int = 0,
        layout: Layout | None = None,
        describe: Callable[[int, int], str] | None = None,
        threads: int = 1,
        pushes: int = PUSHES,
        wire: WireFormats = PLAIN,
        parameters: int = 0,
    ) -> None:
        self._describe = describe or (lambda worker, lane: topology.describe(worker))
        self._lane = lane
        self.alarm = Alarm(self._name(rank))
        self.global_host: Host[GlobalNode] | None = None
        self.region_host: RegionHost | None = None
        self._topology = topology
        self._groups = groups
        self._timeout = timeout
        self._form = VectorForm(memory.numel(), memory.dtype, parameters=parameters)
        self._wire = wire
        self.format: Format = "float32"
        self._lanes = self._connect_lanes(rank, lane, written) if groups.order else None
        self._pushes = pushes
        self._compute = None if global_node is None and region_node is None else ComputeThreads(threads)
        group = topology.group_of(rank)
        if global_node is not None:
            forward = written if self._lanes is None or lane == 0 else self._lanes.post
            self.global_host = Host(global_node, self.alarm, store, forward, self._lanes, compute=self._compute)
        link: Link
        if region_node is None:  # the vector's values were sent with the push when the answer overwrites them
            self.format = self._wire.on(topology.region_of(rank), group.region)
            server = self._server_of(group.leader)
            link = self._gloo_link(groups.region[group.leader], server, self.format, lambda: memory)
        else:
            near = {worker for worker in group.ranks if topology.region_of(worker) == group.region}
            if group.region == topology.group_of(0).region:
                near.add(GLOBAL)
            if isinstance(region_node, OpenRegionNode):
                assert membership is not None
                self.region_host = self._member_host(region_node, near, *membership, layout)
            else:
                self.region_host = RegionHost(region_node, self.alarm, near, store, self._lanes, self._compute, pushes)
                self._connect_servers(self.region_host, rank)
            link, own = self._loopback(self._server_of(rank), self._name(rank))
            self.region_host.attach(rank, own)
            for worker in group.ranks[1:]:
                memory_for_push = partial(self.region_host.memory_for_push, worker)
                form = self._wire.on(topology.region_of(worker), group.region)
                its = self._gloo_link(groups.region[worker], self._name(worker), form, memory_for_push)
                self.region_host.attach(worker, its)
            if self.global_host is not None:
                self.global_host.do("start")
            self.region_host.do("start")
        if self._lanes is not None:
            self._lanes.start()
        self.client = WorkerClient(link, self.alarm, timeout, interrupted)
        self.alarm.watch(timeout)

    def tell(self, message: ShardWritten) -> None:
        """Tells rank 0 that a part of a snapshot has been written, from a process with a node of its own."""
        if self.region_host is not None:
            self.region_host.tell(message)
        else:
            self.client.tell(message)

    def _connect_lanes(self, rank: int, lane: int, written: Callable[[ShardWritten], None]) -> Lanes:
        """Connects this process with the other processes of its worker."""
        links = {
            other: self._link(pair, self._describe(rank, other), None) for other, pair in self._groups.order.items()
        }
        return Lanes(lane, links, self.alarm, written)

    def _member_host(
        self,
        node: OpenRegionNode,
        near: set[int],
        connection: ServerConnection | None,
        welcome: Welcome,
        layout: Layout | None,
    ) -> MemberHost:
        """Makes the host of the only local server of a job whose global server is a process of its own."""
        slices: dict[int, Link] = {}
        if self._lanes is not None:
            assert layout is not None
            for lane, pair in self._groups.slices.items():
                form = VectorForm(layout.elements_of(lane or self._lanes.lane), self._form.dtype)
                slices[lane] = self._link(pair, self._describe(0, lane), form)
        if connection is None:
            host = MemberHost(node, self.alarm, near, None, welcome, self._lanes, None, self._compute, self._pushes)
            host.attach(GLOBAL, slices[0], NoLink(slices[0].peer))
            return host
        joining = None
        if self._lanes is not None:
            assert layout is not None
            feedback = None
            if self._wire.between != "float32":
                feedback = ErrorFeedback(self._wire.between, layout.parameters, self._form.dtype)
            joining = JoiningLink(connection.models, layout, slices, self._lanes, feedback)
        host = MemberHost(
            node, self.alarm, near, connection, welcome, self._lanes, joining, self._compute, self._pushes
        )
        host.attach(GLOBAL, connection.models if joining is None else joining, connection.control)
        self.alarm.add(connection.control)  # which tells the server if the job fails
        connection.on_failure(self.alarm.fail)
        return host

    def _connect_servers(self, host: RegionHost, rank: int) -> None:
        """Connects a local server with the global server and, on rank 0, the global server with all local servers."""
        topology, groups = self._topology, self._groups
        here, there = self._server_of(rank), f"the global server of {self._name(0)}"
        if self.global_host is None:
            form = self._wire.on(topology.group_of(rank).region, topology.group_of(0).region)
            models_link = self._gloo_link(groups.models[0], there, form, host.memory_for_answer)
            host.attach(GLOBAL, models_link, self._gloo_link(groups.control[0], there))
            return
        models, control = self._loopback(there, here), self._loopback(there, here)
        self.global_host.attach(0, models[1], control[1])
        host.attach(GLOBAL, models[0], control[0])
        for other in topology.groups[1:]:
            peer = self._server_of(other.leader)
            form = self._wire.on(other.region, topology.group_of(0).region)
            models_link = self._gloo_link(groups.models[other.leader], peer, form)
            self.global_host.attach(other.index, models_link, self._gloo_link(groups.control[other.leader], peer))

    def _name(self, worker: int) -> str:
        """Returns the name of a worker's process in this lane."""
        return self._describe(worker, self._lane)

    def _server_of(self, leader: int) -> str:
        return f"the server of {self._name(leader)}"

    def _gloo_link(
        self, pair: ProcessGroup, peer: str, form: Format = "float32", memory: Memory | None = None
    ) -> GlooLink:
        return self._link(pair, peer, VectorForm(*self._form[:2], form, self._form.parameters), memory)

    def _link(self, pair: ProcessGroup, peer: str, form: VectorForm | None, memory: Memory | None = None) -> GlooLink:
        link = GlooLink(pair, 1 - pair.rank(), peer, self._timeout, form, memory)
        self.alarm.add(link)
        return link

    def _loopback(self, first: str, second: str) -> tuple[LoopbackLink, LoopbackLink]:
        pair = LoopbackLink.pair(first, second)
        self.alarm.add(*pair)
        return pair
