"""A link over TLS connections. Frames travel on the first connection, the parts of a vector on all of them.

A single TCP connection does not fill a long fast line. How connections are opened is in ``listener`` and ``dialer``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import torch
from torch import Tensor

from lightning_halos.core.messages import Message
from lightning_halos.core.quantization import Format
from lightning_halos.core.vector import Fill, ignore_progress
from lightning_halos.transport import frames
from lightning_halos.transport.connection import Connection
from lightning_halos.transport.errors import PeerLostError
from lightning_halos.transport.link import Form, FramedLink, Memory, OnFailure, OnMessage, VectorCutOffError
from lightning_halos.transport.vector_parts import Part

INTERVAL = 1.0
"""Seconds between an idle sender's signs of life."""

_WAIT, _PART, _CUT_OFF = b"\0", b"\1", b"\2"  # before each part: not filled yet; it follows; the vector ends here
_DISCARD = 2**16  # bytes that are read at once to be thrown away


class TLSLink(FramedLink):
    """A link over one or several TLS connections to the same peer.

    Part i of a vector travels on connection i mod N, after a byte that says that it follows. If a vector is cut off,
    its remaining parts are not sent.

    If a connection is lost, all are closed, and the link is over. After a message that is refused, this end can still
    send, so that it can tell the peer why. It reads on without looking at the bytes, because closing a connection with
    unread bytes would discard what the peer has not read yet.

    Args:
        connections: The connections. Only this link may use them.
        peer: Name of the peer.
        form: The vectors on this link. Default: there are none.
        memory: Returns the memory to receive a vector into. Default: new memory for each vector.
    """

    def __init__(
        self,
        connections: Sequence[Connection],
        peer: str,
        form: Form | None = None,
        memory: Memory | None = None,
    ) -> None:
        super().__init__(peer, INTERVAL, form, memory)
        self._connections = list(connections)
        self._streams: _Jobs | None = None  # those that receive a vector
        self._on_failure: OnFailure = lambda error: None
        self._ending = threading.Lock()
        self._is_told = False  # whether `on_failure` was called, or must not be called any more
        self._is_closed = False
        self._reason = ""  # why the connections are lost
        self._directions = 2  # that are open

    @property
    def is_closed(self) -> bool:
        """Whether the connections are closed."""
        return self._is_closed

    @property
    def bytes_sent(self) -> int:
        return sum(connection.sent for connection in self._connections)

    @property
    def bytes_received(self) -> int:
        return sum(connection.received for connection in self._connections)

    @property
    def heard(self) -> float | None:
        return max((c.heard for c in self._connections if c.heard is not None), default=None)

    def silence(self, now: float) -> float:
        waiting = [connection.waiting_since for connection in self._connections]
        return max(0.0, min((now - since for since in waiting if since is not None), default=0.0))

    def start(self, on_message: OnMessage, on_failure: OnFailure) -> None:
        """Starts the threads.

        Args:
            on_message: See :meth:`Link.start`.
            on_failure: Called at most once, and not after :meth:`abort`.
        """
        self._on_failure = on_failure
        super().start(on_message, self._fail)

    def post(self, message: Message, fill: Fill | None = None, sent: Callable[[], None] | None = None) -> None:
        """Sends a message, without waiting; see :meth:`Link.post`. Without a connection, it is dropped."""
        if not self._is_closed:
            super().post(message, fill, sent)
        elif fill is not None:
            fill(ignore_progress)

    def abort(self) -> None:
        """Closes the connections at once. The threads end without an error."""
        with self._ending:
            self._is_told = True
        self._close_connections("this process has closed the connection")

    def _fail(self, error: Exception) -> None:
        with self._ending:
            is_told, self._is_told = self._is_told, True
        if not is_told:
            self._on_failure(error)

    def _close_connections(self, reason: str) -> None:
        with self._ending:
            self._is_closed = True
            self._reason = self._reason or reason  # later ones are only a consequence of the first
        for connection in self._connections:
            connection.close()
        self._outbox.put(None)  # the sending thread may wait for a message

    def _end_direction(self) -> None:
        with self._ending:
            self._directions -= 1
        if not self._directions:
            self._close_connections("both ends have said goodbye")

    def _send_all(self) -> None:
        super()._send_all()
        self._end_direction()

    def _receive_all(self, on_message: OnMessage) -> None:
        try:
            super()._receive_all(on_message)
        except PeerLostError:
            raise
        except Exception as error:
            self._fail(error)
            self._discard()
        self._end_direction()

    def _discard(self) -> None:
        """Reads until the peer closes the connection."""
        with suppress(PeerLostError):
            if self._streams is not None:
                self._streams.wait()
            memory = memoryview(bytearray(_DISCARD))
            with self._naming_peer():
                while True:
                    self._connections[0].receive_into(memory)

    def _send_frame(self, length: int, elements: int = 0, code: int = 0, data: bytes = b"") -> None:
        with self._naming_peer():
            self._connections[0].send(frames.HEADER.pack(length, elements, code) + data)

    def _receive_header(self) -> tuple[int, int, int]:
        length, elements, code = frames.HEADER.unpack(self._receive_fields(frames.HEADER.size))
        return length, elements, code

    def _receive_fields(self, length: int) -> bytes:
        with self._naming_peer():
            return self._connections[0].receive(length)

    def _send_vector(self, vector: Tensor, form: Format, parts: Sequence[Part], progress: Iterable[int]) -> None:
        filling = _Filling()
        send = partial(self._send_parts, vector, form, parts, filling)
        streams = self._start_streams("send", len(parts), send)
        try:
            for complete in progress:
                filling.advance(complete)
        except VectorCutOffError:
            filling.cut_off()
        streams.join()

    def _send_parts(self, vector: Tensor, form: Format, parts: Sequence[Part], filling: _Filling, mine: range) -> None:
        connection = self._connections[mine.start]
        with self._naming_peer():
            for index in mine:
                part = parts[index]
                while not filling.wait_for(part.stop, self._interval):
                    connection.send(_WAIT)
                if filling.is_cut_off(part.stop):
                    connection.send(_CUT_OFF)
                    return
                connection.send(_PART)
                connection.send(_memory_of(part.encode(vector, form)))

    def _receive_vector(self, vector: Tensor, form: Format, parts: Sequence[Part]) -> Iterator[int]:
        arrival = _Arrival()
        # They start before the receiver asks for the first part, and do not wait while it uses a part.
        receive = partial(self._receive_parts, vector, form, parts, arrival)
        streams = self._start_streams("receive", len(parts), receive)
        self._streams = streams

        def progress() -> Iterator[int]:
            for index, part in enumerate(parts):
                is_there = arrival.wait_for(index)
                if not is_there or index + 1 == len(parts):
                    streams.join()  # before anybody else reads from their connections
                if not is_there:
                    raise VectorCutOffError
                yield part.stop

        return progress()

    def _receive_parts(
        self, vector: Tensor, form: Format, parts: Sequence[Part], arrival: _Arrival, mine: range
    ) -> None:
        connection = self._connections[mine.start]
        try:
            with self._naming_peer():
                for index in mine:
                    while (sign := connection.receive(1)) == _WAIT:
                        pass
                    if sign == _CUT_OFF:
                        arrival.cut_off(index)
                        return
                    if sign != _PART:
                        raise ValueError(f"{self.peer} sent {sign!r} instead of a part of a vector.")
                    self._receive_part(connection, vector, form, parts[index])
                    arrival.add(index)
        except BaseException as error:
            arrival.fail(error)
            raise

    @staticmethod
    def _receive_part(connection: Connection, vector: Tensor, form: Format, part: Part) -> None:
        if part.narrow == part.start:
            connection.receive_into(_memory_of(vector[part.start : part.stop]))
            return
        data = torch.empty(part.nbytes(form, vector.itemsize), dtype=torch.uint8)
        connection.receive_into(_memory_of(data))
        part.decode(data, vector, form)

    def _start_streams(self, name: str, parts: int, run: Callable[[range], None]) -> _Jobs:
        count = min(parts, len(self._connections))
        jobs = [partial(run, range(first, parts, count)) for first in range(count)]
        return _Jobs(f"halos {name} part {self.peer}", jobs)

    @contextmanager
    def _naming_peer(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._close_connections(str(error.strerror or error))
            raise self._lost(self._reason) from None


class _Jobs:
    """Functions that run in threads of their own."""

    def __init__(self, name: str, jobs: Sequence[Callable[[], None]]) -> None:
        self._errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(job,), name=name, daemon=True) for job in jobs]
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        """Waits for all functions."""
        for thread in self._threads:
            thread.join()

    def join(self) -> None:
        """Waits for all functions, and raises the first error."""
        self.wait()
        if self._errors:
            raise self._errors[0]

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self._errors.append(error)


class _Filling:
    """How far a vector is filled. Several threads wait for it."""

    def __init__(self) -> None:
        self._complete = 0
        self._is_cut_off = False
        self._changed = threading.Condition()

    def advance(self, complete: int) -> None:
        with self._changed:
            self._complete = complete
            self._changed.notify_all()

    def cut_off(self) -> None:
        with self._changed:
            self._is_cut_off = True
            self._changed.notify_all()

    def wait_for(self, elements: int, timeout: float) -> bool:
        """Waits until the vector is filled up to ``elements`` or cut off. Returns whether it is, within the timeout."""
        with self._changed:
            return self._changed.wait_for(lambda: self._is_cut_off or self._complete >= elements, timeout)

    def is_cut_off(self, elements: int) -> bool:
        """Returns whether the vector will not be filled up to ``elements``."""
        return self._complete < elements


class _Arrival:
    """Which parts of a vector have arrived."""

    def __init__(self) -> None:
        self._arrived: set[int] = set()
        self._cut_off: set[int] = set()
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def add(self, index: int) -> None:
        with self._changed:
            self._arrived.add(index)
            self._changed.notify_all()

    def cut_off(self, index: int) -> None:
        """Reports that a part will not arrive."""
        with self._changed:
            self._cut_off.add(index)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def wait_for(self, index: int) -> bool:
        """Waits until a part has arrived. Returns whether it has; otherwise it will not. Raises the first error."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or index in self._arrived or index in self._cut_off)
            if self._error is not None:
                raise self._error
            return index in self._arrived


def _memory_of(values: Tensor) -> memoryview:
    return values.numpy().data.cast("B")
