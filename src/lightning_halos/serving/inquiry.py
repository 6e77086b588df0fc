"""Asks a global server for the state of its run, without joining the run.

It speaks the protocol of ``TLSLink`` by itself, without threads and torch, so that the command line starts fast.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec

from lightning_halos.transport import frames
from lightning_halos.transport.address import parse_address
from lightning_halos.transport.connection import Check, Connection
from lightning_halos.transport.dialer import connect
from lightning_halos.transport.errors import ServerRefusedError, ServerUnreachableError

_LEAST = 1.0  # seconds for the answer


def ask_status(server: str, keys: str | Path, timeout: float) -> str:
    """Returns the state of a run as JSON; see ``Reporter.describe``.

    Args:
        server: The global server's address, such as ``halos.example.org:29600``.
        keys: The file of a region's keys.
        timeout: Limit in seconds for the connection and the answer together.

    Raises:
        ServerUnreachableError: If the server cannot be reached, or does not answer.
        ProtocolVersionError: If the server is of another version.
        ValueError: If the address or the keys cannot be used.
        OSError: If the keys cannot be read.
    """
    deadline = time.monotonic() + timeout
    connected = connect(parse_address(server), keys, streams=0, timeout=timeout)
    deadline = max(deadline, time.monotonic() + _LEAST)

    def check() -> None:
        if time.monotonic() > deadline:
            raise ServerUnreachableError(f"{connected.peer} did not answer within timeout={timeout:g} s.")

    try:
        answer = _ask(connected.control, connected.peer, check)
    except OSError as error:
        raise ServerUnreachableError(f"{connected.peer} did not answer: {error}") from None
    finally:
        connected.control.close()
    match answer:
        case {"type": "StatusReply", "text": str(text)}:
            return text
        case {"type": "Refusal", "reason": str(reason)}:
            raise ServerRefusedError(f"{connected.peer} refused: {reason}")
        case _:
            raise ServerUnreachableError(f"{connected.peer} did not answer: {str(answer)[:200]}")


def _ask(connection: Connection, peer: str, check: Check) -> Any:
    """Sends the question, and returns the fields of the message that comes back."""
    request = msgspec.msgpack.encode({"type": "StatusRequest"})
    hello, header = frames.HEADER.pack(frames.HELLO, frames.PROTOCOL, 0), frames.HEADER.pack(len(request), 0, 0)
    connection.send(hello + header + request, check)
    frames.check_hello(peer, _header(connection, check))
    while (length := _header(connection, check)[0]) == frames.ALIVE:
        pass
    if not 0 <= length <= frames.MOST_BYTES:
        raise ServerUnreachableError(f"{peer} did not answer: it announces {length} bytes.")
    data = connection.receive(length, check)
    connection.send(frames.HEADER.pack(frames.GOODBYE, 0, 0), check)
    try:
        return msgspec.msgpack.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ServerUnreachableError(f"{peer} did not answer: {error}") from None


def _header(connection: Connection, check: Check) -> tuple[int, int, int]:
    length, elements, dtype = frames.HEADER.unpack(connection.receive(frames.HEADER.size, check))
    return length, elements, dtype
