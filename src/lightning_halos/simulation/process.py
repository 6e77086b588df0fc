"""What one process of a simulation runs besides its training: a link to the world, which is on rank 0.

Rules of this room: it offers what :class:`~lightning_halos.transport.process.Process` offers, so that nobody who trains
knows in which world he does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_halos.checkpoint.saves import Saves
from lightning_halos.core.cursor import Lease
from lightning_halos.core.messages import Marker
from lightning_halos.core.schedule import StepBudget
from lightning_halos.core.worker import WorkerRound
from lightning_halos.simulation.algorithms import Simulated
from lightning_halos.simulation.rounds import Rounds
from lightning_halos.simulation.timing import Timing
from lightning_halos.simulation.world import World
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.client import WorkerClient
from lightning_halos.transport.groups import Groups
from lightning_halos.transport.link import GlooLink, Link, LoopbackLink


class SimulatedProcess:
    """The links of one process of a simulation, during one fit.

    Args:
        rank: Global rank of this process.
        describe: Names a worker in errors, by rank and region.
        groups: Process groups whose ``region`` is all workers.
        algorithm: The algorithm.
        timing: The durations on the cluster.
        model: The initial model, which stays as it is; ``None`` if no models are exchanged.
        shapes: Shapes of the parameters in it.
        budget: The step budget.
        data: Local steps' worth of data that there is; infinite if it has no end, or the workers do not share it.
        timeout: Seconds of silence after which a peer counts as lost.
        interrupted: Called several times a second while the worker waits; may raise.
        saves: The saves under way.
        offset: What to add to local steps that were handed out, so that they count from the first epoch's beginning.
        rounds: The rounds to go on from; ``None`` if the run begins with new ones.
        state: The servers to go on from.

    Attributes:
        alarm: Where failures go.
        client: The worker's end of its link.
        world: The world; ``None`` on all ranks but 0.
    """

    def __init__(
        self,
        rank: int,
        describe: Callable[[int], str],
        groups: Groups,
        algorithm: Simulated,
        timing: Timing,
        model: Tensor | None,
        shapes: Sequence[torch.Size],
        budget: StepBudget,
        data: float,
        timeout: float,
        interrupted: Callable[[], None],
        saves: Saves,
        offset: int = 0,
        rounds: Mapping[str, Any] | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.alarm = Alarm(describe(rank))
        self.world: World | None = None
        self._rank = rank
        self._describe = describe
        self._workers = budget.workers
        self._done = budget.total
        ordered = math.inf if budget.max_steps is None else budget.max_steps * budget.workers - budget.total
        self._has_more_data = ordered < data
        self._offset = offset
        self._make_rounds = partial(algorithm.rounds, timing, budget.total, min(ordered, data))
        self._running = rounds
        form = None if model is None else (model.numel(), model.dtype)
        link: Link
        if rank == 0:
            servers = algorithm.servers(timing, model, shapes)
            if state is not None:
                servers.load_state_dict(state)
                if rounds is None:
                    servers.steps = 0  # those are in the budget
            self.world = World(self._rounds(), servers, budget, self.alarm, timeout, saves, offset)
            link = self._connect(self.world, groups, timeout, form)
        else:
            assert groups.region is not None
            link = GlooLink(groups.region, 0, self._world_of_rank_0, timeout, form)
            self.alarm.add(link)
        self.client = WorkerClient(link, self.alarm, timeout, interrupted)
        self.alarm.watch(timeout)
        if self.world is not None:
            self.world.start()

    def _connect(self, world: World, groups: Groups, timeout: float, form: tuple[int, torch.dtype] | None) -> Link:
        """Connects all workers with the world. Returns this process's own worker's end."""
        mine, its = LoopbackLink.pair(self._world_of_rank_0, self._describe(0))
        self.alarm.add(mine, its)
        world.attach(0, its)
        for rank in range(1, self._workers):
            assert groups.region is not None
            link = GlooLink(groups.region, rank, self._describe(rank), timeout, form)
            self.alarm.add(link)
            world.attach(rank, link)
        return mine

    @property
    def _world_of_rank_0(self) -> str:
        return f"the simulated world of {self._describe(0)}"

    def _rounds(self) -> Rounds:
        rounds = self._make_rounds()
        if self._running is not None:
            rounds.load_state_dict(self._running)
        return rounds

    def save(self, marker: Marker) -> None:
        """Keeps the world as it is at the end of rank 0's present round."""
        assert self.world is not None
        self.world.save(marker)

    def settle(self, model: Tensor) -> None:
        """Lets the servers take the final model, when the run is over."""
        if self.world is not None:
            self.world.settle()

    def state(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """What a later run goes on from, when this one is over: of a local server nothing, the world has them all."""
        return None, None if self.world is None else self.world.state()

    def progress(self) -> dict[str, Any]:
        """How far the run is: local steps, the data that was handed out, and the clock."""
        assert self.world is not None
        return self.world.progress()

    def make_first_round(self) -> WorkerRound:
        """Returns the worker's first round, which begins without a message."""
        if self._running is not None:  # the worker has its round already
            return WorkerRound(self._rank, 1, self._done // self._workers)
        begun = {r.worker: r for r in self._rounds().begin(range(self._workers), 0.0)}
        if self._rank not in begun:  # there is less data than workers
            return WorkerRound(self._rank, 1, self._done // self._workers)
        return WorkerRound(self._rank, begun[self._rank].steps, begun[self._rank].position)

    def make_leases(self, steps_per_epoch: int, done: int = 0) -> Iterator[Lease]:
        """Yields the data of the worker's rounds.

        Args:
            steps_per_epoch: Local steps' worth of data in an epoch.
            done: Local steps of the worker's first round that it has done already.
        """
        return self._rounds().leases(self._rank, steps_per_epoch, self._offset, self._has_more_data, done)

    @property
    def has_global_model(self) -> bool:
        """Whether this process is the one that can read the global model."""
        return self.world is not None

    @property
    def version(self) -> int:
        """Updates that are in the global model."""
        assert self.world is not None
        return self.world.version

    @property
    def steps(self) -> int:
        """Local steps that are in the global model."""
        assert self.world is not None
        return self.world.steps

    def read(self, out: Tensor) -> None:
        """Copies the global model into the vector ``out``."""
        assert self.world is not None
        self.world.read(out)

    def publish(self, plateaus: Sequence[tuple[int, float]], metrics: dict[str, float]) -> None:
        """Tells everybody what the plateau schedulers of rank 0 were stepped with, and its metrics."""
        assert self.world is not None
        self.world.publish(plateaus, metrics)

    def statistics(self) -> list[dict[str, Any]]:
        """The counters of each local server; see :class:`~lightning_halos.HalosMonitor`."""
        assert self.world is not None
        return self.world.statistics()

    def close(self, timeout: float) -> None:
        """Says goodbye to all peers and waits for theirs, for so many seconds at most."""
        self.alarm.close(timeout)
