"""Asks a global server for the state of its run, without joining the run."""

from __future__ import annotations

import queue
import time
from pathlib import Path

from lightning_halos.core.messages import Message, Refusal, StatusReply, StatusRequest
from lightning_halos.transport.address import parse_address
from lightning_halos.transport.dialer import dial
from lightning_halos.transport.errors import ServerRefusedError, ServerUnreachableError

_GOODBYE = 1.0  # seconds


def ask_status(server: str, keys: str | Path, timeout: float) -> str:
    """Returns the state of a run as JSON; see ``Reporter.describe``.

    Args:
        server: The global server's address, such as ``halos.example.org:29600``.
        keys: The file of a region's keys.
        timeout: Limit in seconds for the connection and the answer together.

    Raises:
        ServerUnreachableError: If the server cannot be reached, or does not answer.
        ValueError: If the address or the keys cannot be used.
        OSError: If the keys cannot be read.
    """
    deadline = time.monotonic() + timeout
    session = dial(parse_address(server), keys, streams=0, timeout=timeout)
    answers: queue.SimpleQueue[Message | Exception] = queue.SimpleQueue()
    try:
        session.control.start(lambda message, _: answers.put(message), answers.put)
        session.control.post(StatusRequest())
        try:
            answer = answers.get(timeout=max(1.0, deadline - time.monotonic()))
        except queue.Empty:
            raise ServerUnreachableError(f"{session.peer} did not answer within timeout={timeout:g} s.") from None
    finally:
        session.close(_GOODBYE)
    match answer:
        case StatusReply():
            return answer.text
        case Refusal():
            raise ServerRefusedError(f"{session.peer} refused: {answer.reason}")
        case _:
            raise ServerUnreachableError(f"{session.peer} did not answer: {answer}")
