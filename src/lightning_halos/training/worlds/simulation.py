"""The simulation on rank 0, which delivers the pushes of the worker processes under a virtual clock.

One thread owns the network of nodes. When a round ends, it waits for the push of that round and for no other, so the
order of events does not depend on this machine's timing. Rank 0 reads or changes the network only while the thread
waits for rank 0, which is a defined moment of virtual time.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lightning_halos.checkpoint.manifest import GLOBAL_SHARD
from lightning_halos.checkpoint.saves import Saves
from lightning_halos.core.messages import Failure, Marker, Message, Preempted, Push, ShardWritten
from lightning_halos.simulation.history import Event
from lightning_halos.simulation.network import Network, Work
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.link import Link, wait_all


class Simulation:
    """Runs a network with the pushes of real workers, in a thread of its own.

    Args:
        network: The network.
        work: The work that it was made for.
        alarm: The alarm to report failures to.
        timeout: Limit for the wait for a worker's round, in seconds.
        saves: The record of saves.

    Attributes:
        virtual_ms: Virtual time in milliseconds: the end of rank 0's present round; after training, the end of the run.
        version: Number of updates in the global model at the start of rank 0's present round; after training, at the
            end.
        steps: Local steps of this run that all workers together had finished then.
    """

    def __init__(self, network: Network, work: Work, alarm: Alarm, timeout: float, saves: Saves) -> None:
        self.virtual_ms = 0.0
        self.version = self.steps = 0
        self._network = network
        self._work = work
        self._alarm = alarm
        self._timeout = timeout
        self._saves = saves
        self._links: dict[int, Link] = {}
        self._inboxes: list[queue.SimpleQueue[Push]] = [queue.SimpleQueue() for _ in range(work.budget.workers)]
        self._moment = threading.Condition()
        self._waits_for_rank_0 = False
        self._statistics: list[dict[str, Any]] = []
        self._seen = 0

    def attach(self, rank: int, link: Link) -> None:
        """Connects a worker."""
        self._links[rank] = link
        link.start(lambda message, progress: self._on_message(rank, message, progress), self._alarm.fail)

    def start(self) -> None:
        """Starts the clock, when all workers are connected."""
        self._network.start()
        self._update_view()
        threading.Thread(target=self._guard, name="halos world", daemon=True).start()

    def start_snapshot(self, marker: Marker) -> None:
        """Takes a snapshot at the end of rank 0's present round, before its push.

        All other workers are in a round then, or have finished. Each saves its state and its push after that round.
        """
        with self._rank_0_is_due():
            state, progress = self._network.state_dict(), self.progress()
            progress["world"]["rounds"] = self._network.schedule()
            for rank, link in self._links.items():
                if rank > 0:
                    link.post(marker)
        self._saves.complete_manifest(marker.save, **progress)
        self._saves.writer.shard(marker, GLOBAL_SHARD, state, self._saves.written)

    def adopt_final_model(self) -> None:
        """Replaces the local servers' models by the final model, when the run is over."""
        self._network.adopt_final_model()

    def state(self) -> dict[str, Any]:
        """Returns the state from which a later run can continue, after the end of this one."""
        return self._network.state_dict()

    def progress(self) -> dict[str, Any]:
        """Returns the progress of the run: local steps, the leased data, and the start that both are counted from."""
        end = self._network.handed_out
        return {
            "total": self._network.total,
            "done": [(0, end)] if end else [],
            "world": {"base": self._work.budget.total, "offset": self._work.offset, "rounds": None},
        }

    def visible_history(self) -> list[Event]:
        """Returns the events before the start of rank 0's present round; after training, all events."""
        return self._network.history[: self._seen]

    def read(self, out: Tensor) -> None:
        """Copies the global model at the end of rank 0's present round into ``out``, if the algorithm has one."""
        with self._rank_0_is_due():
            if self._network.model is not None:
                out.copy_(self._network.model)

    def publish(self, plateau_steps: Sequence[tuple[int, float]], metrics: dict[str, float]) -> None:
        """Sends the steps of rank 0's plateau schedulers, and its metrics, to all workers.

        Workers get them with their first model after rank 0's present round.
        """
        with self._rank_0_is_due():
            self._network.publish(plateau_steps, metrics)

    def statistics(self) -> list[dict[str, Any]]:
        """Returns the counters of each local server at the start of rank 0's present round."""
        return self._statistics

    @contextmanager
    def _rank_0_is_due(self) -> Iterator[None]:
        with self._moment:
            while not self._waits_for_rank_0:
                self._alarm.check()
                self._moment.wait(0.2)
            yield

    def _on_message(self, rank: int, message: Message, progress: Iterable[int]) -> None:
        if isinstance(message, Failure | Preempted):
            self._alarm.receive(message)
            return
        if isinstance(message, ShardWritten):
            self._saves.written(message)
            return
        assert isinstance(message, Push)
        wait_all(progress)
        self._inboxes[rank].put(message)

    def _guard(self) -> None:
        try:
            self._run()
        except Exception as error:
            self._alarm.fail(error)

    def _run(self) -> None:
        network = self._network
        while rounds := network.due():
            self._deliver()
            network.finish([self._wait_for(ending.worker) for ending in rounds])
            if rounds[0].worker == 0:
                self._update_view()
            self._deliver()
        self._deliver()

    def _deliver(self) -> None:
        if self._network.finished:
            self._update_view()
            with self._moment:
                self._waits_for_rank_0 = True
        outbox, self._network.outbox = self._network.outbox, []
        for rank, message in outbox:
            self._links[rank].post(message)

    def _update_view(self) -> None:
        """Copies what rank 0 may see until its next round, because the simulation goes on meanwhile."""
        network = self._network
        self._statistics = network.statistics()
        self.version, self.steps, self._seen = network.version, network.steps, len(network.history)
        self.virtual_ms = network.rounds[0].end if 0 in network.rounds else network.now

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
                    raise self._alarm.peer_lost(self._links[worker].peer, "finish its round", self._timeout) from None
        with self._moment:
            self._waits_for_rank_0 = False
        return push
