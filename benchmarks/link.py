"""How fast does a link move a vector over TLS? Compares with bare TLS sockets, and with the rate of a limited line.

    loopback   a vector of 1 GB over loopback, through a `TLSLink` with 4 connections, against 4 bare TLS sockets
               (Python's `ssl`, blocking, one thread each, nothing but `sendall` and `recv_into`) with the same bytes;
               both between the same two processes, in turns, and each counts with its best turn
    limited    the same link between two network namespaces, whose line `tc tbf` limits to 400 Mbit/s: bits of the
               vector per second against this rate, of which IP and TCP leave 0.956 for data. Needs root; left out
               otherwise

Prints the ratios and exits with 1 if one is below its limit. Run: python benchmarks/link.py
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lightning_halos.core.messages import Pull, Push
from lightning_halos.transport.address import Address
from lightning_halos.transport.certificates import make_authority, make_region, read_keys
from lightning_halos.transport.dialer import dial
from lightning_halos.transport.link import wait_all
from lightning_halos.transport.listener import Listener
from lightning_halos.transport.session import Session
from lightning_halos.transport.tls import client_context, server_context

LIMIT = 0.8  # of bare TLS sockets
LIMIT_OF_RATE = 0.95
STREAMS = 4
TURNS = 5
SERVER = "10.213.97.1"  # in the namespaces
CLIENT = "10.213.97.2"
RATE = 400e6  # bits per second
LINE = 4 * RATE / 8  # bytes of the vector for the limited line: 4 seconds
READY = "ready"


def receive(folder: Path, host: str, elements: int) -> None:
    """The receiving process: prints its two ports, and receives until its input ends."""
    vector = torch.zeros(elements)
    keys = read_keys(folder / "server.pem")
    listener = Listener(Address(host, 0), keys, lambda certificate: None, lambda session: serve(session, vector))
    listener.start()
    bare = socket.create_server((host, 0))
    threading.Thread(target=serve_bare, args=(bare, server_context(keys), vector), daemon=True).start()
    print(READY, listener.port, bare.getsockname()[1], flush=True)
    sys.stdin.read()
    os._exit(0)


def serve(session: Session, vector: Tensor) -> None:
    """Receives vectors over a link, and says when each is complete."""
    link = session.models((vector.numel(), vector.dtype), lambda: vector)

    def on_message(push: object, progress: object) -> None:
        wait_all(progress)
        link.post(Pull(0, 0, 0, False))

    link.start(on_message, print)


def serve_bare(listening: socket.socket, context: ssl.SSLContext, vector: Tensor) -> None:
    """Does the same over bare sockets."""
    sockets = [context.wrap_socket(listening.accept()[0], server_side=True) for _ in range(STREAMS)]
    memory = slices(vector)
    with suppress(OSError):  # the sender has ended
        while True:
            together([partial(receive_all, own, part) for own, part in zip(sockets, memory, strict=True)])
            sockets[0].sendall(b"1")


def receive_all(own: ssl.SSLSocket, memory: memoryview) -> None:
    """Fills the memory, or returns early at the end of the connection."""
    while memory and (count := own.recv_into(memory)):
        memory = memory[count:]


def slices(vector: Tensor) -> list[memoryview]:
    """Returns one part of a vector's memory for each stream."""
    return [part.numpy().data.cast("B") for part in torch.tensor_split(vector, STREAMS)]


def together(jobs: Sequence[Callable[[], None]]) -> None:
    """Runs functions in threads of their own, and waits for them."""
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def through_link(folder: Path, host: str, port: int, vector: Tensor) -> Callable[[], float]:
    """Returns a function that measures the seconds for one vector."""
    link = dial(Address(host, port), folder / "bench.pem", STREAMS, 30).models((vector.numel(), vector.dtype))
    answered = threading.Semaphore(0)
    link.start(lambda message, progress: answered.release(), print)

    def measure() -> float:
        start = time.perf_counter()
        link.post(Push(0, 0, 1, 1, 1.0, vector=vector))
        answered.acquire()
        return time.perf_counter() - start

    return measure


def through_sockets(folder: Path, host: str, port: int, vector: Tensor) -> Callable[[], float]:
    """Does the same with bare sockets."""
    context = client_context(read_keys(folder / "bench.pem"))
    plain = [socket.create_connection((host, port)) for _ in range(STREAMS)]
    sockets = [context.wrap_socket(each, server_hostname=host) for each in plain]
    memory = slices(vector)

    def measure() -> float:
        start = time.perf_counter()
        together([partial(own.sendall, part) for own, part in zip(sockets, memory, strict=True)])
        sockets[0].recv(1)
        return time.perf_counter() - start

    return measure


def send(folder: Path, host: str, ports: Sequence[int], elements: int, turns: int) -> list[float]:
    """Returns the best seconds for one vector through a link and through bare sockets, in turns."""
    vector = torch.ones(elements)
    ways = [
        through(folder, host, port, vector)
        for through, port in zip((through_link, through_sockets), ports, strict=True)
    ]
    for measure in ways:
        measure()  # the memory is touched, and the connections are warm
    times = [[measure() for measure in ways] for _ in range(turns)]
    return [min(column) for column in zip(*times, strict=True)]


def compare(
    folder: Path, host: str, elements: int, turns: int, prefixes: Sequence[list[str]] = ([], [])
) -> list[float]:
    """Runs the two processes, each behind a command prefix, and returns the seconds."""
    script = [sys.executable, __file__, "--folder", str(folder), "--host", host, "--elements", str(elements)]
    receiver = subprocess.Popen(
        [*prefixes[0], *script, "--receive"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert receiver.stdout is not None
    try:
        _, *ports = receiver.stdout.readline().split()
        sender = subprocess.run(
            [*prefixes[1], *script, "--turns", str(turns), "--send", *ports],
            stdout=subprocess.PIPE, text=True, check=True, timeout=600,
        )  # fmt: skip
        return [float(seconds) for seconds in sender.stdout.split()]
    finally:
        receiver.communicate(timeout=60)


def on_limited_line(folder: Path) -> float:
    """Returns how much of its line's rate a link between two namespaces uses."""
    names = [f"halos-{os.getpid()}-{side}" for side in "ab"]
    run = partial(subprocess.run, check=True)
    try:
        for name in names:
            run(["ip", "netns", "add", name])
        run(["ip", "-n", names[0], "link", "add", "line", "type", "veth", "peer", "name", "line", "netns", names[1]])
        for name, address in zip(names, (SERVER, CLIENT), strict=True):
            run(["ip", "-n", name, "address", "add", f"{address}/24", "dev", "line"])
            run(["ip", "-n", name, "link", "set", "line", "up"])
            limit = ("tbf", "rate", f"{RATE:.0f}bit", "burst", "128kb", "latency", "50ms")
            run(["tc", "-n", name, "qdisc", "add", "dev", "line", "root", *limit])
        prefixes = [["ip", "netns", "exec", name] for name in names]
        seconds = compare(folder, SERVER, int(LINE / 4), 2, prefixes)[0]
        return 8 * LINE / seconds / RATE
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def main() -> int:
    """Runs the benchmark, or one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=250_000_000, help="of the vector on loopback (float32)")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--host", default="127.0.0.1", help=argparse.SUPPRESS)
    parser.add_argument("--receive", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--send", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.receive:
        receive(options.folder, options.host, options.elements)
    if options.send:
        print(*send(options.folder, options.host, options.send, options.elements, options.turns))
        return 0

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_authority(folder, [SERVER])
        make_region(folder, "bench")
        link, bare = compare(folder, options.host, options.elements, options.turns)
        size = 4 * options.elements
        ratio = bare / link
        print(f"loopback   {size / link / 1e9:.2f} GB/s, bare TLS sockets {size / bare / 1e9:.2f} GB/s: {ratio:.2f}")
        of_rate = LIMIT_OF_RATE
        if os.geteuid() or not shutil.which("tc"):
            print("limited    left out: network namespaces need root, and `tc`")
        else:
            of_rate = on_limited_line(folder)
            print(f"limited    {of_rate:.3f} of {RATE / 1e6:.0f} Mbit/s")
    return int(ratio < LIMIT or of_rate < LIMIT_OF_RATE)


if __name__ == "__main__":
    sys.exit(main())
