"""The simulated world: each process has a link to rank 0, where the servers run under a virtual clock."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from lightning_halos.checkpoint.errors import CheckpointError
from lightning_halos.core.algorithms import Algorithm, ServerAlgorithm
from lightning_halos.core.cursor import Lease, split
from lightning_halos.core.messages import Marker, Push, ShardWritten
from lightning_halos.core.parameter_server import ParameterServer
from lightning_halos.core.wire_formats import WireFormats
from lightning_halos.core.worker import WorkerRound
from lightning_halos.simulation.cluster import SimulatedCluster
from lightning_halos.simulation.network import Network, Round, Work
from lightning_halos.simulation.networks import make_network
from lightning_halos.simulation.timing import Timing
from lightning_halos.training.lane_findings import slice_of
from lightning_halos.training.start import Start
from lightning_halos.training.worlds.protocol import CheckpointedWorld
from lightning_halos.training.worlds.simulated_servers import SimulatedServers
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.client import VirtualClient
from lightning_halos.transport.link import GlooLink, Link, LoopbackLink


class SimulatedWorld(SimulatedServers):
    """This process's worker in a simulation, its link to rank 0 and, on rank 0, the servers.

    Args:
        start: The state from which the fit starts.
        cluster: The cluster.
    """

    is_simulated = True

    def __init__(self, start: Start, cluster: SimulatedCluster) -> None:
        site, data, resume, vector, memory = start.site, start.data, start.resume, start.vector, start.memory
        budget, used = start.budget, 0
        timing = Timing.of(cluster, vector.layout, vector.dtype.itemsize)
        begin, earlier = _clock(start, timing)
        offset = 0 if data is None else data.first - budget.total
        schedule: Mapping[str, Any] | None = None
        if resume is not None:
            world = resume.manifest.world
            assert world is not None
            schedule = world["rounds"]
            _refuse_other_rounds(schedule, start.algorithm)
            if start.goes_on_in_data:
                offset = world["offset"]
            if schedule is not None:
                budget.total = world["base"]
                used = resume.worker.get("used", _planned(schedule, site.rank))
            if "model" in resume.worker:
                vector.write(resume.worker["model"])
        ordered = math.inf if budget.max_steps is None else budget.max_steps * budget.workers
        # If the length of the dataset may change, nobody knows how much there is: epochs end where workers end them.
        available = math.inf if data is None or data.may_change else data.end - offset
        end = min(ordered, available)
        work = Work(budget, end, begin=begin, earlier=earlier)
        if data is not None:
            work = dataclasses.replace(
                work, steps_per_epoch=data.steps_per_epoch, offset=offset, ends_with_data=available < ordered
            )
        make = partial(make_network, start.algorithm, site.topology, timing, work, vector.shapes)

        servers, rounds = None, make(None)
        if site.rank == 0:
            become_slice = slice_of(site, site.collectives_of_lanes)

            def prepare(server: ParameterServer) -> None:
                server.num_teachers = vector.num_teachers
                become_slice(server)

            servers = make(memory, prepare)
        if servers is not None and resume is not None and resume.globals is not None:
            servers.load_state_dict(resume.globals)
        if schedule is not None:
            rounds.load_schedule(schedule)
            if servers is not None:
                servers.load_schedule(schedule)
        super().__init__(servers, Alarm(site.here), site.timeout, start.saves, site.lane)
        self._has_snapshots = not start.algorithm.averages_gradients
        if isinstance(start.algorithm, ServerAlgorithm):
            self.wire = start.algorithm.wire.on(cluster.region_of[site.rank], site.topology.group_of(site.rank).region)
        self._client = VirtualClient(self._connect(start), self.alarm, site.timeout, site.interrupted)
        self.client = self._client
        self.alarm.watch(site.timeout)
        if servers is not None:
            self.start()
        rounds.start()
        first = rounds.rounds.get(site.rank)
        # A worker that resumes its round, or has no work, gets a round that does not count.
        self.first_round = WorkerRound(site.rank, 1, budget.total // budget.workers)
        if schedule is None and first is not None and first.steps:
            self.first_round = WorkerRound(site.rank, first.steps, first.position)
        self.leases = iter(())
        if data is not None:
            self.leases = _leases(rounds, site.rank, used, has_more=ordered < available)

    def _connect(self, start: Start) -> Link:
        """Connects this process with rank 0, which connects with all. Returns the worker's end of its link."""
        site = start.site
        describe, region = site.topology.describe, site.groups.region
        there = f"the simulated world of {describe(0)}"
        form = None if start.memory is None else (start.memory.numel(), start.memory.dtype)
        link: Link
        if site.rank > 0:
            link = GlooLink(region[0], 0, there, site.timeout, form)
        else:
            link, its = LoopbackLink.pair(there, describe(0))
            self.attach(0, its)
            for rank in range(1, site.size):
                self.attach(rank, GlooLink(region[rank], 1, describe(rank), site.timeout, form))
            if site.lanes > 1:
                pairs = site.groups.order.items()
                name = site.describe_lane
                self.attach_lanes(
                    {lane: GlooLink(pair, 1 - pair.rank(), name(0, lane), site.timeout) for lane, pair in pairs}
                )
        self.alarm.add(link)
        return link

    @property
    def checkpointed(self) -> CheckpointedWorld | None:
        return self if self._has_snapshots else None

    @property
    def clock(self) -> Callable[[], float] | None:
        return (lambda: self.virtual_seconds) if self.has_global_model else None

    def on_marker(self, save: Callable[[Marker, Push], None]) -> None:
        self._client.on_marker = save

    def tell(self, message: ShardWritten) -> None:
        if self.has_global_model:
            self._written(message)
        else:
            self._client.tell(message)


def _clock(start: Start, timing: Timing) -> tuple[float, int]:
    """Returns the virtual milliseconds, and the local steps, of the runs that this one continues.

    While rounds are in progress, they say the time.
    """
    workers, total = start.site.size, start.budget.total
    if start.algorithm.averages_gradients:  # its checkpoints have no shards, but all its steps take the same time
        step = max(timing.compute(worker, 1) for worker in range(workers)) + timing.all_reduce()
        return total / workers * step, total
    if start.resume is None:
        return 0.0, 0
    world = start.resume.manifest.world
    assert world is not None
    running = 0 if world["rounds"] is None else world["rounds"]["steps"]
    return world.get("milliseconds", 0.0), world.get("steps", running) - running  # version 0.1 did not save them


def _leases(rounds: Network, rank: int, used: int, has_more: bool) -> Iterator[Lease]:
    """Yields the data of a worker's rounds.

    Args:
        rounds: A network that only computes the rounds.
        rank: The worker.
        used: Local steps of the worker's first round that it has already done.
        has_more: Whether there is data after the ordered work, which DataLoader workers may read ahead.
    """
    last = None
    for r in rounds.replay():
        if r.worker == rank:
            for last in split(r.first + rounds.work.offset + used, r.steps - used, rounds.work.steps_per_epoch):
                yield last
            used = 0
    while has_more and last is not None:
        yield last


def _planned(schedule: Mapping[str, Any], rank: int) -> int:
    """Returns the local steps of a worker's first round in a checkpoint, all of which it has computed."""
    rounds = [Round(*fields) for fields in [*schedule.get("pushed", ()), *schedule["running"]]]
    return next((r.steps for r in rounds if r.worker == rank), 0)


def _refuse_other_rounds(schedule: Mapping[str, Any] | None, algorithm: Algorithm) -> None:
    """Refuses rounds in progress that began otherwise than those of the algorithm."""
    overlaps = isinstance(algorithm, ServerAlgorithm) and algorithm.overlap
    if schedule is not None and ("pushed" in schedule) is not overlaps:
        raise CheckpointError(
            f"overlap={overlaps} must be {not overlaps} to resume this checkpoint of a simulation, whose rounds in"
            " progress were saved, too. Pass it to the strategy, or start a new simulation."
        )
    if schedule is None or not isinstance(algorithm, ServerAlgorithm):
        return
    within, between = schedule.get("wire", ("float32", "float32"))
    if WireFormats(within, between) != algorithm.wire:
        raise CheckpointError(
            f"wire={dataclasses.asdict(algorithm.wire)} must be {{'within': {within!r}, 'between': {between!r}}} to"
            " resume this checkpoint of a simulation, whose messages in flight were saved, too. Pass it to the"
            " strategy, or start a new simulation."
        )
