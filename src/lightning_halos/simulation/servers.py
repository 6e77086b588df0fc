"""The servers of each algorithm under the virtual clock.

Rules of this room: the servers are those of ``core``; what is here puts their messages on the way and says when they
arrive. No threads, no waiting: the world brings the pushes.
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_halos.core.messages import GlobalModel, Push, RegionUpdate
from lightning_halos.core.servers import GlobalServer, LocalServer, SynchronousServer
from lightning_halos.core.topology import ServerGroup
from lightning_halos.simulation.cluster import SimulatedCluster
from lightning_halos.simulation.history import Event
from lightning_halos.simulation.rounds import Round
from lightning_halos.simulation.timing import Timing

Answer = tuple[int, Tensor | None]
"""Version and vector of the model for a worker to go on from."""
Record = Callable[[Event], None]


class Servers(ABC):
    """What the world asks of an algorithm's servers.

    Attributes:
        record: Told everything that happens. To be set before anything does.
        steps: Local steps behind all pushes.
    """

    record: Record
    steps: int = 0

    @property
    @abstractmethod
    def model(self) -> Tensor | None:
        """The global model; ``None`` if the workers have it themselves."""

    @property
    @abstractmethod
    def version(self) -> int:
        """Updates that are in the global model."""

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether the global model is final."""

    @abstractmethod
    def receive(self, rounds: Sequence[Round], pushes: Sequence[Push]) -> list[Answer]:
        """Handles the pushes of rounds that end at the same moment. Returns the answers, in their order."""

    @abstractmethod
    def leave(self, worker: int, now: float) -> None:
        """A worker takes part in no further round."""

    def next_time(self) -> float:
        """Virtual milliseconds at which the next message between servers arrives; infinity if none is on its way."""
        return math.inf

    def advance(self) -> None:
        """Handles the next message between servers.

        Raises:
            NotImplementedError: If there are no such messages.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of all servers and of what is on its way between them: tensors and plain values.

        Raises:
            NotImplementedError: If there are no servers.
        """
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of :meth:`state_dict`.

        Raises:
            NotImplementedError: If there are no servers.
        """
        raise NotImplementedError

    def settle(self) -> None:
        """Lets all servers take the final global model, so that a later run can go on from there.

        Raises:
            NotImplementedError: If there are no servers.
        """
        raise NotImplementedError

    def statistics(self) -> list[dict[str, Any]]:
        """Counters for monitoring, a dictionary for each local server; see :class:`~lightning_halos.HalosMonitor`."""
        return []

    def _count(self, pushes: Sequence[Push]) -> None:
        self.steps += sum(push.steps for push in pushes)


class RegionServers(Servers):
    """The local servers, and the global server unless a single local server serves everybody.

    Args:
        groups: The local servers and their workers.
        regions: Region of each local server.
        locals_: The local servers.
        global_: The global server, ``None`` for Async-Local-SGD.
        timing: The durations.
    """

    def __init__(
        self,
        groups: Sequence[ServerGroup],
        regions: Sequence[int],
        locals_: Sequence[LocalServer],
        global_: GlobalServer | None,
        timing: Timing,
    ) -> None:
        self._groups = groups
        self._regions = regions
        self._locals = locals_
        self._global = global_
        self._timing = timing
        self._home = timing.cluster.global_region
        self._on_their_way: list[tuple[float, int, int, RegionUpdate | GlobalModel]] = []
        self._sent = 0
        self._flushed: set[int] = set()
        self._here = {group.index: set(group.ranks) for group in groups}
        self._group_of = {rank: group.index for group in groups for rank in group.ranks}
        self._counters: list[defaultdict[str, float]] = [defaultdict(float) for _ in groups]
        self._shares: dict[int, float] = {}

    @property
    def model(self) -> Tensor:
        return self._locals[0].model if self._global is None else self._global.model

    @property
    def version(self) -> int:
        return self._locals[0].version if self._global is None else self._global.version

    @property
    def finished(self) -> bool:
        return not any(self._here.values()) if self._global is None else len(self._flushed) == len(self._groups)

    def receive(self, rounds: Sequence[Round], pushes: Sequence[Push]) -> list[Answer]:
        ((finished, push),) = zip(rounds, pushes, strict=True)
        index = self._group_of[finished.worker]
        server = self._locals[index]
        self._count(pushes)
        rejected = server.rejected
        vector, update = server.receive(push)
        if push.vector is not None:
            stale = server.staleness if server.rejected == rejected else 0
            self._note(finished.end, "push", server, index, finished.worker, stale)
            self._measure(finished, index, stale)
        if update is not None:
            self._send(finished.end, index, update)
        return [(server.version, vector)]

    def leave(self, worker: int, now: float) -> None:
        index = self._group_of[worker]
        self._here[index].remove(worker)
        if not self._here[index] and self._global is not None:
            self._send(now, index, self._locals[index].flush())

    def next_time(self) -> float:
        return self._on_their_way[0][0] if self._on_their_way else math.inf

    def advance(self) -> None:
        assert self._global is not None
        now, _, index, message = heapq.heappop(self._on_their_way)
        if isinstance(message, RegionUpdate):
            answer = self._global.receive(message)
            if message.final:
                self._flushed.add(index)
            self._note(now, "update", self._global, index, -1, self._global.staleness)
            if not message.final:
                self._post(now + self._timing.transfer(self._home, self._regions[index]), index, answer)
        elif self._here[index]:
            self._locals[index].merge(message)
            self._note(now, "merge", self._locals[index], index, -1, 0)

    def statistics(self) -> list[dict[str, Any]]:
        found = []
        for group, server, counter in zip(self._groups, self._locals, self._counters, strict=True):
            shares = {str(rank): self._shares[rank] for rank in group.ranks if rank in self._shares}
            counted = {name: counter[name] for name in ("staleness_sum", "staleness_max", *_BYTES)}
            own = {"updates": server.version, "rejected": server.rejected, "merges": server.merges}
            dropped = {str(rank): count for rank, count in server.rejections.items()}
            of_each = {"rejected_of": dropped, "compute_share": shares}
            found.append({**own, **counted, "round_seconds": counter["round_ms"] / 1e3, **of_each})
        return found

    def state_dict(self) -> dict[str, Any]:
        return {
            "locals": [server.state_dict() for server in self._locals],
            "global": None if self._global is None else self._global.state_dict(),
            "flushed": sorted(self._flushed),
            "on_their_way": [
                (arrival, number, index, type(message).__name__, _fields(message))
                for arrival, number, index, message in self._on_their_way
            ],
            "sent": self._sent,
            "here": {index: sorted(ranks) for index, ranks in self._here.items()},
            "counters": [dict(counter) for counter in self._counters],
            "shares": dict(self._shares),
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for server, saved in zip(self._locals, state["locals"], strict=True):
            server.load_state_dict(saved)
        if self._global is not None:
            self._global.load_state_dict(state["global"])
            self._flushed = set(state["flushed"])
        self._on_their_way = [
            (arrival, number, index, _KINDS[kind](**fields))
            for arrival, number, index, kind, fields in state["on_their_way"]
        ]
        self._sent, self.steps, self._shares = state["sent"], state["steps"], dict(state["shares"])
        self._here = {index: set(ranks) for index, ranks in state["here"].items()}
        self._counters = [defaultdict(float, counter) for counter in state["counters"]]

    def settle(self) -> None:
        for server in self._locals:
            server.settle(self.model.clone())
        self._flushed = set()
        self._on_their_way = []
        self._here = {group.index: set(group.ranks) for group in self._groups}

    def _send(self, now: float, index: int, update: RegionUpdate) -> None:
        self._counters[index][_BYTES[self._regions[index] != self._home]] += 2 * self._timing.message_bytes
        self._post(now + self._timing.transfer(self._regions[index], self._home), index, update)

    def _post(self, arrival: float, index: int, message: RegionUpdate | GlobalModel) -> None:
        self._sent += 1
        heapq.heappush(self._on_their_way, (arrival, self._sent, index, message))

    def _measure(self, finished: Round, index: int, stale: int) -> None:
        counter, worker = self._counters[index], finished.worker
        compute = self._timing.compute(worker, finished.steps)
        counter["staleness_sum"] += stale
        counter["staleness_max"] = max(counter["staleness_max"], stale)
        counter["round_ms"] += compute
        apart = self._regions[index] != self._timing.cluster.region_of[worker]
        counter[_BYTES[apart]] += 2 * self._timing.message_bytes
        self._shares[worker] = compute / (finished.end - finished.begin)

    def _note(
        self, now: float, kind: str, server: LocalServer | GlobalServer, index: int, worker: int, stale: int
    ) -> None:
        parameters = server.model.clone() if self._timing.cluster.record_parameters else None
        self.record(Event(now, kind, index, worker, server.version, self.steps, stale, parameters))


_BYTES = ("bytes_within_regions", "bytes_between_regions")
_KINDS: dict[str, type[RegionUpdate | GlobalModel]] = {"RegionUpdate": RegionUpdate, "GlobalModel": GlobalModel}


def _fields(message: RegionUpdate | GlobalModel) -> dict[str, Any]:
    assert message.vector is not None
    return {**vars(message), "vector": message.vector.clone()}


class OuterServer(Servers):
    """The server of DiLoCo: all workers' rounds, one update.

    Args:
        server: The server.
        cluster: The cluster.
    """

    def __init__(self, server: SynchronousServer, cluster: SimulatedCluster) -> None:
        self._server = server
        self._all = range(cluster.num_workers)
        self._here = set(self._all)
        self._records_parameters = cluster.record_parameters

    @property
    def model(self) -> Tensor:
        return self._server.model

    @property
    def version(self) -> int:
        return self._server.version

    @property
    def finished(self) -> bool:
        return not self._here

    def receive(self, rounds: Sequence[Round], pushes: Sequence[Push]) -> list[Answer]:
        self._count(pushes)
        vectors = [push.vector for push in pushes if push.vector is not None]
        if vectors:
            mean = torch.zeros_like(self.model)
            for vector in vectors:
                mean += vector
            self._server.receive(mean / len(vectors))
            parameters = self.model.clone() if self._records_parameters else None
            self.record(Event(rounds[0].end, "round", -1, -1, self.version, self.steps, 0, parameters))
        return [(self.version, None if p.vector is None else p.vector.copy_(self.model)) for p in pushes]

    def leave(self, worker: int, now: float) -> None:
        self._here.remove(worker)

    def state_dict(self) -> dict[str, Any]:
        return {"server": self._server.state_dict(), "here": sorted(self._here), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._server.load_state_dict(state["server"])
        self._here, self.steps = set(state["here"]), state["steps"]

    def settle(self) -> None:
        self._here = set(self._all)


class NoServer(Servers):
    """For synchronous SGD: the workers have averaged their gradients, and all have the same model.

    Args:
        workers: Number of workers.
    """

    model = None

    def __init__(self, workers: int) -> None:
        self._here = set(range(workers))
        self._rounds = 0

    @property
    def version(self) -> int:
        return self._rounds

    @property
    def finished(self) -> bool:
        return not self._here

    def receive(self, rounds: Sequence[Round], pushes: Sequence[Push]) -> list[Answer]:
        self._count(pushes)
        self._rounds += 1
        self.record(Event(rounds[0].end, "round", -1, -1, self.version, self.steps))
        return [(self.version, None) for _ in pushes]

    def leave(self, worker: int, now: float) -> None:
        self._here.remove(worker)
