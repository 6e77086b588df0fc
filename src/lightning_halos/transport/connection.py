"""A TLS connection that one thread may read while another one writes.

Two threads must not be inside the same OpenSSL object at once, so a lock is held during each call, and never during a
wait for the network. Bytes go between the kernel and the caller's memory; nothing here knows what they mean.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar

T = TypeVar("T")

Check = Callable[[], None]
"""Called several times a second during a wait; may raise, for example because a time limit is over."""

_CHUNK = 2**18  # bytes of one call that sends; while it encrypts them, the connection cannot be read
_PIECE = 2**16  # bytes of a text that are received at once
_PATIENCE = 0.1  # seconds between two checks
_IDLE = 10  # seconds without traffic after which the kernel asks whether the peer is there

_open: weakref.WeakSet[socket.socket] = weakref.WeakSet()


class Connection:
    """A TLS connection.

    At most one thread receives at a time, and at most one sends. Any thread may close.

    Args:
        tls: The socket. It becomes non-blocking, and only the connection may use it from now on.

    Attributes:
        tls: The socket.
        sent: Bytes that were sent, without the overhead of TLS.
        received: Bytes that were received, without the overhead of TLS.
        heard: Time of the last arrival of bytes, by ``time.monotonic``; ``None`` before the first.
        waiting_since: Time since which a thread waits here for bytes and got none; ``None`` if no thread waits.
    """

    def __init__(self, tls: ssl.SSLSocket) -> None:
        tls.setblocking(False)
        note_socket(tls)
        self.sent = 0
        self.received = 0
        self.heard: float | None = None
        self.waiting_since: float | None = None
        self.tls = tls
        self._lock = threading.Lock()
        self._users = 0  # calls in progress; the last one closes the descriptor, so that none sees its number reused
        self._is_closed = False

    def handshake(self, check: Check) -> None:
        """Does the TLS handshake.

        Raises:
            OSError: If it fails.
        """
        with self._in_use():
            self._attempt(self.tls.do_handshake, check)

    def send(self, data: bytes | memoryview, check: Check | None = None) -> None:
        """Sends bytes. Returns when the kernel has all of them.

        Raises:
            OSError: If the connection is lost or closed.
        """
        view = memoryview(data)
        with self._in_use():
            for start in range(0, len(view), _CHUNK):
                chunk = view[start : start + _CHUNK]
                # After a call that would block, OpenSSL wants the same bytes again, and returns when all are sent.
                self._attempt(partial(self.tls.send, chunk), check)
                self.sent += len(chunk)

    def receive_into(self, memory: memoryview, check: Check | None = None) -> None:
        """Receives bytes until ``memory``, a view of single bytes, is full.

        Raises:
            OSError: If the connection is lost or closed.
        """
        size, done = len(memory), 0
        with self._in_use():
            self.waiting_since = time.monotonic()
            try:
                while done < size:
                    count = self._attempt(partial(self.tls.recv_into, memory[done:]), check)
                    if not count:
                        raise ConnectionResetError("the connection is closed")
                    self.heard = self.waiting_since = time.monotonic()
                    self.received += count
                    done += count
            finally:
                self.waiting_since = None

    def receive(self, size: int, check: Check | None = None) -> bytes:
        """Receives ``size`` bytes; see :meth:`receive_into`. It takes memory for what has arrived, not for the rest."""
        data = bytearray()
        while len(data) < size:
            piece = bytearray(min(size - len(data), _PIECE))
            self.receive_into(memoryview(piece), check)
            data += piece
        return bytes(data)

    def close(self) -> None:
        """Closes the connection. Threads that use it get an error at once."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            # Not the method of the TLS socket, which would then send as plain text.
            with suppress(OSError):
                socket.socket.shutdown(self.tls, socket.SHUT_RDWR)
            if not self._users:
                self.tls.close()

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._lock:
            self._check_open()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._is_closed and not self._users:
                    self.tls.close()

    def _attempt(self, call: Callable[[], T], check: Check | None) -> T:
        """Repeats a call until it need not wait for the network."""
        while True:
            with self._lock:
                self._check_open()
                try:
                    return call()
                except ssl.SSLWantReadError:
                    events = select.POLLIN
                except ssl.SSLWantWriteError:
                    events = select.POLLOUT
            poll = select.poll()
            poll.register(self.tls, events)
            if check is None:
                poll.poll()
                continue
            check()
            while not poll.poll(_PATIENCE * 1000):
                check()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ConnectionAbortedError("this process has closed the connection")


def tune_socket(opened: socket.socket) -> None:
    """Sets the options of a TCP connection: nothing is held back, and no NAT on the way forgets it.

    Signs of life travel on the first connection of a link only. The others carry nothing between two models, which may
    take hours, and a NAT that has forgotten a connection lets nothing through any more, often without a word.
    """
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name in ("TCP_KEEPIDLE", "TCP_KEEPALIVE", "TCP_KEEPINTVL"):  # the first is Linux's, the second macOS's
        if hasattr(socket, name):
            opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), _IDLE)


def note_socket(opened: socket.socket) -> None:
    """Makes forked processes, such as DataLoader workers, give up their copy of a socket.

    Otherwise its connection would stay open when this process dies.
    """
    _open.add(opened)


def _give_up_sockets() -> None:
    """Runs in every forked process, before any other code."""
    descriptors = [opened.fileno() for opened in _open]
    if not descriptors:
        return
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        if descriptor >= 0:  # it keeps its number, because the socket's object may close it later
            os.dup2(nothing, descriptor, inheritable=False)
    os.close(nothing)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_give_up_sockets)
