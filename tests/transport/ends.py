"""Two ends of a connection between processes, over gloo and TLS, both in this process, for tests of links."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ClassVar

import torch
from torch.distributed import ProcessGroup, TCPStore

from lightning_halos.core.compat import gloo_group
from lightning_halos.core.messages import Message
from lightning_halos.core.vector import PART
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.link import GlooLink, Link, wait_all
from lightning_halos.transport.tls_link import TLSLink
from tests.tls import star

TIMEOUT = 4.0  # seconds of silence
ELEMENTS = 3 * PART + 5
FORM = (ELEMENTS, torch.float32)


def ignore(*_: object) -> None: ...


@contextmanager
def groups(size: int = 2) -> Iterator[list[ProcessGroup]]:
    """The process groups of ``size`` processes, all of them in this one."""
    master = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    made: dict[int, ProcessGroup] = {}

    def make(rank: int) -> None:
        made[rank] = gloo_group(TCPStore("127.0.0.1", master.port), rank, size, timedelta(seconds=60), "127.0.0.1")

    threads = [threading.Thread(target=make, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    yield [made[rank] for rank in range(size)]


class End:
    """One end of a link, which keeps what it receives, and how it fails."""

    all: ClassVar[list[End]] = []

    def __init__(self, link: Any, timeout: float = TIMEOUT) -> None:
        self.link = link
        self.alarm = Alarm(f"the peer of {link.peer}")
        self.alarm.add(link)
        self.timeout = timeout
        self.received: list[Message] = []
        self.failure: Exception | None = None
        self.failed = threading.Event()
        self.handle: Callable[[Message], None] = ignore
        End.all.append(self)

    def start(self) -> End:
        self.link.start(self._on_message, self._on_failure)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def wait_for(self, count: int) -> list[Message]:
        deadline = time.monotonic() + 60
        while len(self.received) < count:
            assert self.failure is None, self.failure
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return self.received

    def _watch(self) -> None:
        self.alarm.watch(self.timeout)
        while not self.failed.is_set():
            time.sleep(0.05)
            try:
                self.alarm.check(wait=True)
            except Exception as error:
                self._on_failure(error)

    def _on_message(self, message: Message, progress: Iterable[int]) -> None:
        wait_all(progress)
        self.handle(message)
        self.received.append(message)

    def _on_failure(self, error: Exception) -> None:
        self.failure = self.failure or error
        self.failed.set()


class GlooWire:
    """Two processes' ends of a connection over gloo, both in this process."""

    def __init__(self, groups: list[ProcessGroup]) -> None:
        self._groups = groups

    def link(self, end: int, peer: str, timeout: float = TIMEOUT, form: Any = FORM, memory: Any = None) -> Link:
        return GlooLink(self._groups[end], 1 - end, peer, timeout, form, memory)

    def send_header(self, end: int, *header: int) -> None:
        frame = struct.pack("<qqq", *header).ljust(1024, b"\0")
        self._groups[end].send([torch.frombuffer(bytearray(frame), dtype=torch.uint8)], 1 - end, 0).wait()

    def close(self) -> None:
        self._groups.clear()


class TLSWire:
    """The same over TLS."""

    def __init__(self, streams: int) -> None:
        with star.server() as server:
            self._sessions = server.meet(streams=streams)
        self._connections = [session._streams for session in self._sessions]

    def link(self, end: int, peer: str, timeout: float = TIMEOUT, form: Any = FORM, memory: Any = None) -> Link:
        return TLSLink(self._connections[end], peer, form, memory)

    def send_header(self, end: int, *header: int) -> None:
        self._connections[end][0].send(struct.pack("<qqq", *header))

    def close(self) -> None:
        for session in self._sessions:
            session.abort()


Wire = GlooWire | TLSWire
