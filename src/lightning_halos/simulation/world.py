"""The simulated world: it takes what workers push, and hands it to the servers in the order of the virtual clock.

Rules of this room: one thread owns the servers and the clock. When a round is due it waits for that round's result and
for no other, so the order of events never depends on how long anything takes on this machine. Rank 0 looks at the
world, or tells it something, only while the world waits for rank 0: that is a moment of virtual time, too.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lightning_halos.checkpoint.manifest import GLOBAL
from lightning_halos.checkpoint.saves import Saves
from lightning_halos.core.messages import Failure, GlobalModel, Marker, Message, Preempted, Pull, Push, ShardWritten
from lightning_halos.core.schedule import StepBudget, global_step
from lightning_halos.simulation.history import Event
from lightning_halos.simulation.rounds import Round, Rounds
from lightning_halos.simulation.servers import Servers
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.link import Filled, Link, whole


class World:
    """Runs a simulation, in a thread of its own.

    Args:
        rounds: Who works when.
        servers: The servers of the algorithm.
        budget: The step budget when the run begins.
        alarm: Where failures go.
        timeout: Seconds that a worker may take for a round.
        saves: The saves under way.
        offset: What to add to :attr:`Round.first`, so that it counts from the first epoch's beginning.

    Attributes:
        history: All that happened so far.
        virtual_ms: Virtual milliseconds at which rank 0's present round ends; after training, at which it ended.
        version: Updates that were in the global model when rank 0's present round began; after training, all.
        steps: Local steps that all workers had finished then.
    """

    def __init__(
        self,
        rounds: Rounds,
        servers: Servers,
        budget: StepBudget,
        alarm: Alarm,
        timeout: float,
        saves: Saves,
        offset: int,
    ) -> None:
        self.history: list[Event] = []
        self.virtual_ms = 0.0
        self._rounds = rounds
        self._servers = servers
        self._servers.record = self.history.append
        self._budget = budget
        self._alarm = alarm
        self._timeout = timeout
        self._saves = saves
        self._offset = offset
        self._ending: Sequence[Round] = ()
        self._links: dict[int, Link] = {}
        self._inboxes: list[queue.SimpleQueue[Push]] = [queue.SimpleQueue() for _ in range(budget.workers)]
        self._moment = threading.Condition()
        self._waits_for_rank_0 = False
        self._stop = self._asked_to_stop = False
        self._plateaus: list[tuple[int, float]] = []
        self._told = [0] * budget.workers
        self._metrics: dict[str, float] = {}
        self._statistics: list[dict[str, Any]] = []
        self._seen = 0
        self.version = self.steps = 0

    def attach(self, rank: int, link: Link) -> None:
        """Connects a worker."""
        self._links[rank] = link
        link.start(lambda message, filled: self._on_push(rank, message, filled), self._alarm.fail)

    def start(self) -> None:
        """Starts the clock, once all workers are connected."""
        running = {r.worker: r for r in self._rounds.running}
        if running:
            idle = []
            self.virtual_ms = running[0].end
            self._look()
        else:
            begun = self._begin(range(self._budget.workers), 0.0)
            idle = sorted(set(range(self._budget.workers)) - begun.keys())
        threading.Thread(target=self._guard, args=(idle,), name="halos world", daemon=True).start()

    def save(self, marker: Marker) -> None:
        """Keeps the servers and the clock as they are at the end of rank 0's present round, but for its push.

        All workers are in a round then. Each keeps what it has when that round is computed, and the round's result.
        """
        with self._rank_0_is_due():
            rounds, state = self._rounds.state_dict(self._ending), self._servers.state_dict()
            for rank, link in self._links.items():
                if rank > 0:
                    link.post(marker)
            progress = self.progress()
        self._saves.know(marker.save, **{**progress, "world": {**self._clock(), "rounds": rounds}})
        self._saves.writer.shard(marker, GLOBAL, state, self._saves.written)

    def settle(self) -> None:
        """Lets the servers take the final model, when the run is over."""
        self._servers.settle()

    def state(self) -> dict[str, Any]:
        """What a later run goes on from, when this one is over and settled."""
        return self._servers.state_dict()

    def progress(self) -> dict[str, Any]:
        """How far the run is: local steps, the data that was handed out, and the clock."""
        done = self._rounds.state_dict()["next"] + self._offset
        return {
            "total": self._budget.total + self._servers.steps,
            "done": [(0, done)] if done else [],
            "world": {**self._clock(), "rounds": None},
        }

    def _clock(self) -> dict[str, Any]:
        return {"base": self._budget.total, "offset": self._offset}

    def seen(self) -> list[Event]:
        """All that had happened when rank 0's present round began; after training, all."""
        return self.history[: self._seen]

    def read(self, out: Tensor) -> None:
        """Copies the global model at the end of rank 0's present round into ``out``; leaves it if there is none."""
        with self._rank_0_is_due():
            if self._servers.model is not None:
                out.copy_(self._servers.model)

    def publish(self, plateaus: Sequence[tuple[int, float]], metrics: dict[str, float]) -> None:
        """Tells everybody what the plateau schedulers of rank 0 were stepped with, and its metrics.

        They learn of it with the first model that they get after rank 0's present round.
        """
        with self._rank_0_is_due():
            self._plateaus += plateaus
            self._metrics = metrics

    def statistics(self) -> list[dict[str, Any]]:
        """Counters of each local server when rank 0's present round began."""
        return self._statistics

    @contextmanager
    def _rank_0_is_due(self) -> Iterator[None]:
        with self._moment:
            while not self._waits_for_rank_0:
                self._alarm.check()
                self._moment.wait(0.2)
            yield

    def _on_push(self, rank: int, message: Message, filled: Filled) -> None:
        if isinstance(message, Failure | Preempted):
            self._alarm.told(message)
            return
        if isinstance(message, ShardWritten):
            self._saves.written(message)
            return
        assert isinstance(message, Push)
        whole(filled)
        self._inboxes[rank].put(message)

    def _guard(self, idle: Sequence[int]) -> None:
        try:
            self._run(idle)
        except Exception as error:
            self._alarm.fail(error)

    def _run(self, idle: Sequence[int]) -> None:
        now, servers = 0.0, self._servers
        for worker in idle:
            self._farewell(worker, now)
        while not servers.finished:
            if servers.next_time() < self._rounds.next_end():
                now = servers.next_time()
                servers.advance()
            else:
                ended = self._rounds.end()
                now = ended[0].end
                self._end(ended)
        self.history.append(Event(now, "end", -1, -1, servers.version, servers.steps))
        self.virtual_ms = now
        self._look()
        final = GlobalModel(servers.version, True, self._asked_to_stop, self._position, servers.model)
        with self._moment:
            self._waits_for_rank_0 = True
        for link in self._links.values():
            link.post(final)

    def _end(self, ended: Sequence[Round]) -> None:
        """Handles rounds that end together: takes their pushes, answers them, and begins the workers' next rounds."""
        now = ended[0].end
        self._ending = ended
        pushes = [self._wait_for(r.worker) for r in ended]
        self._ending = ()
        self._asked_to_stop = self._asked_to_stop or any(push.stop for push in pushes)
        self._stop = self._stop or self._asked_to_stop
        answers = self._servers.receive(ended, pushes)
        going = [push.worker for push in pushes if not push.final]
        begun = {} if self._stop else self._begin(going, now)
        for push, (version, vector) in zip(pushes, answers, strict=True):
            worker = push.worker
            if push.final:
                self._servers.leave(worker, now)
                continue
            told, self._told[worker] = self._told[worker], len(self._plateaus)
            dispatched = begun.get(worker)
            self._links[worker].post(
                Pull(
                    version=version,
                    local_steps=dispatched.steps if dispatched else 1,
                    position=dispatched.position if dispatched else self._position,
                    stop=dispatched is None,
                    plateaus=self._plateaus[told:],
                    metrics=self._metrics,
                    vector=vector,
                )
            )
            if dispatched is None:
                self._farewell(worker, now)

    def _begin(self, workers: Sequence[int], now: float) -> dict[int, Round]:
        begun = {r.worker: r for r in self._rounds.begin(workers, now)}
        if 0 in begun:
            self.virtual_ms = begun[0].end
            self._look()
        return begun

    def _look(self) -> None:
        """Keeps what rank 0 may see until its next round, since the world goes on while it looks."""
        self._statistics = self._servers.statistics()
        self.version, self.steps, self._seen = self._servers.version, self._servers.steps, len(self.history)

    def _farewell(self, worker: int, now: float) -> None:
        """Takes the last push of a worker that has nothing more to do."""
        push = self._wait_for(worker)
        assert push.final, push
        self._asked_to_stop = self._asked_to_stop or push.stop
        self._servers.leave(worker, now)

    def _wait_for(self, worker: int) -> Push:
        with self._moment:
            self._waits_for_rank_0 = worker == 0
            self._moment.notify_all()
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                push = self._inboxes[worker].get(timeout=min(1.0, self._timeout))
                break
            except queue.Empty:
                if self._alarm.is_over:
                    raise
                if time.monotonic() > deadline:
                    raise self._alarm.lost(self._links[worker].peer, "finish its round", self._timeout) from None
        with self._moment:
            self._waits_for_rank_0 = False
        return push

    @property
    def _position(self) -> int:
        budget = self._budget
        return global_step(budget.total + self._servers.steps, budget.workers, budget.max_steps)
