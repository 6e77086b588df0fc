"""Connects to the global server: every address of its name, with back-off, until a time limit.

An error has to be enough to mend what is wrong, so it names each address that was tried, the interface that was used,
what happened, and what to do.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import SystemRandom
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_halos.transport.address import Address, is_loopback, means_loopback, route_to
from lightning_halos.transport.certificates import Certificate, Keys, read_keys
from lightning_halos.transport.connection import Check, Connection, tune_socket
from lightning_halos.transport.errors import ProtocolVersionError, ServerRefusedError, ServerUnreachableError
from lightning_halos.transport.interruption import interruptible
from lightning_halos.transport.opening import (
    HEADER_BYTES,
    MOST_STREAMS,
    Answer,
    Opening,
    decode,
    encode,
    length_of,
)
from lightning_halos.transport.tls import client_context, explain, peer_certificate

if TYPE_CHECKING:
    from lightning_halos.transport.session import Session

STREAMS = 4
"""Default number of connections for models."""

_CONNECT = 10.0  # seconds for one address to accept a connection
_OPEN = 15.0  # seconds for TLS and the server's answer on one connection
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 5.0  # seconds between attempts
_SLICE = 0.1  # seconds between two checks for interruptions


class Connected(NamedTuple):
    """The connections with the global server, which are those of a :class:`Session`."""

    certificate: Certificate
    peer: str  # its name, for error messages
    address: str  # as text
    control: Connection
    streams: Sequence[Connection]


def dial(
    address: Address,
    keys: str | Path,
    streams: int = STREAMS,
    timeout: float = 300.0,
    interrupted: Callable[[], None] = lambda: None,
    tell: Callable[[str], None] = lambda reason: None,
) -> Session:
    """Connects to the global server, and returns the peer with its links; see :func:`connect`."""
    from lightning_halos.transport.session import Session  # here, because it needs torch

    return Session(*connect(address, keys, streams, timeout, interrupted, tell))


def connect(
    address: Address,
    keys: str | Path,
    streams: int = STREAMS,
    timeout: float = 300.0,
    interrupted: Callable[[], None] = lambda: None,
    tell: Callable[[str], None] = lambda reason: None,
) -> Connected:
    """Connects to the global server.

    What may pass by itself is tried again, with growing pauses: a server that does not listen yet, a name that is not
    known yet, a network that is down.

    Args:
        address: The server's address.
        keys: File with this region's keys. It is read at each call, so that it can be renewed.
        streams: Number of connections for models; 0 for a control link alone.
        timeout: Limit in seconds for all attempts together.
        interrupted: Called several times a second; may raise.
        tell: Called before the server is tried again, once for each reason why it could not be reached.

    Raises:
        ServerRefusedError: If trying again does not help: certificates, versions, another program at that port.
        ServerUnreachableError: If the server cannot be reached in time.
        ValueError: If the keys cannot be used.
        OSError: If the file with the keys cannot be read.
    """
    if not 0 <= streams <= MOST_STREAMS:
        raise ValueError(f"streams={streams} must be between 0 and {MOST_STREAMS}.")
    start = time.monotonic()
    own = read_keys(keys)
    pause, attempts = _FIRST_PAUSE, 0
    told: set[str] = set()
    while True:
        attempts += 1
        remaining = start + timeout - time.monotonic()
        attempt = _Attempt(address, own, streams, max(1.0, remaining), interrupted)
        connected = attempt.run()
        if connected is not None:
            return connected
        if attempt.is_for_good:
            text = f"The global server {address} cannot be used. {attempt.report()}"
            raise ServerRefusedError(text, attempt.is_answer)
        wait = pause * SystemRandom().uniform(0.5, 1.0)  # not all regions at once; it leaves the user's seeds alone
        pause = min(2 * pause, _LONGEST_PAUSE)
        if time.monotonic() + wait > start + timeout:
            raise ServerUnreachableError(
                f"The global server {address} could not be reached within timeout={timeout:g} s ({attempts}"
                f" attempt{'s' if attempts > 1 else ''}). {attempt.report()}"
            )
        if (reason := attempt.report()) not in told:
            told.add(reason)
            tell(
                f"The global server {address} cannot be reached yet. It is tried again for up to {timeout:g} s."
                f" {reason}"
            )
        _sleep(wait, interrupted)


class _Target(NamedTuple):
    family: int
    sockaddr: tuple[Any, ...]

    def __str__(self) -> str:
        return str(Address(*self.sockaddr[:2]))


class _FailedError(Exception):
    """An address could not be used, for this reason."""

    def __init__(self, reason: str, is_for_good: bool = False, is_answer: bool = False) -> None:
        super().__init__(reason)
        self.is_for_good = is_for_good
        self.is_answer = is_answer  # of the server itself


class _Attempt:
    """One attempt to connect, at all addresses of the server.

    Attributes:
        is_for_good: Whether all addresses refused in such a way that another attempt does not help.
        is_answer: Whether the server itself has refused at one of them.
    """

    def __init__(
        self, address: Address, keys: Keys, streams: int, timeout: float, interrupted: Callable[[], None]
    ) -> None:
        self._address = address
        self._keys = keys
        self._context = client_context(keys)
        self._streams = streams
        self._deadline = time.monotonic() + timeout
        self._interrupted = interrupted
        self._failures: list[str] = []
        self.is_for_good = self.is_answer = False

    def run(self) -> Connected | None:
        """Returns the connections, or ``None`` if no address can be used."""
        for_good = []
        for target in self._resolve():
            try:
                return self._open(target)
            except _FailedError as error:
                for_good.append(error.is_for_good)
                self.is_answer = self.is_answer or error.is_answer
                route = route_to(target.family, target.sockaddr)
                self._failures.append(f"{target}{f' from {route}' if route else ''}: {error}{self._hint(target)}")
        self.is_for_good = bool(for_good) and all(for_good)
        return None

    def report(self) -> str:
        """Returns what happened at each address."""
        return " ".join(self._failures)

    def _resolve(self) -> list[_Target]:
        host, port = self._address

        def look_up() -> list[Any]:
            return socket.getaddrinfo(host or "localhost", port, type=socket.SOCK_STREAM)

        try:
            found = interruptible(look_up, self._interrupted, self._deadline - time.monotonic())
        except TimeoutError:
            self._failures.append(f"No name server answered the question for {host}. Check this machine's DNS.")
            return []
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or str(error)
            self._failures.append(
                f"The name {host} has no address here ({why}). Check its spelling and this machine's DNS."
            )
            return []
        return list(dict.fromkeys(_Target(family, target) for family, *_, target in found))

    def _hint(self, target: _Target) -> str:
        host = self._address.host
        if not is_loopback(str(target.sockaddr[0])) or means_loopback(host):
            return ""
        return (
            f" Here {host} means {target.sockaddr[0]}, which is this machine itself: an entry in /etc/hosts, as Debian"
            f" and Ubuntu write it, says so. Give the server's address in the network, or correct the entry."
        )

    def _open(self, target: _Target) -> Connected:
        opened: list[Connection] = []
        try:
            certificate, token = self._open_one(target, Opening(self._streams), opened)
            for index in range(self._streams):
                self._open_one(target, Opening(self._streams, token, index), opened)
        except BaseException:
            for connection in opened:
                connection.close()
            raise
        peer = f"the global server ({self._address})"
        return Connected(certificate, peer, str(target), opened[0], opened[1:])

    def _open_one(self, target: _Target, opening: Opening, opened: list[Connection]) -> tuple[Certificate, str]:
        plain = self._connect(target)
        try:
            tune_socket(plain)
            tls = self._context.wrap_socket(
                plain, server_hostname=self._address.host or "localhost", do_handshake_on_connect=False
            )
        except OSError as error:
            plain.close()
            raise _FailedError(explain(error, self._keys)) from None
        connection = Connection(tls)
        opened.append(connection)
        check = self._limit(_OPEN, "it accepted the connection, and then said nothing")
        try:
            connection.handshake(check)
            answer = self._ask(connection, opening, check)
            certificate = peer_certificate(tls)
        except TimeoutError as error:
            raise _FailedError(
                f"{error}. Another program listens there, or something between drops the packets, or the server is"
                " stopped or overloaded."
            ) from None
        except OSError as error:
            # A connection that is closed may work again, what is wrong with certificates and programs stays.
            passes = isinstance(error, (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError))
            raise _FailedError(explain(error, self._keys), is_for_good=not passes) from None
        except (ProtocolVersionError, ValueError) as error:
            raise _FailedError(str(error), is_for_good=True) from None
        if answer.refusal:
            # The connections for models are refused when the server has forgotten the first one.
            is_for_good = answer.for_good and not opening.token
            raise _FailedError(f"The server refused: {answer.refusal}", is_for_good, is_answer=True)
        return certificate, answer.token

    def _connect(self, target: _Target) -> socket.socket:
        check = self._limit(_CONNECT, "it did not answer")
        try:
            plain = socket.socket(target.family, socket.SOCK_STREAM)
        except OSError as error:
            raise _FailedError(f"this machine cannot use such addresses ({error.strerror}).") from None
        plain.setblocking(False)
        try:
            status = plain.connect_ex(target.sockaddr)
            if status in (errno.EINPROGRESS, errno.EWOULDBLOCK):
                poll = select.poll()
                poll.register(plain, select.POLLOUT)
                while not poll.poll(_SLICE * 1000):
                    check()
                status = plain.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if status:
                raise OSError(status, os.strerror(status))
            return plain
        except OSError as error:
            plain.close()
            raise _FailedError(self._explain_connect(error)) from None
        except BaseException:
            plain.close()
            raise

    def _ask(self, connection: Connection, opening: Opening, check: Check) -> Answer:
        connection.send(encode(opening), check)
        header = connection.receive(HEADER_BYTES, check)
        return decode(connection.receive(length_of(header, f"The server {self._address}"), check), Answer)

    def _limit(self, seconds: float, what: str) -> Check:
        deadline = min(time.monotonic() + seconds, self._deadline)

        def check() -> None:
            self._interrupted()
            if time.monotonic() > deadline:
                raise TimeoutError(what)

        return check

    def _explain_connect(self, error: OSError) -> str:
        port = self._address.port
        if isinstance(error, TimeoutError) or error.errno == errno.ETIMEDOUT:
            return (
                "it did not answer. A firewall drops the packets, or no machine has this address. The server's machine"
                f" has to accept TCP connections to port {port} from here; nothing else has to be open."
            )
        if isinstance(error, ConnectionRefusedError):
            return (
                "nothing listens there. Does `lightning-halos serve` run on that machine, with this port in --listen,"
                " and at an address that others can reach (not 127.0.0.1)?"
            )
        if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EADDRNOTAVAIL):
            return f"there is no way from this machine to that address ({error.strerror}). Check network and address."
        if isinstance(error, PermissionError):
            return f"this machine's own firewall forbids it ({error.strerror})."
        return f"{error.strerror or error}."


def _sleep(seconds: float, interrupted: Callable[[], None]) -> None:
    deadline = time.monotonic() + seconds
    while (remaining := deadline - time.monotonic()) > 0:
        interrupted()
        time.sleep(min(_SLICE, remaining))
