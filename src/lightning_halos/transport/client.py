"""The worker's end of the link to its local server: it sends pushes, and waits for the answers or looks for them.

Only the main thread waits here. Every wait has a limit, and lets the main thread handle Ctrl-C and SIGTERM. A server
that is busy is waited for; the link notices whether it is alive.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

from torch import Tensor

from lightning_halos.core.cursor import Lease
from lightning_halos.core.messages import (
    Failure,
    GlobalModel,
    LeaseGrant,
    LeaseRequest,
    Marker,
    Message,
    Preempted,
    Pull,
    Push,
    ShardWritten,
    Status,
)
from lightning_halos.core.vector import Fill
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.link import Link, progress_limit, wait_all

T = TypeVar("T")
A = TypeVar("A", Pull, GlobalModel)


class WorkerClient:
    """Sends a worker's pushes to its local server, and receives the answers.

    Every wait raises ``PeerLostError`` if a peer disappears or falls silent, or if neither an answer nor news of other
    workers arrives within :func:`progress_limit`. It raises ``PeerFailedError`` if a peer fails.

    Args:
        link: Link to the local server.
        alarm: The alarm to report failures to.
        timeout: Seconds of silence after which a peer counts as lost; see :func:`progress_limit`.
        interrupted: Called several times a second while waiting; may raise.

    Attributes:
        on_marker: Called with the marker of a snapshot and the unanswered push, to copy this worker's state.
        answer: ``None``: an answer arrives when it is there; see :class:`VirtualClient`.
    """

    answer: Pull | None = None

    def __init__(self, link: Link, alarm: Alarm, timeout: float, interrupted: Callable[[], None]) -> None:
        self._link = link
        self._alarm = alarm
        self._limit = progress_limit(timeout)
        self._interrupted = interrupted
        self.on_marker: Callable[[Marker, Push], None] = lambda marker, push: None
        self._inbox: queue.SimpleQueue[Message | int] = queue.SimpleQueue()
        self._unanswered: Push | None = None
        self._complete = 0  # number of the last push whose answer has arrived completely
        self._grants: queue.SimpleQueue[LeaseGrant] = queue.SimpleQueue()
        link.start(self._on_message, alarm.fail)

    def exchange(self, push: Push, fill: Fill) -> tuple[Pull, Iterable[int]]:
        """Sends a push, whose vector ``fill`` fills, and waits for the answer.

        Returns:
            The answer. Its vector arrives while the second value is iterated over.
        """
        return self._answer(Pull, push, fill, "answer a push")

    def send(self, push: Push, fill: Fill) -> None:
        """Sends a push, whose vector ``fill`` fills. :meth:`take` returns the answer."""
        self._unanswered = push
        self._link.post(push, fill)

    def has_answer(self, batches: int) -> bool:
        """Returns whether the answer to the push of :meth:`send` has arrived completely."""
        return self._unanswered is not None and self._complete >= self._unanswered.number

    def take(self) -> Pull:
        """Waits until the answer to the push of :meth:`send` has arrived completely, and returns it.

        A marker that arrived before it is handled now, so that the lanes of a worker handle it at the same moment.
        """
        push, self._unanswered = self._unanswered, None
        assert push is not None
        pull, progress = self._await(Pull, push, "answer a push")
        wait_all(progress)
        return pull

    def finish(self, push: Push, fill: Fill) -> tuple[GlobalModel, Iterable[int]]:
        """Sends the last push, and waits for the final model as long as the other workers make progress.

        Returns:
            The final model. Its vector arrives while the second value is iterated over.
        """
        # A status arrives whenever another worker has made progress.
        return self._answer(GlobalModel, push, fill, "send the final model, or news of others that go on")

    def leases(self) -> Iterator[Lease]:
        """Yields the data to train on. Each lease is requested while the worker trains on the previous one."""
        self._link.post(LeaseRequest(number=1))
        while (grant := self._wait("lease data", self._grants)).steps:
            self._link.post(LeaseRequest(number=grant.number + 1))
            yield Lease(grant.epoch, grant.first, grant.steps)

    def tell(self, message: ShardWritten) -> None:
        """Tells rank 0 whether this worker's shard of a checkpoint has been written."""
        self._link.post(message)

    def _answer(self, kind: type[A], push: Push, fill: Fill, what: str) -> tuple[A, Iterable[int]]:
        self._link.post(push, fill)
        return self._await(kind, push, what)

    def _await(self, kind: type[A], push: Push, what: str) -> tuple[A, Iterable[int]]:
        while not isinstance(message := self._wait(what, self._inbox), kind):
            if isinstance(message, Marker):
                self.on_marker(message, push)
            else:
                assert isinstance(message, Status)
        return message, self._arrival_of(message.vector)

    def _arrival_of(self, vector: Tensor | None) -> Iterable[int]:
        assert vector is not None
        arrived = 0
        while arrived < vector.numel():
            message = self._wait("send the rest of a model", self._inbox)
            assert isinstance(message, int)
            yield (arrived := message)

    def _wait(self, what: str, inbox: queue.SimpleQueue[T]) -> T:
        deadline = time.monotonic() + self._limit
        while True:
            self._alarm.check()
            self._interrupted()
            with suppress(queue.Empty):
                return inbox.get(timeout=0.2)
            if time.monotonic() > deadline and not self._alarm.has_failed:
                raise self._alarm.peer_lost(self._link.peer, what, self._limit)

    def _on_message(self, message: Message, progress: Iterable[int]) -> None:
        if isinstance(message, Failure | Preempted):
            self._alarm.receive(message)
            return
        if isinstance(message, LeaseGrant):
            self._grants.put(message)
            return
        self._inbox.put(message)
        for arrived in progress:
            self._inbox.put(arrived)
        if isinstance(message, Pull):
            self._complete = message.number


class VirtualClient(WorkerClient):
    """The client of a worker in a simulation, for which an answer arrives at the end of the batch that the answer says.

    Attributes:
        answer: The answer that the worker has not taken yet.
    """

    def send(self, push: Push, fill: Fill) -> None:
        """Sends a push and waits for the answer, which arrives at a virtual time. Markers are handled meanwhile."""
        self.answer, progress = self.exchange(push, fill)
        wait_all(progress)

    def has_answer(self, batches: int) -> bool:
        return self.answer is not None and batches >= self.answer.batches

    def take(self) -> Pull:
        answer, self.answer = self.answer, None
        assert answer is not None
        return answer
