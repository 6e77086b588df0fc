"""Links over gloo: a peer that is alive is waited for, a silent one is not, and what arrives is checked."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch.distributed import ProcessGroup, TCPStore

from lightning_halos.core.messages import Failure, LeaseRequest, Message, Pull, Push
from lightning_halos.core.vector import PART, Advance
from lightning_halos.transport import alarm as alarm_module
from lightning_halos.transport import wire
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.client import WorkerClient
from lightning_halos.transport.errors import PeerLostError, ProtocolVersionError
from lightning_halos.transport.groups import make_group
from lightning_halos.transport.link import GlooLink, LoopbackLink, wait_all

TIMEOUT = 4.0  # seconds of silence
ELEMENTS = 3 * PART + 5
FORM = (ELEMENTS, torch.float32)


def ignore(*_: object) -> None: ...


@pytest.fixture(autouse=True)
def _nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An alarm that nobody asks does not end the process, and threads do not outlive their test."""
    monkeypatch.setattr(Alarm, "_end_process", ignore)
    yield
    for end in End.all:
        end.alarm.disarm()
        end.link.close()
        end.failed.set()
    for end in End.all:
        end.link.join(10)
    End.all.clear()


@contextmanager
def groups(size: int = 2) -> Iterator[list[ProcessGroup]]:
    """The process groups of ``size`` processes, all of them in this one."""
    master = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    made: dict[int, ProcessGroup] = {}

    def make(rank: int) -> None:
        made[rank] = make_group(TCPStore("127.0.0.1", master.port), "group", rank, size, 300.0, ignore)

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


@contextmanager
def ends(timeout: float = TIMEOUT) -> Iterator[tuple[End, End]]:
    with groups() as (first, second):
        yield (
            End(GlooLink(first, 1, "b", timeout, FORM), timeout).start(),
            End(GlooLink(second, 0, "a", timeout, FORM), timeout).start(),
        )


class TestLiveness:
    def test_a_peer_that_is_busy_with_a_message_is_waited_for(self) -> None:
        with ends() as (a, b):
            b.handle = lambda message: time.sleep(2.5 * TIMEOUT if message == LeaseRequest(1, 1) else 0)
            vector = torch.zeros(ELEMENTS)
            a.link.post(LeaseRequest(1, 1))
            a.link.post(Push(0, 0, 1, 1, 1.0, vector=vector))  # nobody takes it until the first one is handled
            b.wait_for(2)
            assert a.failure is None

    def test_a_server_that_takes_long_is_waited_for(self) -> None:
        with groups() as (mine, its):
            server = End(GlooLink(its, 0, "rank 1", TIMEOUT, FORM)).start()
            alarm = Alarm("rank 1")
            link = GlooLink(mine, 1, "its server", TIMEOUT, FORM)
            alarm.add(link)
            client = WorkerClient(link, alarm, TIMEOUT, ignore)
            alarm.watch(TIMEOUT)

            def answer() -> None:
                server.wait_for(1)
                time.sleep(2.5 * TIMEOUT)
                server.link.post(Pull(1, 8, 0, False, vector=torch.ones(ELEMENTS)))

            threading.Thread(target=answer, daemon=True).start()
            pull, progress = client.exchange(Push(1, 0, 1, 1, 1.0), ignore)
            assert max(progress) == ELEMENTS
            assert pull.version == 1
            alarm.disarm()
            link.close()

    def test_a_peer_that_is_silent_is_lost(self) -> None:
        with groups() as (mine, _):
            a = End(GlooLink(mine, 1, "b", 0.5, FORM), 0.5).start()
            assert a.failed.wait(30)
            assert isinstance(a.failure, PeerLostError)
            assert "b did not say anything for 0.5 s" in str(a.failure)

    def test_a_thread_that_ends_says_so(self) -> None:
        def leave(message: Message) -> None:
            raise SystemExit

        first, second = LoopbackLink.pair("b", "a")
        a, b = End(first).start(), End(second).start()
        b.handle = leave
        a.link.post(LeaseRequest())
        assert b.failed.wait(30)

    def test_a_link_that_is_added_after_a_failure_tells_its_peer(self) -> None:
        mine, its = LoopbackLink.pair("b", "a")
        b = End(its).start()
        alarm = Alarm("a")
        alarm.fail(ValueError("a mistake"))
        alarm.add(mine)
        alarm.disarm()
        (failure,) = b.wait_for(1)
        assert isinstance(failure, Failure)
        assert "a mistake" in failure.reason


class BrokenGroup:
    """A process group whose operations fail for another reason than a lost connection."""

    def send(self, *_: object) -> None:
        raise RuntimeError("tensors must be contiguous")

    recv = send


def test_an_error_that_is_no_lost_connection_says_what_it_is() -> None:
    a = End(GlooLink(BrokenGroup(), 1, "b", TIMEOUT, FORM)).start()  # type: ignore[arg-type]
    assert a.failed.wait(30)
    assert not isinstance(a.failure, PeerLostError)
    assert "tensors must be contiguous" in str(a.failure)


@pytest.mark.parametrize("reaction", ["close", "report"])
def test_a_process_that_reacts_to_a_failure_is_not_ended(reaction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main thread may close its links, or fail by itself, without having asked for the failure."""
    monkeypatch.undo()  # of what the other tests have in place of the end of the process
    monkeypatch.setattr(alarm_module, "_LIMIT", 0.2)
    ended = threading.Event()
    monkeypatch.setattr(alarm_module.os, "_exit", lambda code: ended.set())
    alarm = Alarm("rank 0")
    alarm.fail(PeerLostError("rank 1 disappeared"))
    alarm.close(0) if reaction == "close" else alarm.report("a mistake")
    alarm.fail(PeerLostError("rank 2 disappeared"))
    assert not ended.wait(1.0)


def test_a_thread_that_would_end_the_process_goes_when_the_main_thread_reacts() -> None:
    """It refers to the links, and so to the models of a fit that is over."""
    alarm = Alarm("rank 0")
    alarm.fail(PeerLostError("rank 1 disappeared"))
    alarm.close(0)
    waiting = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    for thread in waiting:
        thread.join(5)
    assert not any(thread.is_alive() for thread in waiting)


class TestVectors:
    @pytest.mark.parametrize("elements", [ELEMENTS, PART], ids=str)
    def test_a_vector_arrives(self, elements: int) -> None:
        with groups() as (first, second):
            form = (elements, torch.float64)
            a = End(GlooLink(first, 1, "b", TIMEOUT, form)).start()
            b = End(GlooLink(second, 0, "a", TIMEOUT, form)).start()
            vector = torch.arange(elements, dtype=torch.float64)
            a.link.post(Push(0, 0, 1, 1, 1.0, vector=vector))
            (push,) = b.wait_for(1)
            assert isinstance(push, Push)
            assert torch.equal(push.vector, vector)

    @pytest.mark.parametrize("kind", ["gloo", "loopback"])
    def test_a_vector_that_is_cut_off_is_dropped_and_the_failure_follows(self, kind: str) -> None:
        def send_half(a: End) -> None:
            vector = torch.zeros(ELEMENTS)

            def fill(advance: Advance) -> None:
                advance(PART)
                raise ZeroDivisionError

            with pytest.raises(ZeroDivisionError):
                a.link.post(Push(0, 0, 1, 1, 1.0, vector=vector), fill)
            assert torch.equal(vector, torch.zeros(ELEMENTS))
            a.link.post(Failure("a", "a mistake"))

        if kind == "gloo":
            with ends() as (a, b):
                send_half(a)
                assert b.wait_for(1) == [Failure("a", "a mistake")]
        else:
            first, second = LoopbackLink.pair("b", "a")
            a, b = End(first).start(), End(second).start()
            send_half(a)
            assert b.wait_for(1) == [Failure("a", "a mistake")]


class TestWhatArrives:
    """A peer that does not keep to the protocol is an error that says so, and gets no memory."""

    def failure(self, *headers: tuple[int, int, int], form: Any = FORM) -> Exception | None:
        with groups() as (mine, its):
            asked_for: list[int] = []

            def memory() -> torch.Tensor:
                asked_for.append(1)
                return torch.empty(ELEMENTS)

            end = End(GlooLink(mine, 1, "b", 60.0, form, memory), 60.0).start()
            for header in headers:
                frame = struct.pack("<qqq", *header).ljust(1024, b"\0")
                its.send([torch.frombuffer(bytearray(frame), dtype=torch.uint8)], 0, 0).wait()
            assert end.failed.wait(30)
            assert not asked_for
            return end.failure

    @pytest.mark.parametrize(
        "header",
        [(10, 2**50, 0), (10, -1, 0), (10, ELEMENTS, 1), (10, ELEMENTS, 7), (2**40, 0, 0), (-9, 0, 0)],
        ids=["too many elements", "negative elements", "dtype", "no dtype", "too long", "negative length"],
    )
    def test_absurd_lengths(self, header: tuple[int, int, int]) -> None:
        failure = self.failure((-3, wire.PROTOCOL, 0), header)
        assert isinstance(failure, ValueError)
        assert "b announces a message of" in str(failure)

    def test_a_vector_on_a_link_that_carries_none(self) -> None:
        failure = self.failure((-3, wire.PROTOCOL, 0), (10, 5, 0), form=None)
        assert "b announces a message of 10 bytes with a vector of 5 elements" in str(failure)

    def test_another_version(self) -> None:
        failure = self.failure((-3, wire.PROTOCOL + 1, 0))
        assert isinstance(failure, ProtocolVersionError)
        assert f"b uses version {wire.PROTOCOL + 1} of the protocol" in str(failure)
        assert f"this process uses version {wire.PROTOCOL}" in str(failure)

    def test_a_version_that_says_no_version(self) -> None:
        failure = self.failure((10, 0, 0))
        assert isinstance(failure, ProtocolVersionError)
