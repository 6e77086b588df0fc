"""A peer of the star, connected and authenticated.

The first connection carries control messages, so that these do not wait behind models; the others carry models. How
connections are made is in ``listener`` and ``dialer``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from lightning_halos.transport.certificates import Certificate
from lightning_halos.transport.connection import Connection
from lightning_halos.transport.link import Form, Memory
from lightning_halos.transport.tls_link import TLSLink


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

    def models(self, form: Form, memory: Memory | None = None) -> TLSLink:
        """Returns a new link for models. It can be made once.

        Args:
            form: The vectors.
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
