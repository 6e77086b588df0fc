"""Whatever strangers and a malicious member send to the server: it does not end, does not grow, and the run goes on.

The server is a process as users start it. While the test attacks it, a region trains there and checks every answer.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from lightning_halos.core.messages import (
    Enrol,
    Failure,
    InitialModel,
    Join,
    LeaseRequest,
    Message,
    ModelRequest,
    Progress,
    Publish,
    RegionUpdate,
    StatusRequest,
)
from lightning_halos.transport import wire
from lightning_halos.transport.address import Address
from lightning_halos.transport.certificates import make_region, read_keys
from lightning_halos.transport.dialer import dial
from lightning_halos.transport.frames import PROTOCOL
from lightning_halos.transport.tls import client_context
from tests.integration.harness import free_port
from tests.serving.region import DESCRIPTION, ELEMENTS, Region
from tests.tls.star import LIMIT, keys

HELLO, GOODBYE, ALIVE = -3, -1, -2  # instead of a length, in a header
MEGABYTE = 2**20
STARTING = 120.0  # seconds for a process to start

MESSAGES: list[Message] = [
    StatusRequest(),
    Enrol("a session", 1),
    Join("a session", 1, replace(DESCRIPTION, max_steps=10**9, steps_per_epoch=10**9), [], 0),
    LeaseRequest(4, 1),
    Progress(1, 1, 0, 4, 0.1, 0.0, 40.0, 0, data=[(0, 4)], update=1),
    Publish([(0, 1.0)], {"val_loss": 0.5}, "{}", 1),
    RegionUpdate(1, 0, 4, number=1, reports=1),
    ModelRequest(1),
    InitialModel(),
    Failure("eu", "no reason"),
]


@dataclass
class Served:
    """The server's process, and the region that trains."""

    process: psutil.Process
    address: Address
    log: Path
    rounds: Callable[[], int]

    def usage(self) -> tuple[int, int, int]:
        """Returns the bytes, open files and threads of the process."""
        return self.process.memory_info().rss, self.process.num_fds(), self.process.num_threads()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    port = free_port()
    if not (keys() / "ap.pem").exists():
        make_region(keys(), "ap")
    words = ["serve", "--listen", f"127.0.0.1:{port}", "--keys", str(keys() / "server.pem")]
    words += ["--directory", str(tmp_path / "run"), "--workers", "1", "--snapshot-every", "8"]
    log = tmp_path / "log"
    command = [str(Path(sys.executable).with_name("lightning-halos")), *words]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    region = Region(port, keys() / "us.pem", description=replace(DESCRIPTION, max_steps=10**9, steps_per_epoch=10**9))
    region.model = torch.arange(float(ELEMENTS))
    rounds, stop, failures = [0], threading.Event(), []

    def train() -> None:
        try:
            while not stop.is_set():
                region.work()
                rounds[0] += 1
                answer = region.answer()
                assert torch.equal(answer[:16], torch.arange(16.0) + rounds[0])
                time.sleep(0.01)
        except BaseException as error:
            failures.append(error)

    training = threading.Thread(target=train)
    try:
        dial(Address("127.0.0.1", port), keys() / "us.pem", streams=0, timeout=STARTING).abort()
        region.enter()
        training.start()
        yield Served(psutil.Process(process.pid), Address("127.0.0.1", port), log, lambda: rounds[0])
        stop.set()
        training.join(LIMIT)
        assert not failures, failures
        assert region.failure is None
        region.flush(leave=True)
        final = region.final()
        assert final.vector is not None
        assert torch.equal(final.vector[:16], torch.arange(16.0) + rounds[0])
        region.goodbye()
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 143
        assert "Traceback" not in log.read_text()
    finally:
        stop.set()
        process.kill()
        process.wait()


def strangers() -> SearchStrategy[Callable[[Address], None]]:
    """What somebody without a certificate, or with one, may do before a session begins."""
    return st.one_of(
        st.builds(raw_bytes, st.binary(max_size=3000), st.booleans()),
        st.builds(
            cut_off_handshake, st.integers(0, 4000), st.none() | st.tuples(st.integers(0, 4000), st.integers(1, 255))
        ),
        st.builds(after_the_handshake, st.binary(max_size=3000) | openings()),
    )


def openings() -> SearchStrategy[bytes]:
    """Bytes with a correct header, and no message or a wrong one after it."""
    return st.builds(
        lambda version, length, data: struct.pack("!4sHH", b"HALO", version, length) + data,
        st.sampled_from([PROTOCOL, 0, 65535]),
        st.integers(0, 65535),
        st.binary(max_size=200),
    )


def raw_bytes(data: bytes, waits: bool) -> Callable[[Address], None]:
    def attack(address: Address) -> None:
        with socket.create_connection(address, LIMIT) as plain, contextlib.suppress(OSError):
            plain.sendall(data)
            if waits:
                plain.settimeout(0.05)
                plain.recv(1000)

    return attack


def cut_off_handshake(length: int, change: tuple[int, int] | None) -> Callable[[Address], None]:
    """Does a handshake with a valid certificate, of which only ``length`` bytes, or a changed one, are sent."""

    def attack(address: Address) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = client_context(read_keys(keys() / "eu.pem"))
        tls = context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        sent = 0
        with socket.create_connection(address, LIMIT) as plain, contextlib.suppress(OSError):
            plain.settimeout(0.1)
            while sent < length:
                with contextlib.suppress(ssl.SSLWantReadError):
                    tls.do_handshake()
                data = bytearray(outgoing.read()[: length - sent])
                if not data:  # it is complete
                    break
                if change is not None and sent <= change[0] < sent + len(data):
                    data[change[0] - sent] ^= change[1]
                plain.sendall(data)
                sent += len(data)
                incoming.write(plain.recv(2**16))

    return attack


def after_the_handshake(data: bytes) -> Callable[[Address], None]:
    def attack(address: Address) -> None:
        context = client_context(read_keys(keys() / "eu.pem"))
        plain = socket.create_connection(address, LIMIT)
        with contextlib.suppress(OSError), context.wrap_socket(plain, server_hostname="127.0.0.1") as tls:
            tls.sendall(data)

    return attack


def frames() -> SearchStrategy[bytes]:
    """Frames of a member: correct ones, changed ones, and headers that announce anything."""
    fields = st.sampled_from(MESSAGES).map(wire.encode)
    header = st.builds(
        lambda *numbers: struct.pack("<qqq", *numbers),
        st.sampled_from([0, 10, HELLO, GOODBYE, ALIVE, -4, 2**24, 2**24 + 1, 2**40, 2**63 - 1, -(2**63)])
        | st.integers(0, 300),
        st.sampled_from([0, ELEMENTS, ELEMENTS + 1, -1, 2**50]),
        st.sampled_from([0, 1, 7]),
    )
    return st.one_of(
        st.just(struct.pack("<qqq", ALIVE, 0, 0)),
        st.just(frame(wire.encode(StatusRequest()))),
        st.builds(frame, fields),
        st.builds(changed, fields, st.integers(0, 400), st.binary(max_size=4)).map(frame),
        header,
        st.builds(lambda head, data: head + data, header, st.binary(max_size=400)),
    )  # fmt: skip


def frame(data: bytes) -> bytes:
    return struct.pack("<qqq", len(data), 0, 0) + data


def changed(data: bytes, place: int, new: bytes) -> bytes:
    place %= len(data)
    return data[:place] + new + data[place + len(new) :]


def send_frames(address: Address, sent: list[bytes]) -> None:
    """Sends frames as the member eu, on the connection for control messages."""
    session = dial(address, keys() / "eu.pem", streams=1, timeout=LIMIT)
    connection = session.control._connections[0]
    try:
        with contextlib.suppress(OSError):
            for data in (struct.pack("<qqq", HELLO, PROTOCOL, 0), *sent):
                connection.send(data)
    finally:
        session.abort()


def attack(served: Served, connections: int, frame_count: int, growth: int) -> None:
    per_session = 20

    def many(examples: int) -> settings:
        # Without shrinking: an example that fails does not fail again in a server that has ended.
        return settings(
            max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip

    def strangers_come(examples: int) -> None:
        @many(examples)
        @given(strangers())
        def come(act: Callable[[Address], None]) -> None:
            act(served.address)

        come()

    def member_sends(examples: int) -> None:
        @many(examples)
        @given(st.lists(frames(), min_size=per_session, max_size=per_session))
        def send(sent: list[bytes]) -> None:
            send_frames(served.address, sent)

        send()

    strangers_come(20)  # so that what is made once is there
    member_sends(20)
    wait_until(lambda: served.usage()[1] <= 40)
    memory, files, threads = served.usage()
    rounds = served.rounds()

    with contextlib.ExitStack() as stack:
        for index in range(60):  # they send a byte now and then, each from one of several addresses
            slow = stack.enter_context(socket.socket())
            slow.bind((f"127.0.0.{2 + index % 6}", 0))
            slow.connect(served.address)
            slow.sendall(b"\x16\x03\x01\x02\x00\x01"[: 1 + index % 6])
        strangers_come(connections)
        member_sends(frame_count // per_session)
        another = dial(served.address, keys() / "ap.pem", streams=4, timeout=LIMIT)
        another.abort()

    wait_until(lambda: served.usage()[1] <= files + 1 and served.usage()[2] <= threads + 2)
    now = served.usage()
    assert now[0] - memory < growth * MEGABYTE, f"{(now[0] - memory) / MEGABYTE:.1f} MB more"
    wait_until(lambda: served.rounds() > rounds)  # it never waits for an answer for longer than its own limit


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_few_attacks(served: Served) -> None:
    attack(served, connections=50, frame_count=500, growth=16)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_attacks(served: Served) -> None:
    attack(served, connections=1000, frame_count=100_000, growth=32)


@settings(max_examples=2000, deadline=None)
@given(
    st.sampled_from(MESSAGES).map(wire.encode),
    st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=4)), max_size=5),
)
def test_changed_messages_are_messages_or_refused(data: bytes, changes: list[tuple[int, bytes]]) -> None:
    for place, new in changes:
        data = changed(data, place, new)
    with contextlib.suppress(ValueError):
        assert isinstance(wire.decode(data, None), Message)
