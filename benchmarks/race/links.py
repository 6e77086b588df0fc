"""The network of a race: two regions of two workers each, with a slow link between them; and how fast it is.

Each region is a network namespace, so its processes reach each other through the kernel alone, and those of the other
region through a cable that ``tc tbf`` limits in each direction. Needs root.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

from tests.star.network import Place, internet

PORT = 5001
_COPY_SECONDS = 3.0

_RECEIVE = """
import socket, sys, time
with socket.create_server((sys.argv[1], int(sys.argv[2]))) as listener:
    print(flush=True)
    peer, _ = listener.accept()
    buffer, received = bytearray(1 << 20), 0
    peer.recv_into(buffer, 1)
    start = time.perf_counter()
    while count := peer.recv_into(buffer):
        received += count
    print(received * 8 / (time.perf_counter() - start))
"""
_SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as link:
    link.sendall(bytes(int(sys.argv[3])))
"""


@contextlib.contextmanager
def two_regions(mbit: float) -> Iterator[list[Place]]:
    """Two regions, with a link of a rate in Mbit/s in each direction."""
    with internet() as network:
        regions = [network.place("us", ipv6=False), network.place("eu", ipv6=False)]
        regions[1].limit(f"{mbit:g}mbit")
        yield regions


def inside(place: Place, *command: str) -> list[str]:
    """Returns the command that runs a command in a region."""
    return ["ip", "netns", "exec", place.namespace, *command]


def gigabits(source: Place, target: Place, expected: float) -> float:
    """Returns the Gbit/s of a plain copy over one TCP connection that takes about 3 seconds at an expected rate."""
    address = [target.ipv4, str(PORT)]
    size = str(int(expected * 1e9 / 8 * _COPY_SECONDS))
    with subprocess.Popen(
        inside(target, sys.executable, "-S", "-c", _RECEIVE, *address), stdout=subprocess.PIPE, text=True
    ) as receiver:
        assert receiver.stdout is not None
        receiver.stdout.readline()
        subprocess.run(inside(source, sys.executable, "-S", "-c", _SEND, *address, size), check=True, timeout=60)
        return float(receiver.communicate(timeout=60)[0]) / 1e9
