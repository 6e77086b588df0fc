"""Keeps the servers of a worker's lanes equal in everything but their vectors.

The nodes are deterministic, so they stay equal if they handle the same messages in the same order. Lane 0 handles each
message when its vector has arrived in all lanes, and tells the others over links between the worker's processes what it
handles; they handle their own slices of it in this order, as if it had come with lane 0's fields. Nothing is decided
here. Without lanes this file is not used.
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol, TypeVar

from torch import Tensor

from lightning_halos.core.finding import Finding, combine, plain_finding
from lightning_halos.core.global_node import GlobalNode
from lightning_halos.core.messages import (
    Failure,
    Inspected,
    Message,
    Ordered,
    Preempted,
    ShardWritten,
    Turn,
)
from lightning_halos.core.protocol import ProtocolError
from lightning_halos.core.region_node import RegionNode
from lightning_halos.transport import wire
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.keyed_queues import KeyedQueues
from lightning_halos.transport.link import Link

T = TypeVar("T")

LOCAL_HOST, GLOBAL_HOST = 0, 1
"""Numbers of the hosts of a process in messages between lanes."""

READ = "read"
"""The act of reading a server's model, which all lanes do at the same moment."""

_PAUSE = 0.5  # seconds after which a thread that waits looks whether the run has ended


class Served(Protocol):
    """What a lane needs of a host; see :class:`~lightning_halos.transport.hosts.Host`."""

    @property
    def node(self) -> GlobalNode | RegionNode: ...
    def locked(self) -> AbstractContextManager[object]: ...
    def handle(self, channel: int, message: Message, finding: Finding | None, traffic: tuple[int, int]) -> None: ...
    def perform(self, act: str, message: Message | None) -> bool: ...
    def own_memory_for(self, worker: int, timeout: float | None = None, is_chosen: bool = False) -> Tensor: ...
    def carried(self) -> tuple[int, int]: ...
    def arrives_in_all_lanes(self, channel: int) -> bool: ...


class LanesEndedError(Exception):
    """What a thread waits for will not come, because the run has ended or failed."""


class Lanes:
    """The links of one process with the other processes of its worker.

    Args:
        lane: This process's lane.
        links: On lane 0, the link to each other lane; on the others, that to lane 0.
        alarm: The alarm to report failures to.
        written: On lane 0, called when another lane of this worker reports that it has written a shard.
    """

    def __init__(
        self, lane: int, links: Mapping[int, Link], alarm: Alarm, written: Callable[[ShardWritten], None]
    ) -> None:
        self.lane = lane
        self.links = dict(links)
        self.alarm = alarm
        self._written = written
        self._hosts: dict[int, HostLane] = {}

    def of_host(self, number: int, host: Served) -> HostLane:
        """Returns what keeps a host's node equal with those of the other lanes."""
        kind = LeadingLane if self.lane == 0 else FollowingLane
        self._hosts[number] = kind(number, host, self)
        return self._hosts[number]

    def start(self) -> None:
        """Starts the links, when all hosts of this process exist."""
        for lane, link in self.links.items():
            link.start(partial(self._on_message, lane), self.alarm.fail)

    def post(self, message: Message) -> None:
        """Sends a message to lane 0 or, there, to all others."""
        for link in self.links.values():
            link.post(message)

    def wait_for(self, inbox: queue.SimpleQueue[T]) -> T:
        """Returns the next item of a queue.

        Raises:
            LanesEndedError: If it will not come.
        """
        return self.wait_until(lambda timeout: inbox.get(timeout=timeout))

    def wait_until(self, get: Callable[[float], T]) -> T:
        """Returns what a function returns, which raises ``queue.Empty`` if that is not there within a timeout.

        Raises:
            LanesEndedError: If it will not come.
        """
        while True:
            # Before, because what is there when a link ends still counts.
            is_over = self.alarm.has_failed or any(link.has_ended for link in self.links.values())
            try:
                return get(_PAUSE)
            except queue.Empty:
                if is_over:
                    raise LanesEndedError("Another process of this worker has ended.") from None

    def _on_message(self, lane: int, message: Message, progress: Iterable[int]) -> None:
        match message:
            case Failure() | Preempted():
                self.alarm.receive(message)
            case ShardWritten():
                self._written(message)
            case Turn() | Inspected() | Ordered():
                self._hosts[message.host].receive(lane, message)
            case _:
                raise ProtocolError(f"Lane {lane} of this worker sent an unexpected message: {message!r}.")


class HostLane(ABC):
    """One lane of a host.

    Args:
        number: Number of the host.
        host: The host.
        lanes: The links between the lanes.
    """

    def __init__(self, number: int, host: Served, lanes: Lanes) -> None:
        self.number = number
        self.host = host
        self.lanes = lanes

    @abstractmethod
    def arrived(self, channel: int, message: Message, finding: Finding | None) -> None:
        """Handles a message whose vector has arrived in this lane, when it is its turn."""

    @abstractmethod
    def act(self, act: str, message: Message | None = None) -> bool:
        """Lets the node do what the process itself asks for. Returns whether there is anything to send, on lane 0."""

    @abstractmethod
    def memory_for(self, worker: int) -> Tensor:
        """Waits for the memory for a worker's push, and returns it."""

    @abstractmethod
    def read(self, out: Tensor, check: Callable[[], None]) -> None:
        """Copies this lane's slice of the node's model, of the same version in all lanes."""

    @abstractmethod
    def receive(self, lane: int, message: Turn | Inspected | Ordered) -> None:
        """Takes a message of another lane."""


class LeadingLane(HostLane):
    """Lane 0 of a host: its order is that of all lanes."""

    def __init__(self, number: int, host: Served, lanes: Lanes) -> None:
        super().__init__(number, host, lanes)
        self._inspected = KeyedQueues[tuple[int, int], Inspected]()
        self._carried = dict.fromkeys(lanes.links, (0, 0))

    def arrived(self, channel: int, message: Message, finding: Finding | None) -> None:
        has_vector = wire.vector_of(message) is not None
        if has_vector:  # so that no lane waits for its slice of it, while it could handle something else
            others = [self.lanes.wait_for(self._inspected[lane, channel]) for lane in self.lanes.links]
            if finding is not None:
                finding = combine([finding, *(Finding(other.fault, other.norm, other.touched) for other in others)])
        with self.host.locked():
            within, between = self.host.carried()
            order = Ordered(
                self.number,
                channel,
                message=wire.encode(message),
                has_vector=has_vector,
                finding=plain_finding(finding),
                within=within + sum(own for own, _ in self._carried.values()),
                between=between + sum(own for _, own in self._carried.values()),
            )
            # First of all, because what the node answers may let another host of this process go on.
            self.lanes.post(order)
            self.host.handle(channel, message, finding, (order.within, order.between))

    def act(self, act: str, message: Message | None = None) -> bool:
        with self.host.locked():
            self.lanes.post(Ordered(self.number, 0, act, b"" if message is None else wire.encode(message)))
            return self.host.perform(act, message)

    def memory_for(self, worker: int) -> Tensor:
        memory = self.host.own_memory_for(worker)
        self.lanes.post(Turn(self.number, worker))
        return memory

    def read(self, out: Tensor, check: Callable[[], None]) -> None:
        with self.host.locked():
            self.lanes.post(Ordered(self.number, 0, READ))
            out.copy_(self.host.node.model)

    def receive(self, lane: int, message: Turn | Inspected | Ordered) -> None:
        assert isinstance(message, Inspected)
        self._carried[lane] = message.within, message.between
        self._inspected[lane, message.channel].put(message)


class FollowingLane(HostLane):
    """Another lane of a host: it handles what lane 0 has handled.

    It has threads of its own for that, because the link to lane 0 must hear failures while a slice is waited for.
    """

    def __init__(self, number: int, host: Served, lanes: Lanes) -> None:
        super().__init__(number, host, lanes)
        self._orders: queue.SimpleQueue[Ordered] = queue.SimpleQueue()
        self._turns: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._arrived = KeyedQueues[int, Message]()
        self._granted = KeyedQueues[int, Tensor]()
        self._to_read: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        self._read: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._is_serving = False

    def arrived(self, channel: int, message: Message, finding: Finding | None) -> None:
        if wire.vector_of(message) is not None:
            fault, norm, touched = (None, 0.0, None) if finding is None else finding
            within, between = self.host.carried()
            self.lanes.post(
                Inspected(self.number, channel, fault, norm, [] if touched is None else list(touched), within, between)
            )
        self._arrived[channel].put(message)

    def act(self, act: str, message: Message | None = None) -> bool:
        return True  # lane 0 orders it

    def memory_for(self, worker: int) -> Tensor:
        return self.lanes.wait_for(self._granted[worker])

    def read(self, out: Tensor, check: Callable[[], None]) -> None:
        self._to_read.put(out)  # the thread that handles lane 0's orders fills it, so that no other copy is needed
        while True:
            check()
            try:
                return self._read.get(timeout=_PAUSE / 2)
            except queue.Empty:
                pass

    def receive(self, lane: int, message: Turn | Inspected | Ordered) -> None:
        if not self._is_serving:
            self._is_serving = True
            self._start("orders", self._handle_all)
            self._start("turns", self._grant_all)
        if isinstance(message, Turn):
            self._turns.put(message.worker)
        else:
            assert isinstance(message, Ordered)
            self._orders.put(message)

    def _start(self, name: str, run: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                run()
            except LanesEndedError:
                pass
            except BaseException as error:  # otherwise others would wait for this thread for ever
                self.lanes.alarm.fail(error if isinstance(error, Exception) else RuntimeError(repr(error)))

        threading.Thread(target=guarded, name=f"halos {name} of lane {self.lanes.lane}", daemon=True).start()

    def _grant_all(self) -> None:
        """Gives the memory for pushes to the workers in lane 0's order, whatever this lane's clock says of them."""
        while True:
            worker = self.lanes.wait_for(self._turns)
            get = partial(self.host.own_memory_for, worker, is_chosen=True)
            self._granted[worker].put(self.lanes.wait_until(get))

    def _handle_all(self) -> None:
        while True:
            order = self.lanes.wait_for(self._orders)
            if order.channel == 0:
                self._perform(order)
            else:
                self._handle(order)

    def _perform(self, order: Ordered) -> None:
        if order.act == READ:
            out = self.lanes.wait_for(self._to_read)  # without the lock, because this process may still compute
            with self.host.locked():
                out.copy_(self.host.node.model)
            self._read.put(None)
            return
        message = wire.decode(order.message, None) if order.message else None
        with self.host.locked():
            self.host.perform(order.act, message)

    def _handle(self, order: Ordered) -> None:
        own = None
        if order.has_vector or self.host.arrives_in_all_lanes(order.channel):
            own = self.lanes.wait_for(self._arrived[order.channel])
        vector = None if own is None else wire.vector_of(own)
        message = wire.decode(order.message, vector)
        if own is not None and (type(own) is not type(message) or order.has_vector != (vector is not None)):
            raise ProtocolError(
                f"Lane {self.lanes.lane} of this worker got {own!r}, but lane 0 got {message!r}. All processes of a"
                " worker must train the same module with the same settings."
            )
        finding = None if order.finding is None else Finding(*order.finding)
        with self.host.locked():
            self.host.handle(order.channel, message, finding, (order.within, order.between))
