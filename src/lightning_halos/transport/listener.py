"""Accepts connections from regions: one port, one thread, TLS with certificates on both sides.

A peer that has not proven who it is costs little memory and little time, whatever it sends. Nothing that it does ends
the thread. What authenticated peers say to each other is in ``tls_link``.
"""

from __future__ import annotations

import errno
import logging
import secrets
import selectors
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from lightning_halos.transport.address import Address, is_loopback, means_loopback, network_of
from lightning_halos.transport.certificates import Certificate, Keys
from lightning_halos.transport.connection import Connection, note_socket, tune_socket
from lightning_halos.transport.errors import CertificateRefusedError, ProtocolVersionError
from lightning_halos.transport.opening import (
    HEADER_BYTES,
    MOST_STREAMS,
    Answer,
    Opening,
    decode,
    encode,
    length_of,
)
from lightning_halos.transport.session import Session
from lightning_halos.transport.tls import explain, peer_certificate, server_context

T = TypeVar("T")
Steps = Generator[int, None, None]
"""What is done with a peer until it is authenticated. Yields what its socket has to be ready for."""

_log = logging.getLogger(__name__)

_LIMIT = 5.0  # seconds until a peer has to be authenticated
_MOST_BYTES = 2**16  # that a peer may send until then
_MOST_PEERS = 256  # that are not authenticated, at once
_MOST_FROM_ONE_NETWORK = 64
_ASSEMBLY = 30.0  # seconds until the next of the connections of an authenticated peer has to be there
_MOST_WAITING = 8  # first connections of one name whose others are not there yet
_MOST_SESSIONS = 64  # of one name at once; each costs threads
_LINES = 20  # about refused connections, in the log per minute

# In Linux's `struct tcp_info`. It counts handshakes, too, which Python's `ssl` does not.
_TCP_INFO, _BYTES_RECEIVED = getattr(socket, "TCP_INFO", None), struct.Struct("=128xQ")


class RefusedError(Exception):
    """A peer is refused. The text is for the peer and for the log."""


@dataclass
class _Peer:
    tls: ssl.SSLSocket
    network: str
    address: str
    deadline: float
    steps: Steps = field(init=False)
    is_taken: bool = False  # the socket is in a `Connection` now


@dataclass
class _Waiting:
    """The first connection of a peer, whose others are not there yet."""

    certificate: Certificate
    address: str
    deadline: float
    control: Connection
    streams: dict[int, Connection]
    count: int

    def close(self) -> None:
        for connection in (self.control, *self.streams.values()):
            connection.close()


class Listener:
    """Accepts connections.

    Args:
        address: Where to listen. An empty host means all addresses of this machine, IPv4 and IPv6.
        keys: The server's keys.
        admit: Called with the certificate of each connection, which is valid; raises
            :class:`CertificateRefusedError` to refuse it. The peer and the log get the error's text.
        authenticated: Called with each peer whose connections are complete, in the listener's thread; it must not wait.

    Attributes:
        addresses: Where it listens.

    Raises:
        OSError: If the port is taken, or the address is not of this machine.
        ValueError: If the keys are not a server's, or not valid now.
    """

    def __init__(
        self,
        address: Address,
        keys: Keys,
        admit: Callable[[Certificate], None],
        authenticated: Callable[[Session], None],
    ) -> None:
        self.renew(keys)
        self._admit = admit
        self._authenticated = authenticated
        self._listening = _listen(address)
        self.addresses = [Address(*opened.getsockname()[:2]) for opened in self._listening]
        self._peers: dict[int, _Peer] = {}
        self._from: Counter[str] = Counter()
        self._waiting: dict[str, _Waiting] = {}
        self._sessions: list[Session] = []  # that were complete, and perhaps are closed
        self._throttle = _Throttle()
        self._selector = selectors.DefaultSelector()
        self._waker, self._woken = socket.socketpair()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="halos listen", daemon=True)

    @property
    def port(self) -> int:
        """The port."""
        return self.addresses[0].port

    def renew(self, keys: Keys) -> None:
        """Uses other keys for connections from now on."""
        self._context = server_context(keys)
        self._keys = keys

    def start(self) -> None:
        """Starts to accept connections."""
        self._thread.start()

    def close(self) -> None:
        """Stops accepting connections. Those of authenticated peers stay."""
        self._is_closing = True
        self._waker.close()
        if self._thread.is_alive():
            self._thread.join()
        for opened in (*self._listening, self._woken):
            opened.close()

    def _run(self) -> None:
        self._selector.register(self._woken, selectors.EVENT_READ)
        for opened in self._listening:
            self._selector.register(opened, selectors.EVENT_READ, opened)
        while not self._is_closing:
            for key, _ in self._selector.select(self._seconds_to_wait()):
                if isinstance(key.data, _Peer):
                    self._try(partial(self._advance, key.data))
                elif key.data is not None:
                    self._try(partial(self._accept, key.data))
            self._try(self._drop_late)
        for peer in list(self._peers.values()):
            self._drop(peer)
        for waiting in self._waiting.values():
            waiting.close()
        self._selector.close()

    def _try(self, step: Callable[[], None]) -> None:
        """Calls a function. Nothing that a stranger does may end this thread."""
        try:
            step()
        except Exception:
            _log.exception("A connection was dropped because of an error in this program.")

    def _seconds_to_wait(self) -> float | None:
        deadlines = [peer.deadline for peer in self._peers.values()]
        deadlines += [waiting.deadline for waiting in self._waiting.values()]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _drop_late(self) -> None:
        now = time.monotonic()
        for peer in [peer for peer in self._peers.values() if peer.deadline <= now]:
            try:
                self._report(peer, f"it was not authenticated within {_LIMIT:g} s")
            finally:
                self._drop(peer)  # else it would be late again at once
        for token, waiting in list(self._waiting.items()):
            if waiting.deadline <= now:
                self._throttle.warn(
                    "%s at %s opened only %d of its %d connections for models, no other within %g s, and is dropped.",
                    *(waiting.certificate.name, waiting.address, len(waiting.streams), waiting.count, _ASSEMBLY),
                )
                self._waiting.pop(token).close()

    def _accept(self, listening: socket.socket) -> None:
        try:
            plain, (host, port, *_) = listening.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:  # too many open files
            self._throttle.warn("Cannot accept a connection: %s", error)
            time.sleep(0.1)  # it stays ready
            return
        address, network = str(Address(host, port)), network_of(host)
        if len(self._peers) >= _MOST_PEERS or self._from[network] >= _MOST_FROM_ONE_NETWORK:
            self._throttle.warn("Too many connections are not authenticated yet: one from %s is refused.", address)
            plain.close()
            return
        plain.setblocking(False)
        try:
            tune_socket(plain)
            tls = self._context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
        except (OSError, ValueError):  # the peer is gone already
            plain.close()
            return
        note_socket(tls)
        peer = _Peer(tls, network, address, time.monotonic() + _LIMIT)
        peer.steps = self._meet(peer)
        self._peers[tls.fileno()] = peer
        self._from[network] += 1
        self._selector.register(tls, selectors.EVENT_READ, peer)
        self._advance(peer)

    def _advance(self, peer: _Peer) -> None:
        try:
            if _bytes_received(peer.tls) > _MOST_BYTES:
                raise RefusedError(f"it sent more than {_MOST_BYTES} bytes before it was authenticated")
            self._selector.modify(peer.tls, next(peer.steps), peer)
            return
        except StopIteration:
            pass
        except (RefusedError, OSError) as error:
            self._report(peer, str(error))
        except BaseException:
            self._drop(peer)
            raise
        self._drop(peer)

    def _drop(self, peer: _Peer) -> None:
        if not peer.is_taken:
            self._forget(peer)
            peer.tls.close()
        peer.steps.close()
        self._from[peer.network] -= 1
        if not self._from[peer.network]:
            del self._from[peer.network]

    def _report(self, peer: _Peer, why: str) -> None:
        """Logs that a connection is refused. Whoever only looks whether the port is open is not worth a line."""
        if _bytes_received(peer.tls, unknown=2) > 1:  # the end of a connection counts as one
            self._throttle.warn("A connection from %s is refused: %s", peer.address, why)
        else:
            _log.debug("A connection from %s is dropped: %s", peer.address, why)

    def _meet(self, peer: _Peer) -> Steps:
        tls = peer.tls
        try:
            yield from _repeat(tls.do_handshake)
            certificate = peer_certificate(tls)
        except (OSError, ValueError) as error:
            self._report(peer, explain(error, self._keys) if isinstance(error, OSError) else str(error))
            yield from _linger(tls)  # the peer has to read the alert
            return
        who = f"{certificate.name} at {peer.address}"
        try:
            self._admit(certificate)
            length = length_of((yield from _read(tls, HEADER_BYTES)), who)
            opening = decode((yield from _read(tls, length)), Opening)
            if opening.token:
                yield from self._meet_stream(peer, certificate, opening)
            else:
                yield from self._meet_control(peer, certificate, opening)
        except (CertificateRefusedError, ProtocolVersionError, ValueError) as error:
            self._throttle.warn("A connection of %s is refused: %s", who, error)
            for_good = not isinstance(error, CertificateRefusedError) or error.for_good
            yield from _write(tls, encode(Answer(refusal=str(error)[:8000], for_good=for_good)))
            yield from _linger(tls)

    def _meet_control(self, peer: _Peer, certificate: Certificate, opening: Opening) -> Generator[int, None, None]:
        if not 0 <= opening.streams <= MOST_STREAMS:
            raise ValueError(f"{opening.streams} connections for models; at most {MOST_STREAMS} are possible.")
        name = certificate.name
        self._sessions = [session for session in self._sessions if not session.control.is_closed]
        if sum(session.name == name for session in self._sessions) >= _MOST_SESSIONS:
            raise ValueError(f"{name} has {_MOST_SESSIONS} connections already.")
        token = secrets.token_hex(16)
        yield from _write(peer.tls, encode(Answer(token)))
        of_this_name = [key for key, other in self._waiting.items() if other.certificate.name == name]
        for key in of_this_name[: max(0, len(of_this_name) + 1 - _MOST_WAITING)]:
            self._waiting.pop(key).close()
        deadline = time.monotonic() + _ASSEMBLY
        control = self._take(peer)
        self._waiting[token] = _Waiting(certificate, peer.address, deadline, control, {}, opening.streams)
        self._complete(token)

    def _meet_stream(self, peer: _Peer, certificate: Certificate, opening: Opening) -> Generator[int, None, None]:
        def find() -> _Waiting:
            waiting = self._waiting.get(opening.token)
            if waiting is None or waiting.certificate.name != certificate.name:
                raise ValueError("This connection belongs to none that was opened before. Connect again.")
            if opening.stream in waiting.streams or not 0 <= opening.stream < waiting.count:
                raise ValueError(f"The connection for models with number {opening.stream} is not expected.")
            return waiting

        find()
        yield from _write(peer.tls, encode(Answer()))
        waiting = find()
        waiting.streams[opening.stream] = self._take(peer)
        waiting.deadline = time.monotonic() + _ASSEMBLY
        self._complete(opening.token)

    def _take(self, peer: _Peer) -> Connection:
        """Takes a connection away from this thread's care."""
        self._forget(peer)
        peer.is_taken = True
        return Connection(peer.tls)

    def _forget(self, peer: _Peer) -> None:
        self._selector.unregister(peer.tls)
        del self._peers[peer.tls.fileno()]

    def _complete(self, token: str) -> None:
        waiting = self._waiting[token]
        if len(waiting.streams) < waiting.count:
            return
        del self._waiting[token]
        name, address = waiting.certificate.name, waiting.address
        streams = [waiting.streams[index] for index in range(waiting.count)]
        session = Session(waiting.certificate, f"{name} ({address})", address, waiting.control, streams)
        self._sessions.append(session)
        try:
            self._authenticated(session)
        except BaseException:
            session.abort()
            raise


class _Throttle:
    """Writes warnings to the log, but not more than ``_LINES`` per minute."""

    def __init__(self) -> None:
        self._since = 0.0
        self._written = 0
        self._left_out = 0

    def warn(self, text: str, *values: object) -> None:
        now = time.monotonic()
        if now - self._since > 60:
            if self._left_out:
                _log.warning("%d more lines about refused connections were left out.", self._left_out)
            self._since, self._written, self._left_out = now, 0, 0
        if self._written < _LINES:
            self._written += 1
            _log.warning(text, *values)
        else:
            self._left_out += 1


def _listen(address: Address) -> list[socket.socket]:
    """Opens a socket for each address that the host has, all at the same port."""
    try:
        found = socket.getaddrinfo(address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        reason = f"{error.strerror}. Give an address of this machine, or :{address.port} for all of them."
        raise OSError(error.errno, f"Cannot listen at {address}: {reason}") from None
    opened: list[socket.socket] = []
    port, foreign = address.port, list[OSError]()
    try:
        for family, host in dict.fromkeys((family, str(target[0])) for family, *_, target in found):
            if address.host and is_loopback(host) and not means_loopback(address.host):
                _log.warning(
                    "%s is %s on this machine, so other machines cannot reach the server. Listen at an address of an"
                    " interface, or at all: :%d.",
                    *(address.host, host, port),
                )
            try:
                listening = socket.socket(family, socket.SOCK_STREAM)
            except OSError:  # this machine has no IPv6
                continue
            opened.append(listening)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                listening.bind((host, port))
            except OSError as error:
                told = OSError(error.errno, f"Cannot listen at {Address(host, port)}: {error.strerror}")
                if error.errno != errno.EADDRNOTAVAIL:
                    raise told from None
                foreign.append(told)
                opened.pop().close()
                continue
            port = listening.getsockname()[1]
            listening.listen(128)
            listening.setblocking(False)
            note_socket(listening)
        if foreign and not opened:
            raise foreign[0]
    except BaseException:
        for listening in opened:
            listening.close()
        raise
    for lack in foreign:  # a name may have an address that this machine does not use, such as ::1 in a container
        _log.warning("%s. The server listens at the other addresses of %s.", lack.strerror, address.host)
    return opened


def _repeat(call: Callable[[], T]) -> Generator[int, None, T]:
    while True:
        try:
            return call()
        except ssl.SSLWantReadError:
            yield selectors.EVENT_READ
        except ssl.SSLWantWriteError:
            yield selectors.EVENT_WRITE


def _read(tls: ssl.SSLSocket, size: int) -> Generator[int, None, bytes]:
    data = bytearray(size)
    rest = memoryview(data)
    while rest:
        count = yield from _repeat(partial(tls.recv_into, rest))
        if not count:
            raise ConnectionResetError("it closed the connection before it said what it wants")
        rest = rest[count:]
    return bytes(data)


def _write(tls: ssl.SSLSocket, data: bytes) -> Generator[int, None, None]:
    yield from _repeat(partial(tls.send, data))


def _linger(tls: ssl.SSLSocket) -> Generator[int, None, None]:
    """Waits until the peer has closed. Closing with unread bytes would discard what the peer has not read yet."""
    with suppress(OSError):
        socket.socket.shutdown(tls, socket.SHUT_WR)
        while True:
            try:
                if not socket.socket.recv(tls, 4096):
                    return
            except BlockingIOError:
                yield selectors.EVENT_READ


def _bytes_received(tls: ssl.SSLSocket, unknown: int = 0) -> int:
    """Returns the bytes that a peer has sent, if the system (Linux) counts them."""
    if _TCP_INFO is None:
        return unknown
    try:
        (count,) = _BYTES_RECEIVED.unpack(tls.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _BYTES_RECEIVED.size))
    except (OSError, struct.error):
        return unknown
    return int(count)
