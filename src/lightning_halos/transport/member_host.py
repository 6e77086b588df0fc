"""Hosts the local server of a job that is one region of a run, and talks with a global server that may be away.

It decides nothing. What is sent on a connection is decided by the node, which repeats what a new connection needs.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from typing import Any, cast

from torch import Tensor

from lightning_halos.core.counters import ServerCounters
from lightning_halos.core.finding import Finding
from lightning_halos.core.messages import (
    Decide,
    GlobalModel,
    Message,
    ModelCopy,
    ModelRequest,
    Progress,
    Publish,
    RegionUpdate,
    Status,
    Welcome,
)
from lightning_halos.core.open_region_node import OpenRegionNode
from lightning_halos.core.protocol import GLOBAL, Send
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.compute import ComputeThreads
from lightning_halos.transport.hosts import RegionHost
from lightning_halos.transport.lanes import Lanes
from lightning_halos.transport.link import wait_all
from lightning_halos.transport.push_memory import PUSHES
from lightning_halos.transport.server_connection import ServerConnection
from lightning_halos.transport.slices import JoiningLink

_FROM_SERVER = 1  # number of the link to the global server, which is the first one that is attached


class MemberHost(RegionHost):
    """Hosts the local server. It is the party of the job's connection with the global server.

    In a worker of several lanes, lane 0 has the connection. The others send it their slices of updates, and get from it
    what the global server says.

    Args:
        node: The node.
        alarm: The alarm to report failures to.
        near: As in :class:`RegionHost`.
        connection: The connection; ``None`` on other lanes than 0.
        welcome: The answer to the job's request to join.
        lanes: As in :class:`Host`.
        joining: On lane 0 of several, the link that joins their slices.
        compute: As in :class:`Host`.
        pushes: As in :class:`RegionHost`.

    Attributes:
        callbacks: The text of the callbacks of the job that decided before this one.
        counters: Counters of this server; see :meth:`statistics`.
        version: Updates in the newest global model that this process knows.
        steps: Local steps in the newest copy of the global model.
    """

    def __init__(
        self,
        node: OpenRegionNode,
        alarm: Alarm,
        near: Collection[int],
        connection: ServerConnection | None,
        welcome: Welcome,
        lanes: Lanes | None = None,
        joining: JoiningLink | None = None,
        compute: ComputeThreads | None = None,
        pushes: int = PUSHES,
    ) -> None:
        # The connection counts the bytes to the global server; slices stay inside this machine.
        super().__init__(node, alarm, set(near) - {GLOBAL}, lambda shard, complete: None, lanes, compute, pushes)
        self.callbacks = welcome.callbacks
        self._has_callbacks = welcome.status.decides
        self.counters = ServerCounters()
        self.version = self.steps = 0
        self._connection = connection
        self._joining = joining
        self._final: Tensor | None = None
        self._reported = 0  # number of the last report that is counted
        self._requests = itertools.count(1)
        self._copies: queue.SimpleQueue[ModelCopy] = queue.SimpleQueue()
        self._reconnected = threading.Event()

    def connected(self) -> list[Message]:
        self.disconnected()
        return [self.ask(lambda node: cast(OpenRegionNode, node).join())]

    def disconnected(self) -> None:
        if self._joining is not None:
            self._joining.forget()
        self.do("disconnect")

    def receive(self, message: Message, progress: Iterable[int]) -> bool:
        model = message.vector if isinstance(message, GlobalModel) else None
        if self._joining is not None and isinstance(message, GlobalModel):
            wait_all(progress)
            message = self._joining.scatter(message)
        self._on_message(_FROM_SERVER, message, progress)
        if isinstance(message, GlobalModel) and message.final:
            self._final = model
            assert self._connection is not None
            self._connection.say_goodbye()
        return True

    def _on_message(self, channel: int, message: Message, progress: Iterable[int]) -> None:
        if isinstance(message, ModelCopy):
            wait_all(progress)
            self.version, self.steps = message.version, message.steps
            self._copies.put(message)
        else:
            super()._on_message(channel, message, progress)

    def handle(self, channel: int, message: Message, finding: Finding | None, traffic: tuple[int, int]) -> None:
        match message:
            case Decide():
                self.callbacks, self._has_callbacks = message.callbacks, True
            case Welcome():
                self.callbacks, self._has_callbacks = message.callbacks, message.status.decides
                self._reconnected.set()
                self._release(message.status)
            case Status():
                self._has_callbacks = self._has_callbacks and message.decides
                self._release(message)
            case GlobalModel():
                self.version = max(self.version, message.version)
        super().handle(channel, message, finding, traffic)

    def _release(self, status: Status) -> None:
        if self._joining is not None:
            self._joining.release(status.saved)

    def arrives_in_all_lanes(self, channel: int) -> bool:
        return self._channels[channel - 1] != GLOBAL

    @property
    def decides(self) -> bool:
        """Whether this job decides now, and has the state of the callbacks of the job that decided before."""
        return cast(OpenRegionNode, self.node).decides and self._has_callbacks

    def publish(self, plateau_steps: Sequence[tuple[int, float]], metrics: dict[str, float], callbacks: str) -> None:
        """Tells all members what this job has decided."""
        self.do("publish", Publish(0, list(plateau_steps), metrics, callbacks))

    def _sends_of(self, act: str, message: Message | None) -> Sequence[Send]:
        node = cast(OpenRegionNode, self.node)
        match act, message:
            case "publish", Publish():
                return node.publish(message.plateau_steps, message.metrics, message.callbacks)
            case "disconnect", None:
                return node.disconnected()
        return super()._sends_of(act, message)

    def statistics(self) -> dict[str, Any]:
        """Returns the counters of this server, to which no report is added meanwhile."""
        return self.ask(lambda _: self.counters.statistics())

    def read(self, out: Tensor, check: Callable[[], None]) -> None:
        """Copies the present global model, or the final one. While the server is away, this waits for it.

        In several lanes, all must call this in step, and each gets its slice of the same model.

        Args:
            out: Memory for the model or the slice.
            check: Called several times a second meanwhile; may raise.
        """
        if self._connection is None:
            vector = self._slice_of_copy(check)
        else:
            vector = self._read_global_model(check)
            if self._joining is not None:
                vector = self._joining.scatter(ModelCopy(self.version, self.steps, 0, vector)).vector
        assert vector is not None
        out.copy_(vector)

    def _slice_of_copy(self, check: Callable[[], None]) -> Tensor | None:
        while True:
            check()
            with suppress(queue.Empty):
                return self._copies.get(timeout=0.2).vector

    def _read_global_model(self, check: Callable[[], None]) -> Tensor:
        number = self._request()
        while True:
            check()
            if self._final is not None:
                return self._final.clone()
            if self._reconnected.is_set():
                number = self._request()
            with suppress(queue.Empty):
                copy = self._copies.get(timeout=0.2)
                if copy.number == number:
                    assert copy.vector is not None
                    return copy.vector

    def _request(self) -> int:
        self._reconnected.clear()
        request = ModelRequest(next(self._requests))
        assert self._connection is not None
        self._connection.post(request)
        return request.number

    def _post(self, sends: Sequence[Send]) -> None:
        for send in sends:
            report = send.message
            if isinstance(report, Progress) and report.number > self._reported:  # not one that is repeated
                self._reported = report.number
                self.counters.add(report)
        if self._connection is None:
            sends = [send for send in sends if send.to != GLOBAL or getattr(send.message, "vector", None) is not None]
        super()._post(sends)

    def _after_sending(self, message: Message) -> Callable[[], None] | None:
        # The node keeps an update until it is safe on the global server's disk, so its memory is not for answers.
        return None if isinstance(message, RegionUpdate) else super()._after_sending(message)

    def carried(self) -> tuple[int, int]:
        within, _ = super().carried()
        return within, 0 if self._connection is None else self._connection.traffic
