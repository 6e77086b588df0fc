"""Hosts connect the nodes of ``core`` to links: lock, call the node, post its answers.

A host decides nothing. It holds its node's lock while the node handles a message and while the answers are posted, so
that answers are sent in the order in which they were decided. It never waits for a peer, because posting only puts a
message into a queue.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from lightning_halos.core.global_node import GlobalNode
from lightning_halos.core.messages import (
    Failure,
    Message,
    Preempted,
    Push,
    RegionUpdate,
    ShardWritten,
)
from lightning_halos.core.protocol import GLOBAL, Send, uses_models_link
from lightning_halos.core.region_node import RegionNode
from lightning_halos.core.snapshot import Shard
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.link import Link
from lightning_halos.transport.wire import vector_of

N = TypeVar("N", bound=GlobalNode | RegionNode)
T = TypeVar("T")

_YIELD = 0.001  # seconds; without a pause a thread would take a lock again before those that wait for it wake up

Store = Callable[[Shard, Callable[[], None]], None]
"""Writes a part of a snapshot in the background, after it has called the function that completes it."""


class Host(Generic[N]):
    """A node and the links to its peers.

    Args:
        node: The node.
        alarm: The alarm to report failures to.
        store: Writes the node's part of a snapshot.
        forward: Called with the message that a part of a snapshot has been written.

    Attributes:
        node: The node. Other threads use it, except for its counts, through :meth:`ask` and :meth:`act`.
    """

    def __init__(self, node: N, alarm: Alarm, store: Store, forward: Callable[[ShardWritten], None]) -> None:
        self.node = node
        self._alarm = alarm
        self._store = store
        self._forward = forward
        # Reentrant, because Lightning saves a checkpoint inside the handler of SLURM's signal, which may interrupt the
        # main thread here.
        self._lock = threading.RLock()
        self._links: dict[int, tuple[Link, ...]] = {}

    def attach(self, peer: int, *links: Link) -> None:
        """Starts to serve a peer over one link, or over one for models and one for what must not wait behind them."""
        with self._lock:
            self._links[peer] = links
        for link in links:
            link.start(partial(self._on_message, peer), self._alarm.fail)

    def ask(self, question: Callable[[N], T]) -> T:
        """Returns what a function returns for the node, which handles no message meanwhile."""
        with self._lock:
            return question(self.node)

    def act(self, action: Callable[[N], Sequence[Send]]) -> bool:
        """Posts the messages that a function of the node returns. Returns whether there are any."""
        with self._lock:
            sends = action(self.node)
            self._post(sends)
        return bool(sends)

    def _complete(self, shard: Shard) -> None:
        """Completes a shard of the node, with the lock for one portion at a time, so that no message waits for long."""
        while not self.ask(lambda _: shard.advance()):
            time.sleep(_YIELD)

    def _on_message(self, peer: int, message: Message, progress: Iterable[int]) -> None:
        if isinstance(message, Failure | Preempted):
            self._alarm.receive(message)
        elif isinstance(message, ShardWritten):
            self._forward(message)
        else:
            finding = self.node.inspect(message, progress)
            self.act(lambda node: node.handle(peer, message, finding))

    def _post(self, sends: Sequence[Send]) -> None:
        for send in sends:
            message = send.message
            if isinstance(message, Shard):
                self._store(message, partial(self._complete, message))
                continue
            link = self._links[send.to][0 if uses_models_link(message) else -1]
            link.post(message, send.fill, self._after_sending(message))

    def _after_sending(self, message: Message) -> Callable[[], None] | None:
        """Returns the function to call when a message is sent and its vector's memory may be reused."""
        return None


class RegionHost(Host[RegionNode]):
    """Hosts a local server.

    There is memory for one push at a time. While it is in use, further pushes wait at their senders, so that a server's
    memory does not grow with its number of workers.

    Args:
        node: The node.
        alarm: The alarm to report failures to.
        near: Addresses of the peers in the server's region, for counting bytes.
        store: Writes the node's part of a snapshot.
    """

    def __init__(self, node: RegionNode, alarm: Alarm, near: Collection[int], store: Store) -> None:
        super().__init__(node, alarm, store, self.tell)
        self._near = frozenset(near)
        self._traffic_before = node.traffic  # of the runs that this one resumes
        self._push = torch.empty_like(node.model)
        self._for_push: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        self._for_push.put(self._push)
        self._for_answer: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        if node.server.exchanging:
            self._for_answer.put(torch.empty_like(node.model))  # for the answer that is still missing

    def memory_for_push(self) -> Tensor:
        """Waits for the memory for a push of another process, and returns it."""
        return self._for_push.get()

    def memory_for_answer(self) -> Tensor:
        """Returns the memory for an answer of the global server: the memory of the update that it answers."""
        return self._for_answer.get()

    def tell(self, message: ShardWritten) -> None:
        """Tells rank 0 that a part of a snapshot has been written."""
        self._links[GLOBAL][-1].post(message)

    def _on_message(self, peer: int, message: Message, progress: Iterable[int]) -> None:
        if isinstance(message, Push):
            self.node.traffic = self._traffic()
        super()._on_message(peer, message, progress)
        if isinstance(message, Push) and message.final and message.vector is not None:
            self._give_back(message.vector)

    def _after_sending(self, message: Message) -> Callable[[], None] | None:
        vector = vector_of(message)
        if vector is None:
            return None
        if isinstance(message, RegionUpdate):
            return partial(self._for_answer.put, vector)
        return partial(self._give_back, vector)

    def _give_back(self, vector: Tensor) -> None:
        if vector is self._push:  # not the vector of this process's own worker
            self._for_push.put(vector)

    def _traffic(self) -> tuple[int, int]:
        """Returns the bytes on this server's links inside its region, and to other regions."""
        within = between = 0
        for peer, links in list(self._links.items()):
            size = sum(link.bytes_sent + link.bytes_received for link in links)
            if peer in self._near:
                within += size
            else:
                between += size
        return self._traffic_before[0] + within, self._traffic_before[1] + between
