"""A server and regions of a star, connected over TLS on loopback, with keys that are made once."""

from __future__ import annotations

import functools
import queue
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lightning_halos.transport.address import Address
from lightning_halos.transport.certificates import Certificate, make_authority, make_region, read_keys
from lightning_halos.transport.dialer import dial
from lightning_halos.transport.listener import Listener
from lightning_halos.transport.session import Session

LIMIT = 30.0  # seconds for anything that has to happen


@functools.cache
def keys() -> Path:
    """A folder with the keys of a server and two regions."""
    folder = Path(tempfile.mkdtemp(prefix="halos-keys-"))
    make_authority(folder, ["localhost"])
    make_region(folder, "us")
    make_region(folder, "eu")
    return folder


def welcome(certificate: Certificate) -> None: ...


@dataclass
class Server:
    """A listener, and the peers that it has authenticated."""

    listener: Listener
    sessions: queue.Queue[Session] = field(default_factory=queue.Queue)

    @property
    def address(self) -> Address:
        return Address("127.0.0.1", self.listener.port)

    def meet(self, name: str = "us", streams: int = 4) -> tuple[Session, Session]:
        """Dials. Returns the sessions of the region and of the server."""
        own = dial(self.address, keys() / f"{name}.pem", streams, LIMIT)
        return own, self.sessions.get(timeout=LIMIT)


@contextmanager
def server(admit: Callable[[Certificate], None] = welcome, host: str = "127.0.0.1", port: int = 0) -> Iterator[Server]:
    """A server that listens at a free port."""
    made = Server(
        Listener(
            Address(host, port), read_keys(keys() / "server.pem"), admit, lambda session: made.sessions.put(session)
        )
    )
    made.listener.start()
    yield made
    made.listener.close()
