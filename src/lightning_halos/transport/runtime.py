"""Hosts the nodes of one process, and connects its worker and nodes with their peers.

The nodes make all decisions, and the caller makes the nodes and writes files. All processes do this in step, and end
with a goodbye on every link.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_halos.core.global_node import GlobalNode
from lightning_halos.core.messages import ShardWritten, Welcome
from lightning_halos.core.open_region_node import OpenRegionNode
from lightning_halos.core.protocol import GLOBAL
from lightning_halos.core.region_node import RegionNode
from lightning_halos.core.topology import Topology
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.client import WorkerClient
from lightning_halos.transport.groups import Groups
from lightning_halos.transport.hosts import Host, RegionHost, Store
from lightning_halos.transport.link import GlooLink, Link, LoopbackLink, Memory
from lightning_halos.transport.member_host import MemberHost
from lightning_halos.transport.server_connection import ServerConnection


class NodeRuntime:
    """The hosts and links of one process, during one fit.

    Args:
        rank: Global rank of this process.
        topology: The regions and servers.
        groups: Its process groups.
        global_node: On rank 0, the global node.
        region_node: On the leader of a local server, the server's node.
        memory: The worker's vector. Models from another process are received into it.
        timeout: Limit for any wait for a peer, in seconds.
        interrupted: Called several times a second while the worker waits; may raise.
        store: Writes a node's part of a snapshot in the background.
        written: Called on rank 0 when a process reports that its part of a snapshot is written.
        membership: On rank 0 of a job that is one region of a run, its connection with the global server, and the
            answer to its request to join.

    Attributes:
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
        membership: tuple[ServerConnection, Welcome] | None = None,
    ) -> None:
        self.alarm = Alarm(topology.describe(rank))
        self.global_host: Host[GlobalNode] | None = None
        self.region_host: RegionHost | None = None
        self._topology = topology
        self._groups = groups
        self._timeout = timeout
        self._form = memory.numel(), memory.dtype
        group = topology.group_of(rank)
        if global_node is not None:
            self.global_host = Host(global_node, self.alarm, store, written)
        link: Link
        if region_node is None:  # the vector's values were sent with the push when the answer overwrites them
            link = self._gloo_link(groups.region[group.leader], self._server_of(group.leader), lambda: memory)
        else:
            near = {worker for worker in group.ranks if topology.region_of(worker) == group.region}
            if group.region == topology.group_of(0).region:
                near.add(GLOBAL)
            if isinstance(region_node, OpenRegionNode):
                assert membership is not None
                self.region_host = self._member_host(region_node, near, *membership)
            else:
                self.region_host = RegionHost(region_node, self.alarm, near, store)
                self._connect_servers(self.region_host, rank)
            link, own = self._loopback(self._server_of(rank), topology.describe(rank))
            self.region_host.attach(rank, own)
            for worker in group.ranks[1:]:
                memory_for_push = self.region_host.memory_for_push
                its = self._gloo_link(groups.region[worker], topology.describe(worker), memory_for_push)
                self.region_host.attach(worker, its)
            if self.global_host is not None:
                self.global_host.act(GlobalNode.start)
            self.region_host.act(RegionNode.start)
            if isinstance(self.region_host, MemberHost) and membership is not None:
                membership[0].serve(self.region_host, goes_on=True)
        self.client = WorkerClient(link, self.alarm, timeout, interrupted)
        self.alarm.watch(timeout)

    def _member_host(
        self, node: OpenRegionNode, near: set[int], connection: ServerConnection, welcome: Welcome
    ) -> MemberHost:
        """Makes the host of the only local server of a job whose global server is a process of its own."""
        host = MemberHost(node, self.alarm, near, connection, welcome)
        host.attach(GLOBAL, connection.models, connection.control)
        self.alarm.add(connection.control)  # which tells the server if the job fails
        connection.on_failure(self.alarm.fail)
        return host

    def _connect_servers(self, host: RegionHost, rank: int) -> None:
        """Connects a local server with the global server and, on rank 0, the global server with all local servers."""
        topology, groups = self._topology, self._groups
        here, there = self._server_of(rank), f"the global server of {topology.describe(0)}"
        if self.global_host is None:
            models_link = self._gloo_link(groups.models[0], there, host.memory_for_answer)
            host.attach(GLOBAL, models_link, self._gloo_link(groups.control[0], there))
            return
        models, control = self._loopback(there, here), self._loopback(there, here)
        self.global_host.attach(0, models[1], control[1])
        host.attach(GLOBAL, models[0], control[0])
        for other in topology.groups[1:]:
            peer = self._server_of(other.leader)
            models_link = self._gloo_link(groups.models[other.leader], peer)
            self.global_host.attach(other.index, models_link, self._gloo_link(groups.control[other.leader], peer))

    def _server_of(self, leader: int) -> str:
        return f"the server of {self._topology.describe(leader)}"

    def _gloo_link(self, pair: ProcessGroup, peer: str, memory: Memory | None = None) -> GlooLink:
        link = GlooLink(pair, 1 - pair.rank(), peer, self._timeout, self._form, memory)
        self.alarm.add(link)
        return link

    def _loopback(self, first: str, second: str) -> tuple[LoopbackLink, LoopbackLink]:
        pair = LoopbackLink.pair(first, second)
        self.alarm.add(*pair)
        return pair
