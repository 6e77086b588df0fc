"""The real world of algorithms with servers: links between processes, and servers in threads next to the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_halos.checkpoint.manifest import GLOBAL_SHARD, server_shard
from lightning_halos.checkpoint.resume import Resume
from lightning_halos.core.algorithms import ServerAlgorithm
from lightning_halos.core.cursor import DataCursor, Lease, Spans
from lightning_halos.core.messages import Marker, Push, RegionUpdate, Shard
from lightning_halos.core.servers import unsent_update
from lightning_halos.core.worker import WorkerRound
from lightning_halos.training.start import Start
from lightning_halos.training.worlds.protocol import CheckpointedWorld
from lightning_halos.transport.runtime import NodeRuntime


class RealWorld(NodeRuntime):
    """This process's servers and links.

    Args:
        start: The state from which the fit starts. In a resumed run its memory and module are overwritten with the
            model to resume from.
    """

    is_simulated = False
    clock = None

    def __init__(self, start: Start) -> None:
        site, algorithm, memory, data, resume = start.site, start.algorithm, start.memory, start.data, start.resume
        assert isinstance(algorithm, ServerAlgorithm)
        assert memory is not None
        self._saves = start.saves
        budget, done = start.budget, start.done()
        if resume is not None:
            if not resume.fits and site.rank == 0:
                servers = len(site.topology.groups)
                rebuild(resume, memory, start.vector.shapes, algorithm, servers, budget.total)
            _share_model(start, memory, resume)
        super().__init__(
            site.rank,
            site.topology,
            site.groups,
            algorithm,
            memory,
            start.vector.shapes,
            budget,
            None if data is None else DataCursor(data.steps_per_epoch, data.epochs, Spans(done)),
            site.timeout,
            site.interrupted,
            self._write,
            start.saves.written,
            done,
            None if resume is None else resume.server,
            None if resume is None else resume.globals,
        )
        local_steps = algorithm.planner(site.size, budget.max_steps).local_steps(site.rank, budget.total)
        position = start.trainer.global_step if resume is None else budget.position
        self.first_round = WorkerRound(site.rank, local_steps, position)
        self.leases: Iterator[Lease] = self.client.leases()

    @property
    def checkpointed(self) -> CheckpointedWorld:
        return self

    def on_marker(self, save: Callable[[Marker, Push], None]) -> None:
        self.client.on_marker = save

    def start_snapshot(self, marker: Marker) -> bool:
        has_begun = super().start_snapshot(marker)
        if not has_begun:
            self._saves.fail(marker.save, "the run has ended meanwhile")
        return has_begun

    def _write(self, shard: Shard, complete: Callable[[], None]) -> None:
        """Writes a server's part of a snapshot in the background, and tells rank 0."""
        if shard.server is None:
            name, tell = GLOBAL_SHARD, self._saves.written
            self._saves.complete_manifest(shard.marker.save, **shard.progress)
        else:
            name, tell = server_shard(shard.server), self.tell
        self._saves.writer.shard(shard.marker, name, shard.state, tell, complete)


def _share_model(start: Start, memory: Tensor, resume: Resume) -> None:
    """Gives the workers the model to resume from: that of their server or, with new servers, the global model."""
    if resume.server is not None:
        memory.copy_(resume.server["server"]["model"])
    if resume.fits:
        start.site.broadcast_from_leader_(memory)
    else:
        start.site.collectives.broadcast_([memory])
    start.vector.write(memory)
    if not start.vector.lossless:
        start.vector.read(memory)


def rebuild(
    resume: Resume, memory: Tensor, shapes: Sequence[torch.Size], algorithm: ServerAlgorithm, servers: int, total: int
) -> None:
    """Flushes the old servers of a checkpoint, on rank 0, so that new servers can start from the global model.

    Updates in flight, and unsent updates of the local servers, are applied to the global model.

    Args:
        resume: The state to resume from. Its global state is replaced by the state after the flush, and its server
            state by that of the only old server, if there was only one.
        memory: Is overwritten with the global model.
        shapes: Shapes of the parameters in it.
        algorithm: The algorithm.
        servers: Number of local servers of the new run.
        total: Local steps at the start of the new run.
    """
    assert resume.globals is not None
    had_one, has_one = len(resume.manifest.groups) == 1, servers == 1
    fresh: dict[str, Any] = {"server": None, "applied": total, "updates": [], "received": {}, "counters": {}}
    if had_one:
        only = resume.servers[0]
        memory.copy_(only["server"]["model"])
        if has_one:
            resume.server = {**only, "server": {**only["server"], "steps": 0}}
        resume.globals = fresh if has_one else None
        return
    server = algorithm.global_server(len(resume.manifest.groups), memory.clone(), shapes)
    assert server is not None
    server.load_state_dict(resume.globals["server"])
    for update in resume.globals["updates"]:
        server.receive(RegionUpdate(**update))
    for index, state in resume.servers.items():
        if (update := unsent_update(index, state["server"])).steps:
            server.receive(update)
    memory.copy_(server.model)
    resume.globals = fresh if has_one else {**fresh, "server": server.state_dict()}
