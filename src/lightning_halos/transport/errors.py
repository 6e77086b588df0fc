"""The errors of communication between processes. Every error names the peer by rank and region."""

from __future__ import annotations


class PeerLostError(RuntimeError):
    """A peer disappeared, or was silent for longer than the time limit."""


class ServerUnreachableError(PeerLostError):
    """The global server could not be reached in time. The message names each address that was tried, and why."""


class ServerRefusedError(ServerUnreachableError):
    """The global server, or what answers in its place, was reached, and trying again would not help."""


class ProtocolVersionError(RuntimeError):
    """A peer speaks another version of the protocol between processes."""


class PeerFailedError(RuntimeError):
    """A peer reported that it failed. The message has its traceback."""


class CertificateRefusedError(RuntimeError):
    """A peer's certificate is valid, but revoked. The message says by what, and the remedy."""


def is_lost_connection(error: RuntimeError) -> bool:
    """Returns whether gloo reports a lost connection, by the text of the error: gloo has no type for it."""
    return any(sign in str(error) for sign in ("gloo/transport", "timeout", "Timed out", "onnection"))
