"""The format of frames between processes: the header that all links share, and the version of the protocol.

A frame consists of a header and the fields of a message; ``wire`` converts these. Nothing here imports torch, so that
``lightning-halos status`` starts fast.
"""

from __future__ import annotations

import struct

from lightning_halos.transport.errors import ProtocolVersionError

PROTOCOL = 6
"""Version of the protocol between processes. Raise it when a message or the format of a frame changes."""

MOST_BYTES = 2**24
"""Largest number of bytes of a message's fields."""

HEADER = struct.Struct("<qqq")
"""Length of the fields, and number of elements and format of the vector that follows them; see ``vector_parts``."""

GOODBYE, ALIVE, HELLO = -1, -2, -3
"""Instead of a length: the last frame, a sign of life, and the first frame, which has the version in the next field."""


def check_hello(peer: str, header: tuple[int, int, int]) -> None:
    """Checks the first header of a peer.

    Raises:
        ProtocolVersionError: If the peer is of another version.
    """
    hello, version, _ = header
    if (hello, version) != (HELLO, PROTOCOL):
        theirs = f"version {version}" if hello == HELLO else "an unknown version"
        raise ProtocolVersionError(
            f"{peer} uses {theirs} of the protocol between processes, and this process uses version {PROTOCOL}. Install"
            " the same version of lightning-halos everywhere."
        )
