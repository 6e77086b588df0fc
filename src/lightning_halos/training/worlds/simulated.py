"""The simulated world: each process has a link to rank 0, where the servers run under a virtual clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_halos.core.cursor import Lease, split
from lightning_halos.core.messages import Marker, Push, ShardWritten
from lightning_halos.core.worker import WorkerRound
from lightning_halos.simulation.cluster import SimulatedCluster
from lightning_halos.simulation.history import Event
from lightning_halos.simulation.network import Work, make_network
from lightning_halos.simulation.timing import Timing
from lightning_halos.training.start import Start
from lightning_halos.training.worlds.protocol import CheckpointedWorld
from lightning_halos.training.worlds.simulation import Simulation
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.client import WorkerClient
from lightning_halos.transport.link import GlooLink, Link, LoopbackLink


class SimulatedWorld:
    """This process's link to the simulation, and on rank 0 the simulation.

    Args:
        start: The state from which the fit starts.
        cluster: The cluster.
    """

    is_simulated = True

    def __init__(self, start: Start, cluster: SimulatedCluster) -> None:
        site, data, resume, vector, memory = start.site, start.data, start.resume, start.vector, start.memory
        budget, used = start.budget, 0
        offset = 0 if data is None else data.first - budget.total
        schedule: Mapping[str, Any] | None = None
        if resume is not None:
            world = resume.manifest.world
            assert world is not None
            schedule = world["rounds"]
            if start.goes_on_in_data:
                offset = world["offset"]
            if schedule is not None:
                budget.total = world["base"]
                used = resume.worker.get("used", _planned(schedule, site.rank))
            if "model" in resume.worker:
                vector.write(resume.worker["model"])
        ordered = math.inf if budget.max_steps is None else budget.max_steps * budget.workers
        available = math.inf if data is None else data.end - offset
        end = min(ordered, available)
        work = Work(budget, end) if data is None else Work(budget, end, data.steps_per_epoch, offset)
        timing = Timing(cluster, cluster.message_bytes or vector.num_elements * vector.dtype.itemsize)
        make = partial(make_network, start.algorithm, site.topology, timing, work, vector.shapes)

        self.alarm = Alarm(site.topology.describe(site.rank))
        self._simulation: Simulation | None = None
        self._rank = site.rank
        self._work = work
        self._schedule = schedule
        self._make_rounds = partial(make, None)
        self._averages_gradients = start.algorithm.averages_gradients
        form = None if memory is None else (memory.numel(), memory.dtype)
        there = f"the simulated world of {site.topology.describe(0)}"
        link: Link
        if site.rank == 0:
            network = make(memory)
            if resume is not None and resume.globals is not None:
                network.load_state_dict(resume.globals)
            if schedule is not None:
                network.load_schedule(schedule)
            self._simulation = Simulation(network, work, self.alarm, site.timeout, start.saves)
            link = self._connect(self._simulation, start, there, form)
        else:
            assert site.groups.region is not None
            link = GlooLink(site.groups.region, 0, there, site.timeout, form)
            self.alarm.add(link)
        self.client = WorkerClient(link, self.alarm, site.timeout, site.interrupted)
        self.alarm.watch(site.timeout)
        if self._simulation is not None:
            self._simulation.start()
        self.first_round = self._first_round()
        self.leases: Iterator[Lease] = iter(()) if data is None else self._leases(used, has_more=ordered < available)

    def _connect(self, simulation: Simulation, start: Start, there: str, form: tuple[int, torch.dtype] | None) -> Link:
        """Connects all workers with the simulation. Returns this process's own worker's end."""
        site = start.site
        mine, its = LoopbackLink.pair(there, site.topology.describe(0))
        self.alarm.add(mine, its)
        simulation.attach(0, its)
        for rank in range(1, site.size):
            assert site.groups.region is not None
            link = GlooLink(site.groups.region, rank, site.topology.describe(rank), site.timeout, form)
            self.alarm.add(link)
            simulation.attach(rank, link)
        return mine

    def _first_round(self) -> WorkerRound:
        budget = self._work.budget
        if self._schedule is None:
            network = self._make_rounds()
            network.start()
            if (first := network.rounds[self._rank]).steps:
                return WorkerRound(self._rank, first.steps, first.position)
        # The worker resumes its round, or there is less work than workers.
        return WorkerRound(self._rank, 1, budget.total // budget.workers)

    def _leases(self, used: int, has_more: bool) -> Iterator[Lease]:
        """Yields the data of the worker's rounds.

        Args:
            used: Local steps of the worker's first round that it has already done.
            has_more: Whether there is data after the ordered work, which DataLoader workers may read ahead.
        """
        network, last = self._make_rounds(), None
        if self._schedule is not None:
            network.load_schedule(self._schedule)
        for r in network.replay():
            if r.worker == self._rank:
                for last in split(r.first + self._work.offset + used, r.steps - used, self._work.steps_per_epoch):
                    yield last
                used = 0
        while has_more and last is not None:
            yield last

    @property
    def checkpointed(self) -> CheckpointedWorld | None:
        return None if self._averages_gradients else self

    @property
    def clock(self) -> Callable[[], float] | None:
        return None if self._simulation is None else lambda: self.virtual_seconds

    @property
    def history(self) -> list[Event]:
        """The events before the start of rank 0's present round; after training, all events. Only on rank 0."""
        return [] if self._simulation is None else self._simulation.visible_history()

    @property
    def virtual_seconds(self) -> float:
        """Virtual time: the end of rank 0's present round; after training, the end of the run."""
        return 0.0 if self._simulation is None else self._simulation.virtual_ms / 1e3

    @property
    def has_global_model(self) -> bool:
        return self._simulation is not None

    @property
    def version(self) -> int:
        return self._here.version

    @property
    def steps(self) -> int:
        return self._here.steps

    def read(self, out: Tensor) -> None:
        self._here.read(out)

    def publish(self, plateau_steps: Sequence[tuple[int, float]], metrics: dict[str, float]) -> None:
        self._here.publish(plateau_steps, metrics)

    def statistics(self) -> list[dict[str, Any]]:
        return self._here.statistics()

    def on_marker(self, save: Callable[[Marker, Push], None]) -> None:
        self.client.on_marker = save

    def tell(self, message: ShardWritten) -> None:
        self.client.tell(message)

    def start_snapshot(self, marker: Marker) -> None:
        self._here.start_snapshot(marker)

    def adopt_final_model(self, model: Tensor) -> None:
        if self._simulation is not None:
            self._simulation.adopt_final_model()

    def state(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        return None, None if self._simulation is None else self._simulation.state()

    def progress(self) -> dict[str, Any]:
        return self._here.progress()

    def close(self, timeout: float) -> None:
        self.alarm.close(timeout)

    @property
    def _here(self) -> Simulation:
        assert self._simulation is not None
        return self._simulation


def _planned(schedule: Mapping[str, Any], rank: int) -> int:
    """Returns the local steps of a worker's round in a checkpoint, all of which it has computed."""
    return sum(steps for worker, _, _, _, steps, _ in schedule["running"] if worker == rank)
