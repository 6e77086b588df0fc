"""The servers of a simulation: a thread on rank 0, which runs them under a virtual clock with all workers' pushes.

With workers of several processes, each process of rank 0's worker has such a thread for its slice of the model. All of
them see the same events at the same virtual times.

When a round ends, the thread waits for the push of that round and for no other, so the order of events does not depend
on this machine's timing. Rank 0 reads or changes the network only while the thread waits for rank 0, which is a defined
moment of virtual time.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lightning_halos.checkpoint.manifest import global_shard
from lightning_halos.checkpoint.saves import Saves
from lightning_halos.core.messages import Failure, Marker, Message, Preempted, Push, ShardWritten
from lightning_halos.simulation.history import Event
from lightning_halos.simulation.network import Network
from lightning_halos.training.worlds.protocol import World
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.lanes import Lanes
from lightning_halos.transport.link import Link, wait_all


class SimulatedServers(World):
    """The servers of a simulation, if this process has rank 0.

    Args:
        network: The servers; ``None`` on other ranks, where nothing but ``alarm`` may be used.
        alarm: The alarm to report failures to.
        timeout: Limit for the wait for a worker's round, in seconds.
        saves: The record of saves.
        lane: Lane of this process in its worker.

    Attributes:
        virtual_seconds: Virtual time: the end of rank 0's present round; after training, the end of the run.
        version: Number of updates in the global model at the start of rank 0's present round; after training, at the
            end.
        steps: Local steps of this run that all workers together had finished then.
    """

    version = steps = 0

    def __init__(self, network: Network | None, alarm: Alarm, timeout: float, saves: Saves, lane: int = 0) -> None:
        self.alarm = alarm
        self.virtual_seconds = 0.0
        self._network = network
        self._timeout = timeout
        self._saves = saves
        self._lane = lane
        self._lanes: Lanes | None = None
        self._links: dict[int, Link] = {}
        self._inboxes: dict[int, queue.SimpleQueue[Push]] = {}
        self._moment = threading.Condition()
        self._waits_for_rank_0 = False
        self._statistics: list[dict[str, Any]] = []
        self._seen = 0

    @property
    def has_global_model(self) -> bool:
        return self._network is not None

    @property
    def history(self) -> list[Event]:
        """The events before the start of rank 0's present round; after training, all events. Empty on other ranks."""
        return [] if self._network is None else self._network.history[: self._seen]

    def read(self, out: Tensor) -> None:
        """Copies the global model at the end of rank 0's present round into ``out``, if the algorithm has one."""
        with self._rank_0_is_due() as network:
            if network.model is not None:
                out.copy_(network.model)

    def publish(self, plateau_steps: Sequence[tuple[int, float]], metrics: dict[str, float], callbacks: str) -> None:
        """Workers get them with their first model after rank 0's present round."""
        with self._rank_0_is_due() as network:
            network.publish(plateau_steps, metrics)

    def statistics(self) -> list[dict[str, Any]]:
        """Returns the counters of each local server at the start of rank 0's present round."""
        return self._statistics

    def start_snapshot(self, marker: Marker) -> None:
        """Takes a snapshot at the end of rank 0's present round, before its push.

        All other workers are in a round then, or have finished. Each saves its state and its push after that round.
        """
        with self._rank_0_is_due() as network:
            state, progress = network.state_dict(), self.progress()
            progress["world"]["rounds"] = network.schedule()
            for rank, link in self._links.items():
                if rank > 0:
                    link.post(marker)
        if self._lane == 0:
            self._saves.complete_manifest(marker.save, **progress)
        self._saves.writer.shard(marker, global_shard(self._lane), state, self._written)

    def adopt_final_model(self, model: Tensor) -> None:
        if self._network is not None:
            self._network.adopt_final_model()

    def state(self) -> tuple[None, dict[str, Any] | None]:
        return None, None if self._network is None else self._network.state_dict()

    def progress(self) -> dict[str, Any]:
        """Returns the progress of the run: local steps, leased data, the start that both are counted from, and time."""
        assert self._network is not None
        network = self._network
        work, end = network.work, network.handed_out
        world = {"base": work.budget.total, "offset": work.offset, "rounds": None}
        return {
            "total": network.total,
            "done": [(0, end)] if end else [],
            "world": {**world, "milliseconds": network.now, "steps": work.earlier + network.steps},
        }

    def attach_lanes(self, links: Mapping[int, Link]) -> None:
        """Connects the processes of rank 0's worker: by lane, the others on lane 0, and lane 0 on the others."""
        self._lanes = Lanes(self._lane, links, self.alarm, self._saves.written)
        self.alarm.add(*links.values())
        self._lanes.start()

    def attach(self, rank: int, link: Link) -> None:
        """Connects a worker."""
        self._links[rank], self._inboxes[rank] = link, queue.SimpleQueue()
        self.alarm.add(link)
        link.start(lambda message, progress: self._on_message(rank, message, progress), self.alarm.fail)

    def start(self) -> None:
        """Starts the clock, when all workers are connected."""
        assert self._network is not None
        self._network.start()
        self._update_view(self._network)
        threading.Thread(target=self._run, args=(self._network,), name="halos world", daemon=True).start()

    def _written(self, message: ShardWritten) -> None:
        """Records that a shard has been written, or tells the process that keeps the record."""
        if self._lane == 0:
            self._saves.written(message)
        else:
            assert self._lanes is not None
            self._lanes.post(message)

    @contextmanager
    def _rank_0_is_due(self) -> Iterator[Network]:
        assert self._network is not None
        with self._moment:
            while not self._waits_for_rank_0:
                self.alarm.check()
                self._moment.wait(0.2)
            yield self._network

    def _on_message(self, rank: int, message: Message, progress: Iterable[int]) -> None:
        if isinstance(message, Failure | Preempted):
            self.alarm.receive(message)
        elif isinstance(message, ShardWritten):
            self._written(message)
        else:
            assert isinstance(message, Push)
            wait_all(progress)
            self._inboxes[rank].put(message)

    def _run(self, network: Network) -> None:
        try:
            while rounds := network.due():
                self._deliver(network)
                network.finish([self._wait_for(ending.worker) for ending in rounds])
                if rounds[0].worker == 0:
                    self._update_view(network)
                self._deliver(network)
            self._deliver(network)
        except Exception as error:
            self.alarm.fail(error)

    def _deliver(self, network: Network) -> None:
        if network.finished:
            self._update_view(network)
            with self._moment:
                self._waits_for_rank_0 = True
        outbox, network.outbox = network.outbox, []
        for rank, message in outbox:
            self._links[rank].post(message)

    def _update_view(self, network: Network) -> None:
        """Copies what rank 0 may see until its next round, because the simulation goes on meanwhile."""
        self._statistics = network.statistics()
        self.version, self.steps, self._seen = network.version, network.steps, len(network.history)
        self.virtual_seconds = (network.rounds[0].end if 0 in network.rounds else network.now) / 1e3

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
                if self.alarm.is_over:
                    raise
                if time.monotonic() > deadline:
                    raise self.alarm.peer_lost(self._links[worker].peer, "finish its round", self._timeout) from None
        with self._moment:
            self._waits_for_rank_0 = False
        return push
