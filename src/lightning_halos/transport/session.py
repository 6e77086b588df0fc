"""A peer of the star, connected and authenticated, and the messages that open its connections.

The first connection carries control messages, so that these do not wait behind models; the others carry models. How
connections are made is in ``listener`` and ``dialer``.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from typing import TypeVar

import msgspec
import torch

from lightning_halos.transport import wire
from lightning_halos.transport.certificates import Certificate
from lightning_halos.transport.connection import Connection
from lightning_halos.transport.errors import ProtocolVersionError
from lightning_halos.transport.link import Memory
from lightning_halos.transport.tls_link import TLSLink

MOST_STREAMS = 64
"""Largest number of connections for models."""

# A magic text, the version of the protocol, and the length of what follows. All versions keep this header, so that each
# can say which one the other has.
_HEADER = struct.Struct("!4sHH")
_MAGIC = b"HALO"
HEADER_BYTES = _HEADER.size

T = TypeVar("T", bound=msgspec.Struct)


class Opening(msgspec.Struct, forbid_unknown_fields=True):
    """What a client says first on each connection."""

    streams: int  # connections for models that follow the first one
    token: str = ""  # empty on the first connection; on the others, what the server answered to the first
    stream: int = 0  # index of this connection among those for models


class Answer(msgspec.Struct, forbid_unknown_fields=True):
    """The server's answer on each connection."""

    token: str = ""
    refusal: str = ""  # why the connection is refused; empty if it is not
    for_good: bool = True  # whether trying again does not help


def encode(message: Opening | Answer) -> bytes:
    """Returns the bytes of a message, with their header."""
    data = msgspec.msgpack.encode(message)
    return _HEADER.pack(_MAGIC, wire.PROTOCOL, len(data)) + data


def length_of(header: bytes, peer: str) -> int:
    """Returns the number of bytes after a header.

    Raises:
        ProtocolVersionError: If the peer is of another version, or another program.
    """
    magic, version, length = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise ProtocolVersionError(f"{peer} does not speak the protocol of lightning-halos.")
    if version != wire.PROTOCOL:
        raise ProtocolVersionError(
            f"{peer} uses version {version} of the protocol between processes, and this process uses version"
            f" {wire.PROTOCOL}. Install the same version of lightning-halos everywhere."
        )
    return int(length)


def decode(data: bytes, kind: type[T]) -> T:
    """Returns a message from the bytes after its header.

    Raises:
        ValueError: If they are not such a message.
    """
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"Not an opening of a connection: {error}") from None


class Session:
    """A connected peer.

    Args:
        certificate: The peer's certificate.
        peer: Name of the peer, for error messages.
        address: The peer's address, as text.
        control: The connection for control messages.
        streams: The connections for models.

    Attributes:
        certificate: The peer's certificate.
        name: The name in the certificate: the peer is who it says.
        peer: Name of the peer, for error messages.
        address: The peer's address, as text.
        control: The link for messages that must not wait behind models. It carries no vectors.
    """

    def __init__(
        self, certificate: Certificate, peer: str, address: str, control: Connection, streams: Sequence[Connection]
    ) -> None:
        self.certificate = certificate
        self.name = certificate.name
        self.peer = peer
        self.address = address
        self.control = TLSLink([control], peer)
        self._streams = streams
        self._links = [self.control]

    @property
    def has_models(self) -> bool:
        """Whether there are connections for models."""
        return bool(self._streams)

    def models(self, form: tuple[int, torch.dtype], memory: Memory | None = None) -> TLSLink:
        """Returns a new link for models. It can be made once.

        Args:
            form: Number of elements and dtype of the vectors.
            memory: Returns the memory to receive a vector into. Default: new memory for each vector.
        """
        streams, self._streams = self._streams, []
        link = TLSLink(streams, self.peer, form, memory)
        self._links.append(link)
        return link

    def close(self, timeout: float) -> None:
        """Says goodbye on all links, waits at most ``timeout`` seconds for the peer's, and closes the connections."""
        for link in self._links:
            link.close()
        deadline = time.monotonic() + timeout
        for link in self._links:
            link.join(max(0.0, deadline - time.monotonic()))
        self.abort()

    def abort(self) -> None:
        """Closes all connections at once."""
        for link in self._links:
            link.abort()
        for connection in self._streams:
            connection.close()
