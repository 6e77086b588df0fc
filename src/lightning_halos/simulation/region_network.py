"""Local servers on a virtual clock, which answer each push at once, and the global server above them.

A local server applies one push after the other: it handles each when it arrives, and its answer leaves when all pushes
so far have had their time. Updates and global models take the cluster's time from one region to another. As in the
published simulator, all other messages take no time and are delivered at once. So is the final model, when the run is
over.
"""

from __future__ import annotations

import copy
import dataclasses
import heapq
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_halos.core.algorithms import Algorithm, ServerAlgorithm
from lightning_halos.core.cursor import LeaseStock
from lightning_halos.core.global_node import GlobalNode
from lightning_halos.core.global_server import GlobalServer
from lightning_halos.core.local_server import LocalServer
from lightning_halos.core.messages import GlobalModel, LeaseGrant, LeaseRequest, Pull, Push, RegionUpdate
from lightning_halos.core.protocol import GLOBAL, Send
from lightning_halos.core.region_node import RegionNode
from lightning_halos.core.shadow import SHADOW, Shadow
from lightning_halos.core.snapshot import Shard
from lightning_halos.core.topology import ServerGroup
from lightning_halos.simulation.network import Network, Round, Work
from lightning_halos.simulation.timing import Timing


class RegionNetwork(Network):
    """Local servers that answer each push at once; several of them have a global server (HALoS, Async-Local-SGD)."""

    def __init__(
        self,
        timing: Timing,
        work: Work,
        algorithm: Algorithm,
        groups: Sequence[ServerGroup],
        locals_: Sequence[LocalServer],
        global_: GlobalServer | None,
    ) -> None:
        assert isinstance(algorithm, ServerAlgorithm)
        super().__init__(timing.on(algorithm.wire), work, algorithm)
        self._home = timing.cluster.global_region
        self._places = [group.region for group in groups]
        self._wire = wire = algorithm.wire
        region_of = timing.cluster.region_of
        self._group_of = {rank: group.index for group in groups for rank in group.ranks}
        self._locals = [
            RegionNode(
                server,
                self._planner,
                group.ranks,
                dataclasses.replace(work.budget),
                LeaseStock(0),
                wire.of_server(group, region_of.__getitem__, self._home),
            )
            for group, server in zip(groups, locals_, strict=True)
        ]
        formats = {group.index: wire.on(group.region, self._home) for group in groups}
        budget = dataclasses.replace(work.budget)
        self._global = GlobalNode(global_, len(groups), budget, self._cursor, formats=formats)
        self._top = locals_[0] if global_ is None else global_
        self._under_way: list[tuple[float, int, int, RegionUpdate | GlobalModel]] = []
        self._free = [0.0] * len(groups)  # when each local server has applied the pushes so far
        self._sent = 0
        self._granted = 0

    @property
    def model(self) -> Tensor:
        return self._top.model

    @property
    def version(self) -> int:
        return self._top.version

    def due(self) -> list[Round]:
        while True:
            arrival = self._under_way[0][0] if self._under_way else math.inf
            following = min(self.rounds.values(), key=lambda r: (r.end, r.worker), default=None)
            if following is not None and following.end <= arrival:
                return [following]
            if not self._under_way:
                return []
            self._deliver()

    def finish(self, pushes: Sequence[Push]) -> None:
        for push in pushes:
            self._end(push)
            worker, index, has_vector = push.worker, self._group_of[push.worker], push.vector is not None
            node = self._locals[index]
            rejected = node.server.rejected
            self._free[index] = max(self.now, self._free[index]) + (self._timing.serve if push.steps else 0.0)
            if has_vector:
                self._count_bytes(index, self._timing.cluster.region_of[worker] == self._places[index])
            sends = node.handle(worker, push)
            for send in sends:
                send.complete()
            if has_vector:
                staleness = node.server.staleness if node.server.rejected == rejected else 0
                self._note("push", node.version, node.model, index, worker, staleness)
            self._route(index, sends)
            self._begin_all({send.to: send.message for send in sends if isinstance(send.message, Pull)})

    def publish(self, plateau_steps: Sequence[tuple[int, float]], metrics: dict[str, float]) -> None:
        self._route(GLOBAL, self._global.publish(plateau_steps, metrics))

    def statistics(self) -> list[dict[str, Any]]:
        return [counters.statistics() for counters in self._global.counters.values()]

    def adopt_final_model(self) -> None:
        for node in self._locals:
            node.adopt_final_model(self.model.clone())
        for shadows in self._shadows:
            for shadow in shadows.values():
                shadow.forget()  # the workers have the final model, too, and forget theirs

    def state_dict(self) -> dict[str, Any]:
        return {
            "locals": [node.state_dict() for node in self._locals],
            "global": self._global.state_dict(),
            "shadows": [
                {peer: {SHADOW: shadow.values.clone()} for peer, shadow in shadows.items() if shadow.values is not None}
                for shadows in self._shadows
            ],
            "sent": self._sent,
            "under_way": [
                (arrival, number, index, type(message).__name__, copy.deepcopy(vars(message)))
                for arrival, number, index, message in self._under_way
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for node, saved in zip(self._locals, state["locals"], strict=True):
            node.load_state_dict(saved)
        self._global.load_state_dict(state["global"])
        for shadows, saved in zip(self._shadows, state["shadows"], strict=True):
            for peer, values in saved.items():
                if peer in shadows:
                    shadows[peer].values = values[SHADOW].clone()
        self._sent = state["sent"]
        kinds = {kind.__name__: kind for kind in (RegionUpdate, GlobalModel)}
        self._under_way = [(*key, kinds[kind](**copy.deepcopy(fields))) for *key, kind, fields in state["under_way"]]

    @property
    def _shadows(self) -> list[Mapping[int, Shadow]]:
        """What the peers of each node have of its model, and the local servers of the global model."""
        return [*(node.shadows for node in self._locals), self._global.shadows]

    def schedule(self) -> dict[str, Any]:
        known = [(node.budget.total, node.first_version) for node in self._locals]
        wire = [self._wire.within, self._wire.between]
        return {**super().schedule(), "known": known, "wire": wire, "free": list(self._free)}

    def load_schedule(self, schedule: Mapping[str, Any]) -> None:
        super().load_schedule(schedule)
        self._global.budget.total = self.total
        self._free = list(schedule["free"])
        for node, (total, first_version) in zip(self._locals, schedule["known"], strict=True):
            node.budget.total, node.first_version = total, first_version
        flushes = {i for *_, i, message in self._under_way if isinstance(message, RegionUpdate) and message.final}
        for worker in self._left:  # the new nodes do not know yet that it has finished
            index = self._group_of[worker]
            for send in self._locals[index].handle(worker, Push(worker, 0, 0, 0, 0.0, final=True)):
                if not isinstance(send.message, RegionUpdate):
                    self._route(index, [send])
                elif index not in flushes:  # it had arrived
                    self._route(GLOBAL, self._global.handle(index, send.message))

    def _begin_all(self, pulls: Mapping[int, Pull]) -> None:
        for worker, pull in pulls.items():
            begun = self._begin(worker, pull)
            if begun.steps:
                index = self._group_of[worker]
                answered = max(self.now, self._free[index])
                begun.end = answered + self._timing.round(worker, self._places[index], begun.steps)

    def _lease(self, worker: int, steps: int) -> int:
        index = self._group_of[worker]
        self._route(index, self._locals[index].handle(worker, LeaseRequest(steps)))
        return self._granted

    def _deliver(self) -> None:
        self.now, _, index, message = heapq.heappop(self._under_way)
        if isinstance(message, RegionUpdate):
            version = self.version
            sends = self._global.handle(index, message)
            staleness = self._top.staleness if self.version > version else 0  # some are rejected or empty
            self._note("update", self.version, self.model, index, staleness=staleness)
            self._route(GLOBAL, sends)
            return
        node = self._locals[index]
        merges = node.server.merges
        self._route(index, node.handle(GLOBAL, message))
        if node.server.merges > merges:
            self._note("merge", node.version, node.model, index)

    def _route(self, origin: int, sends: Sequence[Send]) -> None:
        """Delivers the messages of a node: models after their transfer time, other messages at once."""
        for send in sends:
            if origin == GLOBAL:  # those of a local server are complete
                send.complete()
            to, message = send.to, send.message
            assert not isinstance(message, Shard)
            if isinstance(message, RegionUpdate):
                self._count_bytes(origin, self._places[origin] == self._home)
                sent = max(self.now, self._free[origin])
                self._post(sent + self._timing.transfer(self._places[origin], self._home), origin, message)
            elif to == GLOBAL:
                self._route(GLOBAL, self._global.handle(origin, message))
            elif origin != GLOBAL and isinstance(message, LeaseGrant):
                self._granted = message.steps
            elif origin != GLOBAL:
                self.outbox.append((to, message))
            elif isinstance(message, GlobalModel) and not message.final:
                # A global server is rarely busy, so an update does not wait for others.
                self._post(
                    self.now + (self._timing.serve + self._timing.transfer(self._home, self._places[to])), to, message
                )
            else:
                if isinstance(message, GlobalModel) and not self.finished:
                    self.finished = True
                    self._under_way = []  # answers, which local servers would ignore after their flush
                    self._note("end", self.version, None)
                self._route(to, self._locals[to].handle(GLOBAL, message))

    def _post(self, arrival: float, index: int, message: RegionUpdate | GlobalModel) -> None:
        self._sent += 1
        heapq.heappush(self._under_way, (arrival, self._sent, index, message))

    def _count_bytes(self, index: int, within_region: bool) -> None:
        """Counts the bytes of a message with a model to or from a local server, and of its answer."""
        within, between = self._locals[index].traffic
        size = 2 * (self._timing.bytes_within if within_region else self._timing.bytes_between)
        self._locals[index].traffic = (within + size, between) if within_region else (within, between + size)
