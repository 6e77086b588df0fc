"""A connected peer of the server: its links, the memory for its vectors, and what waits to be sent to it.

What its messages mean is decided in ``host``.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_halos.core.messages import Message
from lightning_halos.core.protocol import ProtocolError, Send
from lightning_halos.transport.link import Link
from lightning_halos.transport.session import Session
from lightning_halos.transport.vector_parts import VectorForm

_PAUSE = 0.01  # seconds between two looks
MOST_SESSIONS = 16
"""Largest number of connections of one name. One is the member's, the others ask for the status."""

_MOST_REFUSED = 16  # further connections of one name, which are told that there are too many


@dataclass(eq=False)
class Client:
    """A peer with a valid certificate: a member, or somebody who asks for the status.

    There is memory for one of its vectors at a time. While the answer in it has not been sent, the next vector waits at
    the peer, so that a member costs the server one vector, whatever it sends.
    """

    session: Session
    since: float  # by `time.time`
    index: int | None = None  # of its member, when it has said which process it is
    process: str = ""  # the identity of its process
    missing_since: float | None = None  # by `time.monotonic`: its member's loss of connection, until it is welcomed
    models: Link | None = None
    said: set[type[Message]] = field(default_factory=set)  # which it may send once on a connection
    is_refused: bool = False  # nothing of what it says counts
    is_done: bool = False  # it has been sent the final model
    is_closing: bool = False  # goodbye has been said to it
    is_gone: bool = False
    unsent: int = 0  # messages that wait to be sent
    copies: int = 0  # models among them that are not in the memory for its vectors
    # Messages that wait for a snapshot, and those after them, with the number of the snapshot; 0 for no matter which.
    held: deque[tuple[int, Send]] = field(default_factory=deque)
    form: VectorForm | None = None
    _vector: Tensor | None = None
    _free: queue.SimpleQueue[None] = field(default_factory=queue.SimpleQueue)

    def __str__(self) -> str:
        return f"{self.session.name} ({self.session.address})"

    @property
    def links(self) -> list[Link]:
        return [self.session.control] if self.models is None else [self.session.control, self.models]

    def silence(self, now: float) -> float:
        """Returns the seconds for which nothing came, by ``time.monotonic``.

        The link for models may wait for memory and hear nothing meanwhile, so that its own silence says little.
        """
        silence = self.session.control.silence(now)
        heard = None if self.models is None else self.models.heard
        return silence if heard is None else min(silence, now - heard)

    def traffic(self) -> tuple[int, int]:
        """Returns the bytes that were sent and received."""
        return sum(link.bytes_sent for link in self.links), sum(link.bytes_received for link in self.links)

    @property
    def _models_sent(self) -> int:
        return 0 if self.models is None else self.models.bytes_sent

    def memory(self) -> Tensor:
        """Waits until the memory for a vector is free, and returns it."""
        self._free.get()
        assert self.form is not None
        if self._vector is None:
            self._vector = torch.empty(self.form.elements, dtype=self.form.dtype)
        return self._vector

    def release(self) -> None:
        """Frees the memory."""
        self._free.put(None)

    def wait_for_room(self, timeout: float) -> None:
        """Waits until no copy of a model waits to be sent, for as long as it is being sent.

        Raises:
            ProtocolError: If the peer takes nothing of it for ``timeout`` seconds.
        """
        sent, since = self._models_sent, time.monotonic()
        while self.copies and not self.is_gone:
            if self._models_sent != sent:
                sent, since = self._models_sent, time.monotonic()
            elif time.monotonic() - since > timeout:
                raise ProtocolError(f"it asks for models, and has taken nothing of the last one for {timeout:g} s")
            time.sleep(_PAUSE)

    def begins_to_send(self, vector: Tensor | None) -> None:
        """Records that a message waits to be sent."""
        self.unsent += 1
        self.copies += vector is not None and vector is not self._vector

    def has_sent(self, vector: Tensor | None) -> None:
        """Records that a message was sent, and frees its memory."""
        self.unsent -= 1
        if vector is None:
            return
        if vector is self._vector:
            self.release()
        else:
            self.copies -= 1

    def give_away(self) -> None:
        """Leaves the vector that has arrived to the node. The next one gets new memory."""
        self._vector = None
        self._free.put(None)


class Clients:
    """The clients that are connected. Its methods never wait for the run's node, which may be busy for long."""

    def __init__(self) -> None:
        self._clients: list[Client] = []
        self._lock = threading.Lock()

    def add(self, client: Client) -> bool:
        """Adds a client, unless far too many have its name. If too many have it, the client is to be refused.

        Returns:
            Whether it was added.
        """
        with self._lock:
            others = sum(other.session.name == client.session.name for other in self._clients)
            client.is_refused = others >= MOST_SESSIONS
            is_added = others < MOST_SESSIONS + _MOST_REFUSED
            if is_added:
                self._clients.append(client)
        return is_added

    def remove(self, client: Client) -> None:
        """Removes a client."""
        with self._lock:
            self._clients.remove(client)

    def __iter__(self) -> Iterator[Client]:
        """Iterates over those that are connected now."""
        with self._lock:
            return iter(list(self._clients))
