"""Forked processes, such as DataLoader workers, close their copies of their parent's sockets.

Otherwise the death of the parent would not close its connections.
"""

from __future__ import annotations

import gc
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager

_sockets: set[tuple[int, int]] = set()  # descriptor and inode of each socket of a group or store
_store_ports: set[int] = set()  # ports on which a store of this process accepts connections


def note_store_port(port: int) -> None:
    """Records that a store of this process accepts connections at a port, so that forked processes close them."""
    _store_ports.add(port)


def is_store_port(port: int | None) -> bool:
    """Returns whether a port was recorded by :func:`note_store_port`."""
    return port in _store_ports


@contextmanager
def noting_sockets() -> Iterator[None]:
    """Records the sockets that are opened in a ``with`` block, so that forked processes close them."""
    before = _open_sockets().keys()
    yield
    _sockets.update(_open_sockets().keys() - before)


def _open_sockets() -> dict[tuple[int, int], int]:
    """Returns the local port of each TCP socket of this process, by its descriptor and inode."""
    ports = {}
    for descriptor in map(int, os.listdir("/dev/fd")):
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISSOCK(status.st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as copy:
                if copy.family in (socket.AF_INET, socket.AF_INET6):
                    ports[descriptor, status.st_ino] = copy.getsockname()[1]
        except OSError:  # it was closed meanwhile
            pass
    return ports


def _give_up_sockets() -> None:
    """Closes this process's copies of its parent's sockets, and keeps its groups as they are.

    It runs in every forked process, before any other code.
    """
    if not _sockets:
        return
    gc.freeze()  # a group that is garbage, as of an earlier fit, would wait here for threads that only the parent has
    nothing = os.open(os.devnull, os.O_RDWR)
    for identity, port in _open_sockets().items():
        if identity in _sockets or port in _store_ports:
            os.dup2(nothing, identity[0], False)  # keeps the number in use, because torch's objects may close it later
    os.close(nothing)
    _sockets.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_give_up_sockets)
