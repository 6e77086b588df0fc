"""The first messages on each connection of the star, by which its two ends find out what it is for.

How connections are made is in ``listener`` and ``dialer``.
"""

from __future__ import annotations

import struct
from typing import TypeVar

import msgspec

from lightning_halos.transport.errors import ProtocolVersionError
from lightning_halos.transport.frames import PROTOCOL

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
    return _HEADER.pack(_MAGIC, PROTOCOL, len(data)) + data


def length_of(header: bytes, peer: str) -> int:
    """Returns the number of bytes after a header.

    Raises:
        ProtocolVersionError: If the peer is of another version, or another program.
    """
    magic, version, length = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise ProtocolVersionError(f"{peer} does not speak the protocol of lightning-halos.")
    if version != PROTOCOL:
        raise ProtocolVersionError(
            f"{peer} uses version {version} of the protocol between processes, and this process uses version"
            f" {PROTOCOL}. Install the same version of lightning-halos everywhere."
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
