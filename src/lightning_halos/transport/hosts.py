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
from contextlib import AbstractContextManager
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from lightning_halos.core.finding import Finding
from lightning_halos.core.global_node import GlobalNode
from lightning_halos.core.messages import (
    Failure,
    Marker,
    Message,
    Preempted,
    Publish,
    Push,
    RegionUpdate,
    ShardWritten,
)
from lightning_halos.core.protocol import GLOBAL, GlobalState, ProtocolError, Send, uses_models_link
from lightning_halos.core.region_node import RegionNode
from lightning_halos.core.snapshot import Shard
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.compute import ComputeThreads
from lightning_halos.transport.lanes import GLOBAL_HOST, LOCAL_HOST, Lanes
from lightning_halos.transport.link import Link
from lightning_halos.transport.push_memory import PUSHES, PushMemory
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
        lanes: The links to the other processes of the worker; ``None`` if it has one lane.
        number: Number of the host among those of the process, for the other lanes.
        compute: The threads in which the node's server computes. Default: those that call it.

    Attributes:
        node: The node. Other threads use it, except for its counts, through :meth:`ask`, :meth:`do` and :meth:`read`.
    """

    def __init__(
        self,
        node: N,
        alarm: Alarm,
        store: Store,
        forward: Callable[[ShardWritten], None],
        lanes: Lanes | None = None,
        number: int = GLOBAL_HOST,
        compute: ComputeThreads | None = None,
    ) -> None:
        self.node = node
        if compute is not None and node.server is not None:
            node.server.map = compute.map
        self._alarm = alarm
        self._store = store
        self._forward = forward
        # Reentrant, because Lightning saves a checkpoint inside the handler of SLURM's signal, which may interrupt the
        # main thread here.
        self._lock = threading.RLock()
        self._links: dict[int, tuple[Link, ...]] = {}
        self._channels: list[int] = []  # the peer at the other end of each link
        self._lane = None
        if lanes is not None:
            self._lane = lanes.of_host(number, self)
            if node.server is not None:
                node.server.become_slice(warns=lanes.lane == 0)

    def attach(self, peer: int, *links: Link) -> None:
        """Starts to serve a peer over one link, or over one for models and one for what must not wait behind them."""
        with self._lock:
            self._links[peer] = links
            first = len(self._channels) + 1
            self._channels += [peer] * len(links)
        for channel, link in enumerate(links, first):
            link.start(partial(self._on_message, channel), self._alarm.fail)

    def ask(self, question: Callable[[N], T]) -> T:
        """Returns what a function returns for the node, which handles no message meanwhile."""
        with self._lock:
            return question(self.node)

    def do(self, act: str, message: Message | None = None) -> bool:
        """Lets the node do what this process asks for, at the same moment in all lanes.

        Args:
            act: ``"start"``, or, of the global node, ``"publish"`` or ``"snapshot"``.
            message: The arguments: a :class:`Publish` or a :class:`Marker`.

        Returns:
            Whether there is anything to send; always on lanes other than 0, which wait for lane 0.
        """
        if self._lane is not None:
            return self._lane.act(act, message)
        with self._lock:
            return self.perform(act, message)

    def read(self, out: Tensor, check: Callable[[], None]) -> None:
        """Copies the node's model into ``out``, at the same moment in all lanes.

        Args:
            out: Memory for the model, or for this lane's slice of it.
            check: Called several times a second while this waits for lane 0; may raise.
        """
        if self._lane is not None:
            self._lane.read(out, check)
        else:
            self.ask(lambda node: out.copy_(node.model))

    # ------------------------------------------------------------------ for the lanes

    def locked(self) -> AbstractContextManager[object]:
        """Returns the lock, under which :meth:`handle` and :meth:`perform` are called."""
        return self._lock

    def handle(self, channel: int, message: Message, finding: Finding | None, traffic: tuple[int, int]) -> None:
        """Handles a message. Traffic is what the links of all lanes have carried."""
        self._post(self.node.handle(self._channels[channel - 1], message, finding))

    def perform(self, act: str, message: Message | None) -> bool:
        """Does what :meth:`do` asks for."""
        sends = self._sends_of(act, message)
        self._post(sends)
        return bool(sends)

    def _sends_of(self, act: str, message: Message | None) -> Sequence[Send]:
        match act, message:
            case "start", None:
                return self.node.start()
            case "publish", Publish() if isinstance(self.node, GlobalNode):
                return self.node.publish(message.plateau_steps, message.metrics)
            case "snapshot", Marker() if isinstance(self.node, GlobalNode):
                return [] if self.node.state is GlobalState.FINISHED else self.node.start_snapshot(message)
        raise ValueError(f"{type(self.node).__name__} cannot be asked for {act!r} with {message!r}.")

    def own_memory_for(self, worker: int, timeout: float | None = None, is_chosen: bool = False) -> Tensor:
        """Waits for this lane's memory for a push of a worker in another process, and returns it.

        Args:
            worker: The worker.
            timeout: Limit in seconds.
            is_chosen: Whether lane 0 has decided that it is this worker's turn.

        Raises:
            queue.Empty: If there is none within ``timeout`` seconds.
        """
        raise ProtocolError(f"{type(self.node).__name__} gets no pushes.")

    def carried(self) -> tuple[int, int]:
        """Returns the bytes on this lane's links inside its region, and to other regions."""
        return 0, 0

    def arrives_in_all_lanes(self, channel: int) -> bool:
        """Returns whether messages without a vector arrive on this link in every lane."""
        return True

    def _complete(self, shard: Shard) -> None:
        """Completes a shard of the node, with the lock for one portion at a time, so that no message waits for long."""
        while not self.ask(lambda _: shard.advance()):
            time.sleep(_YIELD)

    def _on_message(self, channel: int, message: Message, progress: Iterable[int]) -> None:
        if isinstance(message, Failure | Preempted):
            self._alarm.receive(message)
        elif isinstance(message, ShardWritten):
            self._forward(message)
        elif self._lane is not None:
            self._lane.arrived(channel, message, self.node.inspect(message, progress))
        else:
            traffic = self.carried() if isinstance(message, Push) else (0, 0)
            finding = self.node.inspect(message, progress)
            with self._lock:
                self.handle(channel, message, finding, traffic)

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

    There is memory for a few pushes at a time. While it is in use, further pushes wait at their senders, so that a
    server's memory does not grow with its number of workers.

    Args:
        node: The node.
        alarm: The alarm to report failures to.
        near: Addresses of the peers in the server's region, for counting bytes.
        store: Writes the node's part of a snapshot.
        lanes: See :class:`Host`, like ``compute``.
        pushes: Number of pushes of other processes that there is memory for.
    """

    def __init__(
        self,
        node: RegionNode,
        alarm: Alarm,
        near: Collection[int],
        store: Store,
        lanes: Lanes | None = None,
        compute: ComputeThreads | None = None,
        pushes: int = PUSHES,
    ) -> None:
        super().__init__(node, alarm, store, self.tell, lanes, LOCAL_HOST, compute)
        self._near = frozenset(near)
        self._traffic_before = node.traffic  # of the runs that this one resumes
        self._memory = PushMemory(node.model, pushes)
        self._for_answer: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        if node.server.exchanging:
            self._for_answer.put(torch.empty_like(node.model))  # for the answer that is still missing

    def memory_for_push(self, worker: int) -> Tensor:
        """Waits for the memory for a push of a worker in another process, and returns it."""
        return self.own_memory_for(worker) if self._lane is None else self._lane.memory_for(worker)

    def own_memory_for(self, worker: int, timeout: float | None = None, is_chosen: bool = False) -> Tensor:
        return self._memory.get(worker, timeout, is_chosen)

    def memory_for_answer(self) -> Tensor:
        """Returns the memory for an answer of the global server: the memory of the update that it answers."""
        return self._for_answer.get()

    def tell(self, message: ShardWritten) -> None:
        """Tells rank 0 that a part of a snapshot has been written."""
        self._links[GLOBAL][-1].post(message)

    def handle(self, channel: int, message: Message, finding: Finding | None, traffic: tuple[int, int]) -> None:
        if isinstance(message, Push):
            before, (within, between) = self._traffic_before, traffic
            self.node.traffic = before[0] + within, before[1] + between
        super().handle(channel, message, finding, traffic)
        if isinstance(message, Push) and message.final and message.vector is not None:
            self._memory.put(message.vector)

    def _after_sending(self, message: Message) -> Callable[[], None] | None:
        vector = vector_of(message)
        if vector is None:
            return None
        if isinstance(message, RegionUpdate):
            return partial(self._for_answer.put, vector)
        return partial(self._memory.put, vector)

    def carried(self) -> tuple[int, int]:
        within = between = 0
        for peer, links in list(self._links.items()):
            size = sum(link.bytes_sent + link.bytes_received for link in links)
            if peer in self._near:
                within += size
            else:
                between += size
        return within, between
