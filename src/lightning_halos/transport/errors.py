"""The errors of communication between processes. Every error names the peer by rank and region."""

from __future__ import annotations


class PeerLostError(RuntimeError):
    """A peer disappeared, or was silent for longer than the time limit."""


class PeerFailedError(RuntimeError):
    """A peer reported that it failed. The message has its traceback."""
