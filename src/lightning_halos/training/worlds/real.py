"""The real world of algorithms with servers: links between processes, and servers in threads next to the training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lightning_halos.checkpoint.manifest import global_shard, server_shard
from lightning_halos.checkpoint.resume import Resume
from lightning_halos.core.algorithms import ServerAlgorithm
from lightning_halos.core.cursor import DataCursor, LeaseStock, Spans
from lightning_halos.core.finding import update_of_snapshot
from lightning_halos.core.global_node import GlobalNode
from lightning_halos.core.local_server import unsent_update
from lightning_halos.core.messages import Marker, Publish, Push, ShardWritten
from lightning_halos.core.parameter_server import ParameterServer
from lightning_halos.core.protocol import GLOBAL
from lightning_halos.core.region_node import RegionNode
from lightning_halos.core.snapshot import Shard
from lightning_halos.core.vector import ModelVector
from lightning_halos.core.worker import WorkerRound
from lightning_halos.training.lane_findings import add_findings, slice_of
from lightning_halos.training.start import Start
from lightning_halos.training.worlds.protocol import CheckpointedWorld, World
from lightning_halos.transport.compute import threads_beside
from lightning_halos.transport.hosts import Host, RegionHost
from lightning_halos.transport.runtime import NodeRuntime


class RealWorld(World):
    """This process's servers, and its links.

    Args:
        start: The state from which the fit starts. In a resumed run its memory and module are overwritten with the
            model to resume from.
    """

    def __init__(self, start: Start) -> None:
        site, algorithm, memory, resume, budget = start.site, start.algorithm, start.memory, start.resume, start.budget
        assert isinstance(algorithm, ServerAlgorithm)
        assert memory is not None
        self._saves = start.saves
        self._interrupted = site.interrupted
        if resume is not None:
            if not resume.fits and site.rank == 0:
                servers = len(site.topology.groups)
                rebuild(resume, memory, start.vector, algorithm, servers, budget.total, slice_of(site))
            _share_model(start, memory, resume)
        runtime = NodeRuntime(
            site.rank,
            site.topology,
            site.groups,
            _global_node(start, algorithm, memory),
            _region_node(start, algorithm, memory),
            memory,
            site.timeout,
            site.interrupted,
            self._write,
            start.saves.written,
            lane=site.lane,
            describe=site.describe_lane,
            threads=threads_beside(start.trainer.num_devices),
            wire=algorithm.wire,
            parameters=start.vector.num_parameters,
        )
        self.wire = runtime.format
        self._lane = site.lane
        self.alarm = runtime.alarm
        self.client = runtime.client
        self._runtime = runtime
        self._global_host, self._region_host = runtime.global_host, runtime.region_host
        self._has_one_server = len(site.topology.groups) == 1
        planner = algorithm.planner(site.size, budget.max_steps)
        local_steps, share = planner.local_steps(site.rank, budget.total), planner.share(budget.total)
        position = start.trainer.global_step if resume is None else budget.position
        self.first_round = WorkerRound(site.rank, local_steps, position, share)
        self.leases = runtime.client.leases()

    @property
    def checkpointed(self) -> CheckpointedWorld:
        return self

    @property
    def has_global_model(self) -> bool:
        return self._global_host is not None

    @property
    def version(self) -> int:
        return self._model_host.node.version

    @property
    def steps(self) -> int:
        return self._global.node.steps

    def read(self, out: Tensor) -> None:
        self._model_host.read(out, self._check)

    def publish(self, plateau_steps: Sequence[tuple[int, float]], metrics: dict[str, float], callbacks: str) -> None:
        self._global.do("publish", Publish(0, list(plateau_steps), metrics))

    def statistics(self) -> list[dict[str, Any]]:
        return self._global.ask(lambda node: [counters.statistics() for counters in node.counters.values()])

    def on_marker(self, save: Callable[[Marker, Push], None]) -> None:
        self._runtime.client.on_marker = save

    def tell(self, message: ShardWritten) -> None:
        self._runtime.tell(message)

    def start_snapshot(self, marker: Marker) -> None:
        if not self._global.do("snapshot", marker):
            self._saves.fail(marker.save, "the run has ended meanwhile")

    def adopt_final_model(self, model: Tensor) -> None:
        if self._region_host is not None:
            self._region_host.ask(lambda node: node.adopt_final_model(model))

    def state(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        region, whole = self._region_host, self._global_host
        return (
            None if region is None else region.ask(RegionNode.state_dict),
            None if whole is None else whole.ask(GlobalNode.state_dict),
        )

    def progress(self) -> dict[str, Any]:
        return self._global.ask(GlobalNode.progress)

    def _check(self) -> None:
        self.alarm.check()
        self._interrupted()

    @property
    def _global(self) -> Host[GlobalNode]:
        assert self._global_host is not None
        return self._global_host

    @property
    def _model_host(self) -> Host[GlobalNode] | RegionHost:
        """The host of the global model, which is that of a single local server."""
        host = self._region_host if self._has_one_server else self._global_host
        assert host is not None
        return host

    def _write(self, shard: Shard, complete: Callable[[], None]) -> None:
        """Writes a server's part of a snapshot in the background, and tells rank 0."""
        if shard.server is None:
            name, tell = global_shard(self._lane), self._saves.written if self._lane == 0 else self.tell
            if self._lane == 0:
                self._saves.complete_manifest(shard.marker.save, **shard.progress)
        else:
            name, tell = server_shard(shard.server, self._lane), self.tell
        self._saves.writer.shard(shard.marker, name, shard.state, tell, complete)


def _global_node(start: Start, algorithm: ServerAlgorithm, memory: Tensor) -> GlobalNode | None:
    """Makes the global node, on rank 0, with a copy of the model."""
    if start.site.rank > 0:
        return None
    data, resume, servers = start.data, start.resume, len(start.site.topology.groups)
    server = algorithm.global_server(servers, memory.clone(), start.vector.shapes)
    if server is not None:
        server.num_teachers = start.vector.num_teachers
    done = start.done()
    cursor = None if data is None else DataCursor(data.steps_per_epoch, data.epochs, Spans(done))
    topology, home = start.site.topology, start.site.topology.group_of(0).region
    formats = {group.index: algorithm.wire.on(group.region, home) for group in topology.groups[1:]}  # the first is here
    node = GlobalNode(server, servers, start.budget, cursor, done, formats)
    if resume is not None and resume.globals is not None:
        if server is not None and start.site.lanes > 1:
            slice_of(start.site)(server)
            add_findings(resume.globals["updates"], server)
        node.load_state_dict(resume.globals)
    return node


def _region_node(start: Start, algorithm: ServerAlgorithm, memory: Tensor) -> RegionNode | None:
    """Makes the node of a local server, on its leader, with a copy of the model."""
    topology, budget, resume = start.site.topology, start.budget, start.resume
    group, servers = topology.group_of(start.site.rank), len(topology.groups)
    if start.site.rank != group.leader:
        return None
    workers, shapes = len(group.ranks), start.vector.shapes
    server = algorithm.local_server(group.index, servers, workers, memory.clone(), shapes, topology.describe)
    server.num_teachers = start.vector.num_teachers
    planner = algorithm.planner(budget.workers, budget.max_steps)
    stock = None if start.data is None else LeaseStock(algorithm.local_steps * workers)
    formats = algorithm.wire.of_server(group, topology.region_of, topology.group_of(0).region)
    for peer in (group.leader, *([GLOBAL] if group.leader == 0 else [])):  # they are in this process
        del formats[peer]
    node = RegionNode(server, planner, group.ranks, budget, stock, formats)
    if resume is not None and resume.server is not None:
        node.load_state_dict(resume.server)
    return node


def _share_model(start: Start, memory: Tensor, resume: Resume) -> None:
    """Gives the workers the model to resume from: that of their server or, with new servers, the global model."""
    if resume.server is not None:
        memory.copy_(resume.server["server"]["model"])
    if resume.fits:
        start.site.broadcast_from_leader_(memory)
    else:
        start.site.lane_collectives.broadcast_([memory])
    start.put_in(memory)


def rebuild(
    resume: Resume,
    memory: Tensor,
    vector: ModelVector,
    algorithm: ServerAlgorithm,
    servers: int,
    total: int,
    prepare: Callable[[ParameterServer], object] = lambda server: None,
) -> None:
    """Flushes the old servers of a checkpoint, on rank 0, so that new servers can start from the global model.

    Updates in flight, and unsent updates of the local servers, are applied to the global model.

    Args:
        resume: The state to resume from. Its global state is replaced by the state after the flush, and its server
            state by that of the only old server, if there was only one.
        memory: Is overwritten with the global model.
        vector: Says what is where in it.
        algorithm: The algorithm.
        servers: Number of local servers of the new run.
        total: Local steps at the start of the new run.
        prepare: Makes a server that of one lane, if there are several.
    """
    assert resume.globals is not None
    had_one, has_one = len(resume.manifest.groups) == 1, servers == 1
    if had_one:
        only = resume.servers[0]
        memory.copy_(only["server"]["model"])
        if has_one:
            resume.server = {**only, "server": {**only["server"], "steps": 0}}
        resume.globals = None
        return
    server = algorithm.global_server(len(resume.manifest.groups), memory.clone(), vector.shapes)
    assert server is not None
    server.num_teachers = vector.num_teachers
    prepare(server)
    server.load_state_dict(resume.globals["server"])
    for update in resume.globals["updates"]:
        server.receive(*update_of_snapshot(update))
    for index, state in resume.servers.items():
        if (update := unsent_update(index, state["server"], vector.num_teachers)).steps:
            server.receive(update)
    memory.copy_(server.model)
    fresh: dict[str, Any] = {"applied": total, "updates": [], "received": {}, "counters": {}}
    resume.globals = None if has_one else {**fresh, "server": server.state_dict()}
