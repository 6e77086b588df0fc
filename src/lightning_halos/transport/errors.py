"""The errors of communication between processes. Every error names the peer by rank and region."""

from __future__ import annotations


class PeerLostError(RuntimeError):
    """A peer disappeared, or was silent for longer than the time limit."""


class ServerUnreachableError(PeerLostError):
    """The global server could not be reached in time. The message names each address that was tried, and why."""


class ServerRefusedError(ServerUnreachableError):
    """The global server, or what answers in its place, was reached, and trying again would not help.

    Args:
        text: The message.
        is_answer: Whether the server itself has refused for good. Otherwise somebody may mend the reason, such as a
            wrong certificate of the server.
    """

    def __init__(self, text: str, is_answer: bool = False) -> None:
        super().__init__(text)
        self.is_answer = is_answer


class ProtocolVersionError(RuntimeError):
    """A peer speaks another version of the protocol between processes."""


class PeerFailedError(RuntimeError):
    """A peer reported that it failed. The message has its traceback."""


class CertificateRefusedError(RuntimeError):
    """A peer's certificate is valid, but revoked. The message says by what, and the remedy.

    Args:
        text: The message.
        for_good: Whether trying again does not help; not so if the server cannot find out whether it is revoked.
    """

    def __init__(self, text: str, for_good: bool = True) -> None:
        super().__init__(text)
        self.for_good = for_good


def is_lost_connection(error: RuntimeError) -> bool:
    """Returns whether gloo reports a lost connection, by the text of the error: gloo has no type for it."""
    return any(sign in str(error) for sign in ("gloo/transport", "timeout", "Timed out", "onnection"))
