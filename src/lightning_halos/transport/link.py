"""Links: two ends, messages in both directions, in order.

Rules of this room: an end has one thread that sends and one that receives; nobody else touches the process group. The
threads are daemons, hold no lock while they wait, and end when both ends have said goodbye. A peer that disappears is
noticed at once, one that falls silent within the time limit: an idle sender says that it is alive. Vectors travel in
parts: the first ones are used while the next ones travel and the last ones are still computed.
"""

from __future__ import annotations

import queue
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_halos.core.messages import Message
from lightning_halos.core.vector import PART
from lightning_halos.transport import wire
from lightning_halos.transport.errors import PeerLostError

Filled = Iterable[int]
"""Says again and again how many elements of a vector are there, while it is filled from the front."""
OnMessage = Callable[[Message, Filled], None]
OnFailure = Callable[[Exception], None]
Memory = Callable[[int, torch.dtype], Tensor]
"""Gives the memory that a vector of so many elements is received into."""


class Filling:
    """Lets a vector be sent while it is filled, from the front, in a ``with`` block.

    If that raises, the rest becomes NaN, which no server accepts, so that the news of the failure can follow.

    Args:
        vector: The vector.
    """

    def __init__(self, vector: Tensor) -> None:
        self._vector = vector
        self._reached = 0
        self._progress: queue.SimpleQueue[int] = queue.SimpleQueue()

    def reach(self, elements: int) -> None:
        """Takes note of how many elements are there, and says so once there is another part to send."""
        before, self._reached = self._reached, elements
        if elements // PART > before // PART or elements == self._vector.numel():
            self._progress.put(elements)

    def __enter__(self) -> Filling:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is not None:
            self._vector[self._reached :] = torch.nan
        self.reach(self._vector.numel())

    def __iter__(self) -> Iterator[int]:
        there = 0
        while there < self._vector.numel():
            yield (there := self._progress.get())


@dataclass
class _Outgoing:
    message: Message
    filling: Filling | None
    sent: Callable[[], None] | None

    @property
    def filled(self) -> Filled:
        vector = wire.vector_of(self.message)
        return self.filling or ([] if vector is None else [vector.numel()])


class Link(ABC):
    """One end of a link.

    Attributes:
        is_remote: Whether the peer may be in another process, so that it can disappear.
        peer: Who is at the other end, for error messages.
        bytes_sent: Bytes that this end has put on the network.
        bytes_received: Bytes that this end has taken off the network.
        heard: When the peer last gave a sign of life, by ``time.monotonic``; ``None`` before it gave any.
    """

    is_remote = True

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.heard: float | None = None
        self.bytes_sent = 0
        self.bytes_received = 0
        self._outbox: queue.SimpleQueue[_Outgoing | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._waits: dict[str, float] = {}

    def start(self, on_message: OnMessage, on_failure: OnFailure) -> None:
        """Starts the threads.

        Args:
            on_message: Called with each message, one after the other, in the receiving thread. The message's vector
                arrives while the second argument is iterated over.
            on_failure: Called if the peer is lost, or if ``on_message`` raises.
        """
        for name, run in (("send", self._send_all), ("receive", self._receive_all)):
            thread = threading.Thread(
                target=self._guard, args=(run, on_message, on_failure), name=f"halos {name} {self.peer}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def post(self, message: Message, filling: Filling | None = None, sent: Callable[[], None] | None = None) -> None:
        """Sends a message, without waiting.

        Args:
            message: The message. Its vector must not change until it is sent.
            filling: Of the message's vector, if that is not complete yet.
            sent: Called in the sending thread when the message's vector may be written to again. Never called if the
                peer keeps the vector.
        """
        self._outbox.put(_Outgoing(message, filling, sent))

    def close(self) -> None:
        """Says goodbye. The threads end once the peer has said it too."""
        self._outbox.put(None)

    def silence(self, now: float) -> tuple[float, str]:
        """Returns since how many seconds this end waits for the peer, and for it to do what.

        Args:
            now: The time, of ``time.monotonic``.
        """
        waits = [(now - since, what) for what, since in list(self._waits.items())]
        return max(waits, default=(0.0, ""))

    def join(self, timeout: float) -> bool:
        """Waits for the threads to end. Returns whether they did, within ``timeout`` seconds."""
        for thread in self._threads:
            thread.join(timeout)
        return not any(thread.is_alive() for thread in self._threads)

    def _guard(self, run: Callable[[OnMessage], None], on_message: OnMessage, on_failure: OnFailure) -> None:
        try:
            run(on_message)
        except Exception as error:
            on_failure(error)

    @abstractmethod
    def _send_all(self, on_message: OnMessage) -> None: ...

    @abstractmethod
    def _receive_all(self, on_message: OnMessage) -> None: ...


class LoopbackLink(Link):
    """A link between two parts of the same process. Vectors change hands, without a copy."""

    is_remote = False

    def __init__(self, peer: str) -> None:
        super().__init__(peer)
        self._other: LoopbackLink

    @classmethod
    def pair(cls, first: str, second: str) -> tuple[LoopbackLink, LoopbackLink]:
        """Returns the two ends.

        Args:
            first: Who is at the second end: the peer of the first.
            second: Who is at the first end.
        """
        a, b = cls(first), cls(second)
        a._other, b._other = b, a
        return a, b

    def _send_all(self, on_message: OnMessage) -> None:
        """Nothing to do: the other end takes from this end's outbox."""

    def _receive_all(self, on_message: OnMessage) -> None:
        while (outgoing := self._other._outbox.get()) is not None:
            filled = iter(outgoing.filled)
            on_message(outgoing.message, filled)
            whole(filled)
            del outgoing, filled


class GlooLink(Link):
    """A link over a gloo process group.

    A message is a frame of fixed size (length of the JSON, elements and dtype of the vector, and as much of the JSON as
    there is room for), the rest of the JSON, and the vector. Most messages need no more than the frame.

    Args:
        group: The process group. This link has the traffic between its own rank and ``rank`` in it to itself.
        rank: The peer's rank in the group.
        peer: Who that is.
        timeout: Seconds of silence after which the peer counts as lost; see :meth:`Alarm.watch`.
        memory: Gives the memory that vectors are received into; default: new memory for each.
    """

    _TEXT, _VECTOR = 0, 1  # tags
    _HEADER = struct.Struct("<qqq")
    _FRAME = 1024  # bytes
    _GOODBYE, _ALIVE = -1, -2  # instead of a length of JSON

    def __init__(
        self,
        group: dist.ProcessGroup,
        rank: int,
        peer: str,
        timeout: float,
        memory: Memory | None = None,
    ) -> None:
        super().__init__(peer)
        self._group = group
        self._rank = rank
        self._timeout = timeout
        # gloo closes all connections of a group when one wait is too long, so this is the last resort only.
        self._limit = timedelta(seconds=2 * timeout)
        self._memory = memory or (lambda elements, dtype: torch.empty(elements, dtype=dtype))

    def _send_all(self, on_message: OnMessage) -> None:
        while True:
            try:
                outgoing = self._outbox.get(timeout=min(10.0, self._timeout / 4))
            except queue.Empty:
                self._send_frame(self._ALIVE)
                continue
            if outgoing is None:
                self._send_frame(self._GOODBYE)
                return
            self._send_message(outgoing)
            del outgoing  # with the vector's memory, before the next message is waited for

    def _send_frame(self, length: int, elements: int = 0, dtype: int = 0, data: bytes = b"") -> None:
        frame = (self._HEADER.pack(length, elements, dtype) + data).ljust(self._FRAME, b"\0")
        self._send_each([torch.frombuffer(bytearray(frame), dtype=torch.uint8)], self._TEXT)

    def _send_message(self, outgoing: _Outgoing) -> None:
        data, vector = wire.encode(outgoing.message), wire.vector_of(outgoing.message)
        room = self._FRAME - self._HEADER.size
        self._send_frame(len(data), *wire.describe(vector), data[:room])
        if len(data) > room:
            self._send_each([torch.frombuffer(bytearray(data[room:]), dtype=torch.uint8)], self._TEXT)
        if vector is not None:
            self._send_each(_parts_of(vector, outgoing.filled), self._VECTOR)
        if outgoing.sent is not None:
            outgoing.sent()

    def _receive_all(self, on_message: OnMessage) -> None:
        while True:
            frame = self._receive(self._FRAME)
            length, elements, dtype = self._HEADER.unpack_from(frame)
            if length == self._GOODBYE:
                return
            if length != self._ALIVE:
                data = frame[self._HEADER.size :][:length]
                if len(data) < length:
                    data += self._receive(length - len(data))
                self._receive_message(data, elements, wire.dtype_of(dtype), on_message)

    def _receive_message(self, data: bytes, elements: int, dtype: torch.dtype, on_message: OnMessage) -> None:
        vector = self._memory(elements, dtype) if elements else None
        filled = iter(()) if vector is None else self._receive_each(torch.split(vector, PART), self._VECTOR)
        on_message(wire.decode(data, vector), filled)
        whole(filled)

    def _receive(self, size: int) -> bytes:
        text = torch.empty(size, dtype=torch.uint8)
        whole(self._receive_each([text], self._TEXT))
        return bytes(text.tolist())

    def _send_each(self, tensors: Iterable[Tensor], tag: int) -> None:
        """Sends tensors, starting with each as soon as there is one."""
        with self._naming_peer():
            works = []
            for tensor in tensors:
                works.append(self._group.send([tensor], self._rank, tag))
                self.bytes_sent += tensor.nbytes
            for work in works:
                self._wait(work, "take a message")

    def _receive_each(self, tensors: Iterable[Tensor], tag: int) -> Iterator[int]:
        """Receives tensors. Yields how many elements are there."""
        there = 0
        with self._naming_peer():
            for tensor, work in [(tensor, self._group.recv([tensor], self._rank, tag)) for tensor in tensors]:
                self._wait(work, "say anything")
                self.heard = time.monotonic()
                self.bytes_received += tensor.nbytes
                there += tensor.numel()
                yield there

    def _wait(self, work: dist.Work, what: str) -> None:
        self._waits[what] = time.monotonic()
        work.wait(self._limit)
        del self._waits[what]

    @contextmanager
    def _naming_peer(self) -> Iterator[None]:
        """Names the peer when the process group fails."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, PeerLostError):
                raise
            raise PeerLostError(
                f"{self.peer} disappeared: its connection is closed. Last heard of {since(self.heard)}."
            ) from None


def since(heard: float | None) -> str:
    """Says how long ago a peer was heard of, in an error.

    Args:
        heard: When, by ``time.monotonic``; ``None`` if never.
    """
    if heard is None:
        return "never"
    seconds = time.monotonic() - heard
    return f"{seconds:.1f} s ago, at {time.strftime('%H:%M:%S', time.localtime(time.time() - seconds))}"


def whole(filled: Filled) -> None:
    """Waits until a vector is there."""
    for _ in filled:
        pass


def _parts_of(vector: Tensor, filled: Filled) -> Iterator[Tensor]:
    """Yields the parts of a vector as they are filled."""
    progress, there, stop = iter(filled), 0, 0
    for part in torch.split(vector, PART):
        stop += part.numel()
        while there < stop:
            there = next(progress)
        yield part


class Slot:
    """Memory for one vector at a time, shared by the links of a server.

    A push that finds it taken waits at its sender, so that a server's memory does not grow with its number of workers.
    """

    def __init__(self, elements: int, dtype: torch.dtype) -> None:
        self._elements = elements
        self._dtype = dtype
        self._vector: Tensor | None = None
        self._free = threading.Semaphore(1)

    def take(self, elements: int, dtype: torch.dtype) -> Tensor:
        """Waits for the memory. A vector of another size or dtype, which the server rejects, gets memory of its own."""
        if (elements, dtype) != (self._elements, self._dtype):
            return torch.empty(elements, dtype=dtype)
        self._free.acquire()
        if self._vector is None:
            self._vector = torch.empty(elements, dtype=dtype)
        return self._vector

    def give_back(self, vector: Tensor) -> None:
        """Lets the next one have the memory."""
        if vector is self._vector:
            self._free.release()
