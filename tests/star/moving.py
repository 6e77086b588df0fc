"""A region whose name server is a file, so that a test can let the server's name point elsewhere."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from tests.star.roles import region

HOST = "halos.test"
FILE = "address"
"""Name of the file with the address of ``HOST``, in the folder of the evidence."""


def moving_region(folder: str, name: str) -> None:
    """Like :func:`tests.star.roles.region`."""
    look_up, path = socket.getaddrinfo, Path(folder, FILE)

    def answer(host: Any, *arguments: Any, **options: Any) -> Any:
        return look_up(path.read_text() if host == HOST else host, *arguments, **options)

    socket.getaddrinfo = answer
    region(folder, name)
