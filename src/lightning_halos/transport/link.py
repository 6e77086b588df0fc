"""Links: ordered connections between two ends, in both directions, within a process or over gloo.

Each end has one thread that sends and one that receives; no other thread may use the process group. The threads are
daemons, hold no lock while they wait, and end when both ends have said goodbye. A closed connection is noticed at once.
A peer that is silent for the time limit counts as lost. A peer that is busy does not, because an idle sender sends
signs of life. Vectors are sent in parts, so that the first parts are used while the last ones are still computed. Every
message is checked before memory is allocated for it.
"""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_halos.core.messages import Message
from lightning_halos.core.quantization import Format
from lightning_halos.core.vector import PART, Fill
from lightning_halos.core.wire_formats import is_rounded
from lightning_halos.transport import frames, wire
from lightning_halos.transport.errors import PeerLostError, is_lost_connection
from lightning_halos.transport.vector_parts import Part, VectorForm, code_of, parts_of

MIN_PATIENCE = 1800.0
"""Minimum limit in seconds for waits before and after training, when rank 0 may validate."""

OnMessage = Callable[[Message, Iterable[int]], None]
OnFailure = Callable[[Exception], None]
Form = VectorForm | tuple[int, torch.dtype]
"""The vectors on a link; a pair of their size and dtype stands for the format ``float32``."""

Memory = Callable[[], Tensor]
"""Returns memory to receive a vector into."""


class VectorCutOffError(Exception):
    """The rest of a vector will not arrive. Its message is dropped, and a :class:`Failure` follows."""


class _Progress:
    """Progress of filling a vector from front to back. Iterating over it yields the number of complete elements."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._reached = 0
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def advance(self, elements: int) -> None:
        """Reports the number of complete elements. The iteration goes on when another part is complete."""
        before, self._reached = self._reached, elements
        if elements // PART > before // PART or elements == self._size:
            self._queue.put(elements)

    def cut_off(self) -> None:
        """Reports that the rest will not follow."""
        self._queue.put(None)

    def __iter__(self) -> Iterator[int]:
        complete = 0
        while complete < self._size:
            elements = self._queue.get()
            if elements is None:
                raise VectorCutOffError
            yield (complete := elements)


@dataclass
class _Outgoing:
    message: Message
    progress: Iterable[int]
    sent: Callable[[], None] | None


class Link(ABC):
    """One end of a link.

    Attributes:
        is_remote: Whether the peer is in another process, so that it can disappear.
        peer: Name of the peer, for error messages.
        has_ended: Whether nothing more will arrive, because the peer has said goodbye or is lost.
        has_said_goodbye: Whether the peer has said goodbye. If it is lost, ``on_failure`` says so, perhaps later.
    """

    is_remote = True

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.has_ended = False
        self.has_said_goodbye = False
        self._heard: float | None = None
        self._sent = 0
        self._received = 0
        self._outbox: queue.SimpleQueue[_Outgoing | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._listening_since: float | None = None  # not while this end handles a message, and cannot hear the peer

    @property
    def bytes_sent(self) -> int:
        """Bytes that this end has sent over the network."""
        return self._sent

    @property
    def bytes_received(self) -> int:
        """Bytes that this end has received over the network."""
        return self._received

    @property
    def heard(self) -> float | None:
        """Time of the peer's last sign of life, by ``time.monotonic``; ``None`` before the first."""
        return self._heard

    def start(self, on_message: OnMessage, on_failure: OnFailure) -> None:
        """Starts the threads.

        Args:
            on_message: Called with each message, in order, in the receiving thread. The message's vector arrives while
                the second argument is iterated over.
            on_failure: Called if the peer is lost, or if ``on_message`` raises.
        """

        def receive() -> None:
            try:
                self._receive_all(on_message)
            finally:
                self.has_ended = True

        self._start_thread("receive", receive, on_failure)

    def post(self, message: Message, fill: Fill | None = None, sent: Callable[[], None] | None = None) -> None:
        """Sends a message, without waiting.

        Args:
            message: The message. Its vector must not change until it is sent.
            fill: Fills the message's vector from front to back, while it is sent. If it raises, the receiver drops the
                message. Default: the vector is complete.
            sent: Called in the sending thread when the message's vector may be overwritten. Never called if the peer
                keeps the vector.
        """
        vector = wire.vector_of(message)
        if vector is None or fill is None:
            self._outbox.put(_Outgoing(message, [] if vector is None else [vector.numel()], sent))
            return
        progress = _Progress(vector.numel())
        self._outbox.put(_Outgoing(message, progress, sent))
        try:
            fill(progress.advance)
        except BaseException:
            progress.cut_off()
            raise
        progress.advance(vector.numel())

    def close(self) -> None:
        """Says goodbye. The threads end when the peer has also said goodbye."""
        self._outbox.put(None)

    def silence(self, now: float) -> float:
        """Returns the seconds until ``now`` for which this end has listened and received nothing."""
        since = self._listening_since
        return 0.0 if since is None else now - since

    def join(self, timeout: float) -> None:
        """Waits at most ``timeout`` seconds for the threads to end."""
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _start_thread(self, name: str, run: Callable[[], None], on_failure: OnFailure) -> None:
        def guarded() -> None:
            try:
                run()
            except BaseException as error:  # otherwise others would wait for this thread for ever
                on_failure(error if isinstance(error, Exception) else RuntimeError(f"{self.peer}: {error!r}"))

        thread = threading.Thread(target=guarded, name=f"halos {name} {self.peer}", daemon=True)
        thread.start()
        self._threads.append(thread)  # not before, because one that has not started cannot be waited for

    @abstractmethod
    def _receive_all(self, on_message: OnMessage) -> None: ...


class LoopbackLink(Link):
    """A link between two parts of the same process. Each end reads the other's outbox, so vectors are not copied."""

    is_remote = False

    def __init__(self, peer: str) -> None:
        super().__init__(peer)
        self._other: LoopbackLink

    @classmethod
    def pair(cls, first: str, second: str) -> tuple[LoopbackLink, LoopbackLink]:
        """Returns the two ends of a new link, given the name of each end's peer."""
        a, b = cls(first), cls(second)
        a._other, b._other = b, a
        return a, b

    def _receive_all(self, on_message: OnMessage) -> None:
        while (outgoing := self._other._outbox.get()) is not None:
            with suppress(VectorCutOffError):
                progress = iter(outgoing.progress)
                on_message(outgoing.message, progress)
                wait_all(progress)
            del outgoing, progress
        self.has_said_goodbye = True


class FramedLink(Link):
    """What all links to other processes have in common: the frames, and what is checked in them.

    The first frame in each direction has the sender's version of the protocol. A message consists of a header (length
    of the fields, elements and format of the vector), the fields, and the vector. An idle sender sends signs of life.

    A link has no state: what it sends in a narrow format was rounded to it before, so that nothing is lost.

    Args:
        peer: Name of the peer.
        interval: Seconds between signs of life.
        form: The vectors on this link. Default: there are none.
        memory: Returns the memory to receive a vector into. Default: new memory for each vector.
    """

    def __init__(self, peer: str, interval: float, form: Form | None, memory: Memory | None) -> None:
        super().__init__(peer)
        self._interval = interval
        self._form = None if form is None else VectorForm(*form)
        self._memory = memory

    def start(self, on_message: OnMessage, on_failure: OnFailure) -> None:
        self._start_thread("send", self._send_all, on_failure)
        super().start(on_message, on_failure)

    @abstractmethod
    def _send_frame(self, length: int, elements: int = 0, code: int = 0, data: bytes = b"") -> None:
        """Sends a header and the fields."""

    @abstractmethod
    def _send_vector(self, vector: Tensor, form: Format, parts: Sequence[Part], progress: Iterable[int]) -> None:
        """Sends a vector from front to back, while it is filled."""

    @abstractmethod
    def _receive_header(self) -> tuple[int, int, int]: ...

    @abstractmethod
    def _receive_fields(self, length: int) -> bytes: ...

    @abstractmethod
    def _receive_vector(self, vector: Tensor, form: Format, parts: Sequence[Part]) -> Iterator[int]:
        """Receives a vector. Yields the number of elements that are complete."""

    def _send_all(self) -> None:
        self._send_frame(frames.HELLO, frames.PROTOCOL)
        while True:
            try:
                outgoing = self._outbox.get(timeout=self._interval)
            except queue.Empty:
                self._send_frame(frames.ALIVE)
                continue
            if outgoing is None:
                self._send_frame(frames.GOODBYE)
                return
            self._send_message(outgoing)
            del outgoing  # release the vector's memory before waiting for the next message

    def _send_message(self, outgoing: _Outgoing) -> None:
        data, vector = wire.encode(outgoing.message), wire.vector_of(outgoing.message)
        if vector is None:
            self._send_frame(len(data), data=data)
        else:
            form: Format = "float32"
            if self._form is not None and is_rounded(outgoing.message):
                form = self._form.format
            self._send_frame(len(data), vector.numel(), code_of(vector.dtype, form), data)
            self._send_vector(vector, form, self._parts(vector, form), outgoing.progress)
        if outgoing.sent is not None:
            outgoing.sent()

    def _receive_all(self, on_message: OnMessage) -> None:
        frames.check_hello(self.peer, self._receive_header())
        while True:
            length, elements, code = self._receive_header()
            if length == frames.GOODBYE:
                self.has_said_goodbye = True
                return
            if length != frames.ALIVE:
                self._check_header(length, elements, code)
                with suppress(VectorCutOffError):
                    self._receive_message(self._receive_fields(length), elements, code, on_message)

    def _check_header(self, length: int, elements: int, code: int) -> None:
        """Refuses sizes that are not possible on this link, before memory is allocated for them."""
        expected, codes = (0, [0]) if self._form is None else (self._form.elements, self._form.codes)
        is_possible = (elements, code) == (0, 0) or (elements == expected and code in codes)
        if not 0 <= length <= frames.MOST_BYTES or not is_possible:
            raise ValueError(
                f"{self.peer} announces a message of {length} bytes with a vector of {elements} elements (format"
                f" {code}). At most {frames.MOST_BYTES} bytes are accepted, and {expected} elements (format"
                f" {' or '.join(map(str, codes))})."
            )

    def _receive_message(self, data: bytes, elements: int, code: int, on_message: OnMessage) -> None:
        vector = None
        progress: Iterator[int] = iter(())
        if elements:
            assert self._form is not None
            form, dtype = self._form.format_of(code), self._form.dtype
            vector = torch.empty(elements, dtype=dtype) if self._memory is None else self._memory()
            progress = self._receive_vector(vector, form, self._parts(vector, form))
        on_message(wire.decode(data, vector), progress)
        wait_all(progress)

    def _parts(self, vector: Tensor, form: Format) -> list[Part]:
        return list(parts_of(vector, form, 0 if self._form is None else self._form.parameters))

    def _lost(self, what: str = "its connection is closed") -> PeerLostError:
        return PeerLostError(f"{self.peer} disappeared: {what}. Last heard of {since(self.heard)}.")


class GlooLink(FramedLink):
    """A link over a gloo process group.

    A frame has a fixed size, because a receiver has to know it: it has the header and the start of the fields. The rest
    of the fields follows, then the parts of the vector, and a byte that is 1 if the vector is complete. Most messages
    without a vector fit into the frame.

    Args:
        group: The process group. Only this link may use it between its own rank and ``rank``.
        rank: The peer's rank in the group.
        peer: Name of the peer.
        timeout: Seconds of silence after which the peer counts as lost; see :meth:`Alarm.watch`.
        form: The vectors on this link. Default: there are none.
        memory: Returns the memory to receive a vector into. Default: new memory for each vector.
    """

    _TEXT, _VECTOR = 0, 1  # tags
    _FRAME = 1024  # bytes
    _ROOM = _FRAME - frames.HEADER.size

    def __init__(
        self,
        group: dist.ProcessGroup,
        rank: int,
        peer: str,
        timeout: float,
        form: Form | None = None,
        memory: Memory | None = None,
    ) -> None:
        super().__init__(peer, min(10.0, timeout / 4), form, memory)
        self._group = group
        self._rank = rank
        # When a wait exceeds gloo's limit, gloo closes all connections of the group. So this is only a last resort.
        self._limit = timedelta(seconds=2 * progress_limit(timeout))
        self._start_of_fields = b""

    def _send_frame(self, length: int, elements: int = 0, code: int = 0, data: bytes = b"") -> None:
        frame = frames.HEADER.pack(length, elements, code) + data[: self._ROOM]
        texts = [frame.ljust(self._FRAME, b"\0"), data[self._ROOM :]]
        self._send_each([torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in texts if text], self._TEXT)

    def _send_vector(self, vector: Tensor, form: Format, parts: Sequence[Part], progress: Iterable[int]) -> None:
        self._send_each(_bytes_of(vector, form, parts, progress), self._VECTOR)

    def _receive_header(self) -> tuple[int, int, int]:
        frame = self._receive(self._FRAME)
        self._start_of_fields = frame[frames.HEADER.size :]
        length, elements, code = frames.HEADER.unpack_from(frame)
        return length, elements, code

    def _receive_fields(self, length: int) -> bytes:
        data = self._start_of_fields[:length]
        return data if len(data) == length else data + self._receive(length - len(data))

    def _receive(self, size: int) -> bytes:
        text = torch.empty(size, dtype=torch.uint8)
        wait_all(self._receive_each([text], self._TEXT))
        return text.numpy().tobytes()

    def _receive_vector(self, vector: Tensor, form: Format, parts: Sequence[Part]) -> Iterator[int]:
        complete = torch.zeros(1, dtype=torch.uint8)
        own = vector.view(torch.uint8)
        size = vector.itemsize
        data = [
            own[part.start * size : part.stop * size]
            if part.narrow == part.start
            else torch.empty(part.nbytes(form, size), dtype=torch.uint8)
            for part in parts
        ]
        received = self._receive_each(chain(data, (complete,)), self._VECTOR)
        for part, _ in zip(parts, received, strict=False):
            if part.narrow > part.start:
                part.decode(data[0], vector, form)
            del data[0]
            if part is not parts[-1]:
                yield part.stop
        wait_all(received)
        if not complete:
            raise VectorCutOffError
        yield vector.numel()

    def _send_each(self, tensors: Iterable[Tensor], tag: int) -> None:
        with self._naming_peer():
            works = []
            for tensor in tensors:
                works.append(self._group.send([tensor], self._rank, tag))
                self._sent += tensor.nbytes
            for work in works:
                work.wait(self._limit)

    def _receive_each(self, tensors: Iterable[Tensor], tag: int) -> Iterator[int]:
        """Receives tensors. Yields the number of bytes that have arrived."""
        received = 0
        with self._naming_peer():
            works = deque((tensor.nbytes, self._group.recv([tensor], self._rank, tag)) for tensor in tensors)
            while works:
                size, work = works.popleft()
                self._listening_since = time.monotonic()
                work.wait(self._limit)
                self._listening_since = None
                self._heard = time.monotonic()
                self._received += size
                received += size
                yield received

    @contextmanager
    def _naming_peer(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, PeerLostError) or not is_lost_connection(error):
                raise
            raise self._lost() from None


def progress_limit(timeout: float) -> float:
    """Returns the limit for waiting for a living peer: 10 times that for silence, and at least ``MIN_PATIENCE``."""
    return max(10 * timeout, MIN_PATIENCE)


def since(heard: float | None) -> str:
    """Returns text for an error that says how long ago a time by ``time.monotonic`` was; ``None`` is never."""
    if heard is None:
        return "never"
    seconds = time.monotonic() - heard
    return f"{seconds:.1f} s ago, at {time.strftime('%H:%M:%S', time.localtime(time.time() - seconds))}"


def wait_all(progress: Iterable[int]) -> None:
    """Waits until a vector has arrived completely."""
    deque(progress, maxlen=0)


def _bytes_of(vector: Tensor, form: Format, parts: Iterable[Part], progress: Iterable[int]) -> Iterator[Tensor]:
    """Yields the parts of a vector as soon as they are complete, and a byte: 1 if the vector is complete, else 0.

    All parts of a vector that is cut off are sent, because the receiver waits for them.
    """
    steps, complete = iter(progress), 0
    for part in parts:
        while 0 <= complete < part.stop:
            try:
                complete = next(steps)
            except VectorCutOffError:
                complete = -1
        yield part.encode(vector, form)
    yield torch.tensor([complete >= 0], dtype=torch.uint8)
