"""Regions connect to the server over TLS: who gets in, who does not, and what both are told."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_halos.core.messages import Failure, LeaseRequest, Message, Push, Refusal, StatusReply
from lightning_halos.core.vector import PART
from lightning_halos.transport import dialer, frames, listener
from lightning_halos.transport.address import Address
from lightning_halos.transport.certificates import Certificate, make_authority, make_region, read_keys
from lightning_halos.transport.dialer import dial
from lightning_halos.transport.errors import (
    CertificateRefusedError,
    PeerFailedError,
    PeerLostError,
    ProtocolVersionError,
    ServerRefusedError,
    ServerUnreachableError,
)
from lightning_halos.transport.link import wait_all
from lightning_halos.transport.opening import HEADER_BYTES, Answer, Opening, decode, encode, length_of
from lightning_halos.transport.server_connection import ServerConnection
from lightning_halos.transport.session import Session
from lightning_halos.transport.tls import client_context
from lightning_halos.transport.tls_link import TLSLink
from tests.tls.star import LIMIT, Server, keys, server

FORM = (2 * PART + 3, torch.float32)


class Ear:
    """What a link brings."""

    def __init__(self, link: TLSLink, handle: Callable[[Message], object] = lambda message: None) -> None:
        self.link = link
        self.messages: list[Message] = []
        self.failures: list[Exception] = []
        self._handle = handle
        link.start(self._on_message, self.failures.append)

    def _on_message(self, message: Message, progress: Iterable[int]) -> None:
        wait_all(progress)
        self._handle(message)
        self.messages.append(message)

    def wait_for(self, count: int) -> list[Message]:
        wait_until(lambda: len(self.messages) >= count or self.failures)
        assert not self.failures, self.failures
        return self.messages

    def failure(self) -> Exception:
        wait_until(lambda: self.failures)
        return self.failures[0]


def wait_until(condition: Callable[[], object], limit: float = LIMIT) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def running() -> Iterator[Server]:
    with server() as made:
        yield made


@pytest.fixture(autouse=True)
def _limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialer, "_CONNECT", 1.0)
    monkeypatch.setattr(listener, "_LIMIT", LIMIT)  # a busy machine may take more than its 5 seconds


def still_works(running: Server) -> bool:
    """Whether the server serves a region from first to last."""
    own, its = running.meet(streams=1)
    ear = Ear(its.control)
    Ear(own.control)
    own.control.post(LeaseRequest(7))
    is_there = ear.wait_for(1) == [LeaseRequest(7)]
    own.abort()
    its.abort()
    return is_there


class TestSessions:
    def test_both_ends_know_each_other_and_exchange_messages(self, running: Server) -> None:
        own, its = running.meet("eu", streams=3)
        assert (own.name, its.name) == ("global server", "eu")
        assert own.address == str(running.address)
        assert its.address.startswith("127.0.0.1:")
        ears = [Ear(link) for link in (own.models(FORM), its.models(FORM), own.control, its.control)]
        vector = torch.arange(FORM[0], dtype=FORM[1])
        for number, ear in enumerate(ears, start=1):
            has_vector = number < 3
            message = Push(0, 0, 1, 1, 1.0, vector=vector, number=1) if has_vector else LeaseRequest(number)
            ear.link.post(message)
        for ear in ears[:2]:
            (push,) = ear.wait_for(1)
            assert torch.equal(push.vector, vector)
        assert ears[2].wait_for(1) == [LeaseRequest(4)]
        assert ears[3].wait_for(1) == [LeaseRequest(3)]
        closing = threading.Thread(target=its.close, args=(LIMIT,))
        closing.start()
        own.close(LIMIT)
        closing.join()
        assert not any(ear.failures for ear in ears)
        assert not any(connection.tls.fileno() >= 0 for ear in ears for connection in ear.link._connections)

    @pytest.mark.slow
    def test_vectors_of_more_than_2_to_the_31_bytes(self, running: Server) -> None:
        elements = 2**29 + 5
        vector = torch.zeros(elements)
        places = torch.tensor([0, PART - 1, PART, 2**29 - 1, 2**29, elements - 1])
        vector[places] = torch.arange(1.0, 7.0)
        own, its = running.meet(streams=3)
        received = torch.full((elements,), -1.0)
        link = own.models((elements, torch.float32))
        ear = Ear(its.models((elements, torch.float32), lambda: received))
        Ear(link).link.post(Push(0, 0, 1, 1, 1.0, vector=vector))
        wait_until(lambda: ear.messages or ear.failures, limit=240)
        assert not ear.failures
        assert torch.equal(received, vector)
        assert link.bytes_sent > 2**31
        own.abort()
        its.abort()

    def test_without_connections_for_models(self, running: Server) -> None:
        own, its = running.meet(streams=0)
        assert not own.has_models
        ear = Ear(its.control)
        Ear(own.control).link.post(LeaseRequest(1))
        assert ear.wait_for(1)
        own.abort()
        its.abort()

    def test_the_kernel_keeps_each_connection_alive_so_that_no_nat_forgets_one(self, running: Server) -> None:
        """Signs of life travel on the first connection of a link only."""
        for session in running.meet(streams=4):
            connections = [*session.control._connections, *session._streams]
            assert len(connections) == 5
            for opened in (connection.tls for connection in connections):
                assert opened.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 60
                assert opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) <= 60
            session.abort()

    def test_a_process_that_is_killed_is_lost_at_once(self, running: Server) -> None:
        """Although a process that it forked, such as a DataLoader worker, lives on for a while."""
        with region_process(running, "if os.fork() == 0: time.sleep(60); os._exit(0)") as (process, its):
            ears = [Ear(its.control), Ear(its.models(FORM))]
            time.sleep(0.5)
            process.send_signal(signal.SIGKILL)
            for ear in ears:
                assert isinstance(ear.failure(), PeerLostError)
                assert "us (127.0.0.1:" in str(ear.failure())
                assert "disappeared" in str(ear.failure())
            time.sleep(0.2)
            assert [len(ear.failures) for ear in ears] == [1, 1]

    def test_a_message_that_is_announced_takes_no_memory_until_it_arrives(self, running: Server) -> None:
        own, its = running.meet(streams=0)
        ear = Ear(its.control)
        connection = own.control._connections[0]
        connection.send(struct.pack("<qqq", -3, frames.PROTOCOL, 0))
        tracemalloc.start()
        try:
            connection.send(struct.pack("<qqq", frames.MOST_BYTES, 0, 0) + bytes(100_000))
            wait_until(lambda: its.control.bytes_received > 100_000)
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()
        assert not ear.failures
        own.abort()
        its.abort()

    def test_a_lost_connection_of_several_ends_the_link(self, running: Server) -> None:
        own, its = running.meet(streams=3)
        ears = [Ear(own.models(FORM)), Ear(its.models(FORM))]
        sending = threading.Event()

        def fill(advance: Callable[[int], None]) -> None:
            advance(1)
            sending.set()
            its_connections[2].close()
            time.sleep(0.5)

        its_connections = ears[1].link._connections
        ears[0].link.post(Push(0, 0, 1, 1, 1.0, vector=torch.zeros(FORM[0])), fill)
        assert sending.is_set()
        for ear in ears:
            assert isinstance(ear.failure(), PeerLostError)
            assert not ear.messages
        own.abort()
        its.abort()

    def test_aborting_is_no_failure_and_later_messages_are_dropped(self, running: Server) -> None:
        own, its = running.meet(streams=1)
        ear, models = Ear(its.control), Ear(its.models(FORM))
        its.abort()
        for each in (ear, models):
            each.link.join(LIMIT)
            assert not any(thread.is_alive() for thread in each.link._threads)
        filled: list[object] = []
        models.link.post(Push(0, 0, 1, 1, 1.0, vector=torch.zeros(FORM[0])), filled.append)
        assert len(filled) == 1  # who fills the vector also changes its own state
        assert not ear.failures
        assert not models.failures
        own.abort()

    def test_a_peer_learns_why_its_message_was_refused(self, running: Server) -> None:
        """Although much that it has sent is unread."""

        def refuse(message: Message) -> None:
            raise ValueError("no such data")

        own, its = running.meet(streams=1)
        region, host = Ear(own.control), Ear(its.control, refuse)
        for _ in range(2000):
            own.control.post(Failure("us", "x" * 1000))
        assert isinstance(host.failure(), ValueError)
        its.control.post(Failure("global server", "no such data"))
        closing = threading.Thread(target=its.close, args=(5.0,))
        closing.start()
        assert region.wait_for(1) == [Failure("global server", "no such data")]
        own.close(LIMIT)
        closing.join()
        assert len(host.failures) == 1


@contextlib.contextmanager
def region_process(running: Server, also: str) -> Iterator[tuple[subprocess.Popen[str], Session]]:
    """A process that connects, and the server's end."""
    script = (
        "import os, sys, time; from lightning_halos.transport.address import Address;"
        " from lightning_halos.transport.dialer import dial\n"
        f"session = dial(Address('127.0.0.1', {running.address.port}), {str(keys() / 'us.pem')!r}, 2, {LIMIT})\n"
        f"{also}\n"
        "session.control.start(print, print)\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], text=True, start_new_session=True)
    try:
        its = running.sessions.get(timeout=60)
        yield process, its
        its.abort()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class TestWhoIsRefused:
    @pytest.fixture
    def log(self, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
        caplog.set_level(logging.DEBUG, logger=listener.__name__)
        return caplog

    def refused(self, running: Server, file: Path, host: str = "127.0.0.1") -> str:
        """Returns the error of a region with other keys, after another region was served."""
        start = time.monotonic()
        with pytest.raises(ServerRefusedError) as caught:
            dial(Address(host, running.address.port), file, 1, LIMIT)
        assert time.monotonic() - start < LIMIT  # it is not tried again
        assert still_works(running)
        text = str(caught.value)
        assert f"{host}:{running.address.port} from 127.0.0.1 (lo)" in text
        return text

    def test_another_authority(self, running: Server, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
        make_authority(tmp_path, ["localhost"])
        text = self.refused(running, make_region(tmp_path, "us"))
        assert "is not from the authority in" in text
        assert "A connection from 127.0.0.1:" in log.text

    def test_the_servers_certificate_is_for_another_host(self, running: Server) -> None:
        with server(host="127.0.0.2") as other, pytest.raises(ServerRefusedError, match="is for other hosts"):
            dial(Address("127.0.0.2", other.address.port), keys() / "us.pem", 1, LIMIT)

    @pytest.mark.parametrize(("begins", "text"), [(-9, "expired"), (3, "not valid yet")], ids=["expired", "not yet"])
    def test_certificates_of_another_time(
        self, running: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begins: int, text: str
    ) -> None:
        """The region's own clock is wrong, too, so that it does not notice."""
        for file in keys().iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        file = make_region(tmp_path, "late", days=2, start=datetime.now(timezone.utc) + timedelta(days=begins))
        monkeypatch.setattr("lightning_halos.transport.tls._check_usable", lambda *_: None)
        assert text in self.refused(running, file)

    def test_who_is_not_admitted_reads_why(self, log: pytest.LogCaptureFixture) -> None:
        def admit(certificate: Certificate) -> None:
            if certificate.name == "eu":
                raise CertificateRefusedError("The certificate of eu is revoked.")

        with server(admit) as running:
            assert "The server refused: The certificate of eu is revoked." in self.refused(running, keys() / "eu.pem")
            assert "A connection of eu at 127.0.0.1:" in log.text

    def test_plain_tcp(self, running: Server, log: pytest.LogCaptureFixture) -> None:
        with socket.create_connection(running.address, 10) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            while plain.recv(1000):
                pass
        assert still_works(running)
        assert "does not speak TLS" in log.text

    def test_a_probe_of_the_port_is_not_worth_a_line(self, running: Server, log: pytest.LogCaptureFixture) -> None:
        socket.create_connection(running.address, 10).close()
        assert still_works(running)
        assert not [record for record in log.records if record.levelno >= logging.WARNING]

    def test_the_log_is_not_filled(self, running: Server, log: pytest.LogCaptureFixture) -> None:
        for _ in range(50):
            with socket.create_connection(running.address, 10) as plain:
                plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
                while plain.recv(1000):
                    pass
        assert still_works(running)
        assert len(log.records) <= 20

    def test_a_silent_peer_is_dropped(self, running: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(listener, "_LIMIT", 0.5)
        with socket.create_connection(running.address, 10) as plain:
            assert plain.recv(1) == b""

    def test_a_peer_that_goes_on_slowly_is_dropped(self, running: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(listener, "_LIMIT", 0.5)
        with socket.create_connection(running.address, 10) as plain:
            plain.sendall(bytes([22, 3, 1, 2, 0]))
            send_until_dropped(plain, b"\1", pause=0.05)

    def test_a_large_handshake_is_dropped(self, running: Server, log: pytest.LogCaptureFixture) -> None:
        """OpenSSL alone would wait for 128 KiB."""
        record = bytes([22, 3, 1, 0x40, 0])  # 16 KiB of a handshake
        hello = bytes([1, 1, 0xFF, 0xFF])  # the start of a first message of 128 KiB
        with socket.create_connection(running.address, 10) as plain:
            plain.sendall(record + hello + bytes(16384 - len(hello)))
            send_until_dropped(plain, record + bytes(16384), pause=0.02)
        assert "it sent more than 65536 bytes before it was authenticated" in log.text
        assert still_works(running)

    def test_too_many_at_once(self, running: Server, log: pytest.LogCaptureFixture) -> None:
        with contextlib.ExitStack() as stack:
            silent = [
                stack.enter_context(socket.create_connection(running.address, 10))
                for _ in range(listener._MOST_FROM_ONE_NETWORK)
            ]
            with socket.create_connection(running.address, 10) as one_more:
                assert one_more.recv(1) == b""
            assert "Too many connections are not authenticated yet" in log.text
            assert silent
        assert still_works(running)

    def test_a_member_that_opens_connections_without_end(
        self, running: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It costs no other member its place."""
        monkeypatch.setattr(listener, "_MOST_SESSIONS", 3)
        sessions = [session for _ in range(3) for session in running.meet("eu", streams=0)]
        assert "eu has 3 connections already" in self.refused(running, keys() / "eu.pem")
        for session in sessions:
            session.abort()
        for session in running.meet("eu"):
            session.abort()

    def test_another_version(self, running: Server) -> None:
        with authenticated(running) as tls:
            tls.sendall(struct.pack("!4sHH", b"HALO", frames.PROTOCOL + 1, 10))
            answer = read_answer(tls)
            assert "us at 127.0.0.1:" in answer.refusal
            assert f"uses version {frames.PROTOCOL + 1} of the protocol" in answer.refusal
        with pytest.raises(ProtocolVersionError, match=f"it uses version {frames.PROTOCOL + 1}"):
            length_of(struct.pack("!4sHH", b"HALO", frames.PROTOCOL + 1, 10), "it")

    @pytest.mark.parametrize(
        "opening",
        [Opening(-1), Opening(65), Opening(2**40), Opening(1, "no token"), Opening(1, "", 7)],
        ids=["negative", "too many", "absurd", "unknown token", "stream without token"],
    )
    def test_openings_that_make_no_sense(self, running: Server, opening: Opening) -> None:
        with authenticated(running) as tls:
            tls.sendall(encode(opening))
            answer = read_answer(tls)
            assert answer.refusal or opening.stream == 7
        assert still_works(running)

    @pytest.mark.parametrize("data", [b"", b"\xc1", b"\x81\xa7streams\xa1x"], ids=["nothing", "no message", "type"])
    def test_what_is_no_opening(self, running: Server, data: bytes) -> None:
        with authenticated(running) as tls:
            tls.sendall(struct.pack("!4sHH", b"HALO", frames.PROTOCOL, len(data)) + data)
            assert "Not an opening" in read_answer(tls).refusal
        assert still_works(running)

    def test_a_token_of_another_region_is_worth_nothing(self, running: Server) -> None:
        with authenticated(running) as first, authenticated(running, "eu") as second:
            first.sendall(encode(Opening(1)))
            token = read_answer(first).token
            second.sendall(encode(Opening(1, token, 0)))
            assert "belongs to none" in read_answer(second).refusal
            with authenticated(running) as third:
                third.sendall(encode(Opening(1, token, 0)))
                assert read_answer(third).refusal == ""
            assert running.sessions.get(timeout=LIMIT).name == "us"

    def test_a_peer_whose_connections_do_not_come_is_dropped(
        self, running: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(listener, "_ASSEMBLY", 0.3)
        with authenticated(running) as tls:
            tls.sendall(encode(Opening(2)))
            assert read_answer(tls).token
            assert tls.recv(1) == b""
        assert running.sessions.empty()

    def test_a_peer_whose_connections_come_slowly_has_time_for_each(
        self, running: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each takes round trips, and may be one of many on a long line."""
        monkeypatch.setattr(listener, "_ASSEMBLY", 2.0)
        with contextlib.ExitStack() as stack:
            control = stack.enter_context(authenticated(running))
            control.sendall(encode(Opening(3)))
            token = read_answer(control).token
            for stream in range(3):
                time.sleep(0.9)
                connection = stack.enter_context(authenticated(running))
                connection.sendall(encode(Opening(3, token, stream)))
                assert read_answer(connection).refusal == ""
            assert running.sessions.get(timeout=LIMIT).name == "us"

    def test_an_error_of_this_program_costs_one_connection(self, log: pytest.LogCaptureFixture) -> None:
        mistakes = [ZeroDivisionError()]

        def admit(certificate: Certificate) -> None:
            if mistakes:
                raise mistakes.pop()

        with server(admit) as running:
            with authenticated(running) as tls:
                assert tls.recv(1) == b""
            wait_until(lambda: "ZeroDivisionError" in log.text)
            assert still_works(running)

    def test_an_error_about_a_late_peer_costs_one_connection(
        self, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(listener, "_LIMIT", 0.2)
        mistakes = [ZeroDivisionError()]

        def report(self: listener.Listener, peer: object, why: str) -> None:
            if mistakes:
                raise mistakes.pop()

        monkeypatch.setattr(listener.Listener, "_report", report)
        with server() as running:
            with socket.create_connection(running.address, LIMIT) as silent:
                assert silent.recv(1) == b""
            wait_until(lambda: "ZeroDivisionError" in log.text)
            monkeypatch.setattr(listener, "_LIMIT", LIMIT)
            assert still_works(running)


def send_until_dropped(plain: socket.socket, data: bytes, pause: float) -> None:
    with contextlib.suppress(OSError):
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            plain.sendall(data)
            time.sleep(pause)
        pytest.fail("the connection is still open")


@contextlib.contextmanager
def authenticated(running: Server, name: str = "us") -> Iterator[Any]:
    """A bare TLS socket of a region."""
    context = client_context(read_keys(keys() / f"{name}.pem"))
    plain = socket.create_connection(running.address, LIMIT)
    with context.wrap_socket(plain, server_hostname="127.0.0.1") as tls:
        yield tls


def read_answer(tls: Any) -> Answer:
    header = b""
    while len(header) < HEADER_BYTES:
        header += tls.recv(HEADER_BYTES - len(header))
    return decode(tls.recv(length_of(header, "the server")), Answer)


@contextlib.contextmanager
def bound(host: str = "127.0.0.1") -> Iterator[tuple[int, Callable[[], None]]]:
    """A port where nothing listens, and nothing else can, and what releases it."""
    with socket.socket() as taken:
        taken.bind((host, 0))
        yield taken.getsockname()[1], taken.close


class TestWhatStopsARegion:
    """Each error says which address was tried, from where, what happened, and what to do."""

    def unreachable(self, address: Address) -> str:
        """The error of the first attempt, which may take long."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dialer, "_FIRST_PAUSE", 3 * LIMIT)
            with pytest.raises(ServerUnreachableError) as caught:
                dial(address, keys() / "us.pem", 1, LIMIT)
        return str(caught.value)

    def test_nothing_listens(self) -> None:
        with bound() as (port, _):
            text = self.unreachable(Address("127.0.0.1", port))
        assert f"127.0.0.1:{port} from 127.0.0.1 (lo): nothing listens there" in text
        assert "--listen" in text

    def test_waiting_leaves_the_users_seeds_alone(self) -> None:
        random.seed(0)
        expected = random.random()
        random.seed(0)
        with bound() as (port, _):
            self.unreachable(Address("127.0.0.1", port))
        assert random.random() == expected

    def test_a_firewall_that_drops_packets(self) -> None:
        with socket.socket() as full:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            port = full.getsockname()[1]
            with contextlib.ExitStack() as stack:
                for _ in range(3):  # the queue is full then, and the kernel drops what else comes
                    one = stack.enter_context(socket.socket())
                    one.setblocking(False)
                    one.connect_ex(("127.0.0.1", port))
                text = self.unreachable(Address("127.0.0.1", port))
        assert "it did not answer. A firewall drops the packets" in text
        assert f"TCP connections to port {port}" in text

    def test_a_port_that_accepts_and_says_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dialer, "_OPEN", 1.0)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            text = self.unreachable(Address(*silent.getsockname()))
        assert "it accepted the connection, and then said nothing" in text

    def test_another_program(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:

            def serve() -> None:
                plain, _ = other.accept()
                plain.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
                plain.recv(1000)
                plain.close()

            threading.Thread(target=serve, daemon=True).start()
            with pytest.raises(ServerRefusedError, match="does not speak TLS"):
                dial(Address(*other.getsockname()), keys() / "us.pem", 1, LIMIT)

    def test_a_name_that_nobody_knows(self) -> None:
        text = self.unreachable(Address("no-such-host.invalid", 29600))
        assert "The name no-such-host.invalid has no address here" in text

    def test_a_name_that_means_this_machine_by_mistake(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with bound("127.0.1.1") as (port, _):
            self.resolve(monkeypatch, ("127.0.1.1", port))
            text = self.unreachable(Address("halos.example.org", port))
        assert "Here halos.example.org means 127.0.1.1, which is this machine itself" in text
        assert "/etc/hosts" in text

    def test_the_server_says_so_when_its_own_name_means_loopback(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.resolve(monkeypatch, ("127.0.1.1", 0))
        with server(host="halos.example.org"):
            assert "halos.example.org is 127.0.1.1 on this machine, so other machines cannot reach" in caplog.text

    def test_a_server_whose_name_also_has_an_address_that_its_machine_does_not_use_listens_at_the_others(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """In containers without IPv6, /etc/hosts often gives localhost the address ::1 as well."""
        elsewhere, here = ("203.0.113.7", 0), ("127.0.0.1", 0)
        self.resolve(monkeypatch, elsewhere, here)
        with server(host="localhost") as running:
            assert [address.host for address in running.listener.addresses] == ["127.0.0.1"]
            assert "Cannot listen at 203.0.113.7:0: Cannot assign requested address" in caplog.text
        self.resolve(monkeypatch, elsewhere)
        with pytest.raises(OSError, match=r"Cannot listen at 203.0.113.7:0: Cannot assign"), server(host="localhost"):
            pass

    def test_each_address_of_a_name_is_tried(self, running: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        self.resolve(monkeypatch, ("127.0.0.2", running.address.port), ("127.0.0.1", running.address.port))
        session = dial(Address("localhost", running.address.port), keys() / "us.pem", 1, LIMIT)
        assert session.address == str(running.address)
        session.abort()

    def resolve(self, monkeypatch: pytest.MonkeyPatch, *addresses: tuple[str, int]) -> None:
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

    def test_a_server_that_starts_later_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        told, pauses = list[str](), list[float]()
        with contextlib.ExitStack() as opened, bound() as (port, release):

            def pause(seconds: float, _: object) -> None:
                pauses.append(seconds)
                if len(pauses) == 3:
                    release()
                    opened.enter_context(server(port=port))

            monkeypatch.setattr(dialer, "_sleep", pause)
            session = dial(Address("127.0.0.1", port), keys() / "us.pem", 1, LIMIT, tell=told.append)
            session.abort()
        assert len(pauses) == 3
        assert len(told) == 1, "each reason once"
        assert f"127.0.0.1:{port} cannot be reached yet. It is tried again for up to {LIMIT:g} s." in told[0]
        assert "nothing listens there" in told[0]

    def test_who_waits_can_be_interrupted(self) -> None:
        class StopError(Exception): ...

        calls: list[int] = []

        def interrupted() -> None:
            calls.append(1)
            if len(calls) > 5:
                raise StopError

        with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(StopError):
            dial(Address(*silent.getsockname()), keys() / "us.pem", 1, LIMIT, interrupted)

    def test_over_ipv6_and_ipv4(self) -> None:
        with server(host="") as running:
            if len(running.listener.addresses) < 2:
                pytest.skip("this machine has no IPv6")
            for host in ("::1", "127.0.0.1"):
                session = dial(Address(host, running.listener.port), keys() / "us.pem", 1, LIMIT)
                assert running.sessions.get(timeout=LIMIT).address.startswith(f"[{host}]" if ":" in host else host)
                session.abort()


class TestARunningMember:
    """It was connected before, so it is patient: what was right may become right again."""

    @pytest.fixture
    def log(self, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
        caplog.set_level(logging.WARNING)
        return caplog

    def connect(
        self, running: Server, limit: float = LIMIT, patience: float = LIMIT
    ) -> tuple[ServerConnection, list[Exception]]:
        failures: list[Exception] = []
        us = keys() / "us.pem"
        # A busy machine may take longer to connect than the limits that are tested.
        connection = ServerConnection(
            "the server", lambda seconds, check: dial(running.address, us, 0, LIMIT, check), limit
        )
        connection.on_failure(failures.append)
        connection.open(patience, lambda: None)
        return connection, failures

    def lose(self, running: Server) -> None:
        running.sessions.get(timeout=LIMIT).abort()

    def test_comes_back_when_the_list_of_revoked_names_can_be_read_again(self, log: pytest.LogCaptureFixture) -> None:
        answers = [CertificateRefusedError("The list cannot be read.", for_good=False)]
        admitted = [True]

        def admit(certificate: Certificate) -> None:
            if admitted:
                admitted.pop()
            elif answers:
                raise answers.pop()

        with server(admit) as running:
            connection, failures = self.connect(running)
            self.lose(running)
            running.sessions.get(timeout=LIMIT)
            assert not failures
            assert "The list cannot be read." in log.text
            connection.close(0)

    def test_comes_back_when_the_server_has_its_own_keys_again(
        self, log: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        make_authority(tmp_path, ["localhost"])  # another one
        with server() as running:
            connection, failures = self.connect(running)
            running.listener.renew(read_keys(tmp_path / "server.pem"))
            self.lose(running)
            wait_until(lambda: "It is tried again for up to" in log.text)
            running.listener.renew(read_keys(keys() / "server.pem"))
            running.sessions.get(timeout=LIMIT)
            assert not failures
            connection.close(0)

    def test_gives_up_at_once_when_it_is_revoked(self) -> None:
        admitted = [True]

        def admit(certificate: Certificate) -> None:
            if not admitted:
                raise CertificateRefusedError("The certificate of us is revoked.")
            admitted.pop()

        with server(admit) as running:
            _, failures = self.connect(running)
            self.lose(running)
            wait_until(lambda: failures)
            assert "is revoked" in str(failures[0])

    def refuse(self, running: Server) -> None:
        """Refuses the next connection for a reason that may pass."""
        self.say(running, Refusal("us is present already.", for_good=False)).close(LIMIT)

    def say(self, running: Server, message: Message) -> Session:
        there = running.sessions.get(timeout=LIMIT)
        there.control.start(lambda message, progress: None, lambda error: None)
        there.control.post(message)
        return there

    def test_ends_when_the_server_says_that_it_has_given_up(self) -> None:
        with server() as running:
            connection, failures = self.connect(running)
            self.say(running, Failure("the global server", "The disk is full.")).close(LIMIT)
            wait_until(lambda: failures)
            assert str(failures[0]) == "The global server the server has given up: The disk is full."
            with pytest.raises(PeerFailedError):
                connection.check()
            assert running.sessions.empty()

    def test_is_told_at_once_that_it_is_refused_and_waits_to_be_let_in(self, log: pytest.LogCaptureFixture) -> None:
        class Nobody:
            def connected(self) -> list[Message]:
                return []

            def disconnected(self) -> None: ...

            def receive(self, message: Message, progress: object) -> bool:
                return True

        with server() as running:
            connection, failures = self.connect(running)
            connection.serve(Nobody())
            self.refuse(running)
            wait_until(lambda: f"us is present already. It is asked again for up to {LIMIT:g} s." in log.text)
            self.refuse(running)
            self.say(running, StatusReply(""))
            wait_until(lambda: "lets this job in now" in log.text)
            assert log.text.count("us is present already.") == 1
            assert "is connected again" not in log.text
            assert "is lost" not in log.text
            assert not failures
            connection.close(0)

    def test_ends_when_it_was_refused_until_the_limit(self) -> None:
        with server() as running:
            _, failures = self.connect(running, patience=1.5)
            self.refuse(running)
            self.refuse(running)
            wait_until(lambda: failures)
            assert "has refused this job for timeout=1.5 s: us is present already." in str(failures[0])

    def test_gives_up_at_the_limit(self, tmp_path: Path) -> None:
        make_authority(tmp_path, ["localhost"])
        with server() as running:
            _, failures = self.connect(running, limit=1.5)
            running.listener.renew(read_keys(tmp_path / "server.pem"))
            self.lose(running)
            wait_until(lambda: failures)
            assert isinstance(failures[0], ServerRefusedError)
