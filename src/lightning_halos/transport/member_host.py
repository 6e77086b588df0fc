"""Hosts the local server of a job that is one region of a run, and talks with a global server that may be away.

It decides nothing. What is sent on a connection is decided by the node, which repeats what a new connection needs.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from typing import cast

from torch import Tensor

from lightning_halos.core.counters import ServerCounters
from lightning_halos.core.messages import (
    Decide,
    GlobalModel,
    Message,
    ModelCopy,
    ModelRequest,
    Progress,
    RegionUpdate,
    Status,
    Welcome,
)
from lightning_halos.core.open_region_node import OpenRegionNode
from lightning_halos.core.protocol import Send
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.hosts import RegionHost
from lightning_halos.transport.link import wait_all
from lightning_halos.transport.server_connection import ServerConnection


class MemberHost(RegionHost):
    """Hosts the local server. It is the party of the job's connection with the global server.

    Args:
        node: The node.
        alarm: The alarm to report failures to.
        near: As in :class:`RegionHost`.
        connection: The connection.
        welcome: The answer to the job's request to join.

    Attributes:
        callbacks: The text of the callbacks of the job that decided before this one.
        counters: Counters of this server.
        version: Updates in the newest global model that this process knows.
        steps: Local steps in the newest copy of the global model.
    """

    def __init__(
        self,
        node: OpenRegionNode,
        alarm: Alarm,
        near: Collection[int],
        connection: ServerConnection,
        welcome: Welcome,
    ) -> None:
        super().__init__(node, alarm, near, lambda shard, complete: None)
        self.callbacks = welcome.callbacks
        self._has_callbacks = welcome.status.decides
        self.counters = ServerCounters()
        self.version = self.steps = 0
        self._connection = connection
        self._final: Tensor | None = None
        self._reported = 0  # number of the last report that is counted
        self._requests = itertools.count(1)
        self._copies: queue.SimpleQueue[ModelCopy] = queue.SimpleQueue()
        self._reconnected = threading.Event()

    def connected(self) -> list[Message]:
        return [self.ask(lambda node: cast(OpenRegionNode, node).join())]

    def disconnected(self) -> None:
        self.ask(lambda node: cast(OpenRegionNode, node).disconnected())

    def receive(self, message: Message, progress: Iterable[int]) -> bool:
        match message:
            case ModelCopy():
                wait_all(progress)
                self.version, self.steps = message.version, message.steps
                self._copies.put(message)
                return True
            case Decide():
                self.callbacks, self._has_callbacks = message.callbacks, True
            case Welcome():
                self.callbacks, self._has_callbacks = message.callbacks, message.status.decides
                self._reconnected.set()
            case Status():
                self._has_callbacks = self._has_callbacks and message.decides
            case GlobalModel():
                self.version = max(self.version, message.version)
        self._on_message(1, message, progress)  # the first link is to the global server
        if isinstance(message, GlobalModel) and message.final:
            self._final = message.vector
            self._connection.say_goodbye()
        return True

    @property
    def decides(self) -> bool:
        """Whether this job decides now, and has the state of the callbacks of the job that decided before."""
        return cast(OpenRegionNode, self.node).decides and self._has_callbacks

    def publish(self, plateau_steps: Sequence[tuple[int, float]], metrics: dict[str, float], callbacks: str) -> None:
        """Tells all members what this job has decided."""
        self.act(lambda node: cast(OpenRegionNode, node).publish(plateau_steps, metrics, callbacks))

    def read_global_model(self, check: Callable[[], None]) -> Tensor:
        """Returns a copy of the present global model, or of the final one. While the server is away, this waits for it.

        Args:
            check: Called several times a second meanwhile; may raise.
        """
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
        self._connection.post(request)
        return request.number

    def _post(self, sends: Sequence[Send]) -> None:
        for send in sends:
            report = send.message
            if isinstance(report, Progress) and report.number > self._reported:  # not one that is repeated
                self._reported = report.number
                self.counters.add(report)
        super()._post(sends)

    def _after_sending(self, message: Message) -> Callable[[], None] | None:
        # The node keeps an update until it is safe on the global server's disk, so its memory is not for answers.
        return None if isinstance(message, RegionUpdate) else super()._after_sending(message)

    def carried(self) -> tuple[int, int]:
        within, _ = super().carried()
        return within, self._connection.traffic
