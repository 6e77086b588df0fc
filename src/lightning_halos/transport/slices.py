"""Joins the slices of a worker's lanes for a global server that has no lanes, and cuts its models into slices.

The server of a star of jobs knows nothing of the lanes of its members, which may have different numbers of them. So one
process of a member talks with it, and gets the other lanes' slices over links of its own. Nothing is decided here.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TypeVar

from torch import Tensor

from lightning_halos.core.error_feedback import ErrorFeedback
from lightning_halos.core.layout import Layout
from lightning_halos.core.messages import Failure, GlobalModel, Message, ModelCopy, Preempted, RegionUpdate
from lightning_halos.core.protocol import ProtocolError
from lightning_halos.core.quantization import Format, decode, encode
from lightning_halos.core.vector import Fill, ignore_progress
from lightning_halos.transport.keyed_queues import KeyedQueues
from lightning_halos.transport.lanes import Lanes, LanesEndedError
from lightning_halos.transport.link import Link, OnFailure, OnMessage, wait_all

M = TypeVar("M", GlobalModel, ModelCopy)


class JoiningLink(Link):
    """Lane 0's link for models to the global server: what is posted has this lane's slice, what is sent has all of it.

    Args:
        models: The link to the global server.
        layout: The slices.
        slices: The link to each other lane for its slices.
        lanes: The links for the order of what is handled.
        feedback: Rounds the updates, if the link to the global server has a narrow format: its blocks of elements are
            those of the complete vector, so that the lanes cannot round their slices. What is sent is kept in the
            format until it is safe, so that a repeated update is the same and the residual counts once.
    """

    def __init__(
        self,
        models: Link,
        layout: Layout,
        slices: Mapping[int, Link],
        lanes: Lanes,
        feedback: ErrorFeedback | None = None,
    ) -> None:
        super().__init__(models.peer)
        self._models = models
        self._layout = layout
        self._slices = slices
        self._lanes = lanes
        self._feedback = feedback
        self._posted: queue.SimpleQueue[tuple[int, Message]] = queue.SimpleQueue()
        self._arrived = KeyedQueues[int, RegionUpdate]()
        self._lock = threading.Lock()
        self._connection = 0  # number of the present connection
        self._repeatable: dict[int, Tensor] = {}  # encoded parameters of updates, by their number

    def start(self, on_message: OnMessage, on_failure: OnFailure) -> None:
        """Starts to join. What the server sends is received elsewhere."""
        for lane, link in self._slices.items():
            link.start(partial(self._on_message, lane), on_failure)
        self._start_thread("join", self._join_all, on_failure)

    def post(self, message: Message, fill: Fill | None = None, sent: Callable[[], None] | None = None) -> None:
        if fill is not None:
            fill(ignore_progress)
        self._posted.put((self._connection, message))

    def forget(self) -> None:
        """Drops what was posted on an earlier connection, because the node repeats what is missing on the next one."""
        with self._lock:
            self._connection += 1

    def release(self, saved: int) -> None:
        """Forgets the updates up to a number, because they are on the global server's disk and are not repeated."""
        with self._lock:
            self._repeatable = {number: data for number, data in self._repeatable.items() if number > saved}

    def scatter(self, message: M) -> M:
        """Sends the slices of a complete model to the other lanes. Returns the message with this lane's slice."""
        assert message.vector is not None
        for lane, link in self._slices.items():
            link.post(replace(message, vector=self._layout.cut(message.vector, lane)))
        return replace(message, vector=self._layout.cut(message.vector, 0))

    def _join_all(self) -> None:
        try:
            while True:
                connection, message = self._lanes.wait_for(self._posted)
                if isinstance(message, RegionUpdate) and message.vector is not None:
                    message = self._join(message)
                with self._lock:
                    if connection == self._connection:
                        self._models.post(message)
        except LanesEndedError:
            pass

    def _join(self, update: RegionUpdate) -> RegionUpdate:
        """Returns an update with the slices of all lanes."""
        assert update.vector is not None
        vector = update.vector.new_empty(self._layout.elements)
        self._layout.put(vector, 0, update.vector)
        for lane in self._slices:
            other = self._lanes.wait_for(self._arrived[lane])
            if other.number != update.number or other.vector is None:
                raise ProtocolError(f"Lane {lane} sent a slice of update {other.number} instead of {update.number}.")
            self._layout.put(vector, lane, other.vector)
        if self._feedback is not None:
            self._round(self._feedback, vector, update)
        return replace(update, vector=vector)

    def _round(self, feedback: ErrorFeedback, vector: Tensor, update: RegionUpdate) -> None:
        """Rounds a joined update or, if it was sent before, gives it the values that it had then."""
        parameters = vector[: feedback.residual.numel()]
        form: Format = "float32" if update.final else feedback.format
        with self._lock:
            sent = self._repeatable.get(update.number)
        if sent is not None:
            decode(sent, parameters, form)
            return
        feedback.round_(vector, 0, vector.numel(), update.final)
        with self._lock:
            self._repeatable[update.number] = encode(parameters, form)

    def _on_message(self, lane: int, message: Message, progress: Iterable[int]) -> None:
        wait_all(progress)
        if isinstance(message, Failure | Preempted):
            self._lanes.alarm.receive(message)
        elif isinstance(message, RegionUpdate):
            self._arrived[lane].put(message)
        else:
            raise ProtocolError(f"Lane {lane} sent an unexpected message for the global server: {message!r}.")

    def _receive_all(self, on_message: OnMessage) -> None:
        raise AssertionError


class NoLink(Link):
    """The link on which the other lanes would send what only lane 0 sends."""

    def start(self, on_message: OnMessage, on_failure: OnFailure) -> None:
        """Does nothing."""

    def post(self, message: Message, fill: Fill | None = None, sent: Callable[[], None] | None = None) -> None:
        """Drops a message."""

    def _receive_all(self, on_message: OnMessage) -> None:
        raise AssertionError
