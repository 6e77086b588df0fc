"""Links, over gloo and TLS: a peer that is alive is waited for, a silent one is not, and what arrives is checked."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from lightning_halos.core.messages import Failure, LeaseRequest, Message, Pull, Push
from lightning_halos.core.vector import PART, Advance
from lightning_halos.transport import alarm as alarm_module
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.client import WorkerClient
from lightning_halos.transport.errors import PeerLostError, ProtocolVersionError
from lightning_halos.transport.frames import PROTOCOL
from lightning_halos.transport.link import GlooLink, LoopbackLink, wait_all
from tests.transport.ends import ELEMENTS, FORM, TIMEOUT, End, GlooWire, Wire, ignore

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def ends(wire: Wire) -> tuple[End, End]:
    return End(wire.link(0, "b")).start(), End(wire.link(1, "a")).start()


class TestLiveness:
    def test_a_peer_that_is_busy_with_a_message_is_waited_for(self, wire: Wire) -> None:
        a, b = ends(wire)
        b.handle = lambda message: time.sleep(2.5 * TIMEOUT if message == LeaseRequest(1, 1) else 0)
        vector = torch.zeros(ELEMENTS)
        a.link.post(LeaseRequest(1, 1))
        a.link.post(Push(0, 0, 1, 1, 1.0, vector=vector))  # nobody takes it until the first one is handled
        b.wait_for(2)
        assert a.failure is None

    def test_a_vector_that_is_filled_slowly_is_waited_for(self, wire: Wire) -> None:
        if isinstance(wire, GlooWire):
            pytest.skip("it shows no sign of life meanwhile; vectors are filled by processors of the same machine")
        a, b = ends(wire)

        def fill(advance: Advance) -> None:
            advance(PART)
            time.sleep(2.5 * TIMEOUT)

        a.link.post(Push(0, 0, 1, 1, 1.0, vector=torch.zeros(ELEMENTS)), fill)
        b.wait_for(1)
        assert b.failure is None

    @pytest.mark.parametrize("wire", ["gloo", pytest.param("tls", marks=pytest.mark.slow)], indirect=True)
    def test_a_server_that_takes_long_is_waited_for(self, wire: Wire) -> None:
        server = End(wire.link(1, "rank 1")).start()
        alarm = Alarm("rank 1")
        link = wire.link(0, "its server")
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

    def test_a_peer_that_is_silent_is_lost(self, wire: Wire) -> None:
        a = End(wire.link(0, "b", 0.5), 0.5).start()
        assert a.failed.wait(30)
        assert isinstance(a.failure, PeerLostError)
        assert "b did not say anything for 0.5 s" in str(a.failure)

    def test_a_link_ends_with_the_goodbye_of_its_peer(self, wire: Wire) -> None:
        """And not before it has started."""
        a, b = wire.link(0, "b"), wire.link(1, "a")
        assert not a.has_ended
        for link in (a, b):
            link.start(lambda message, progress: wait_all(progress), ignore)
        assert not a.has_ended
        b.close()
        deadline = time.monotonic() + 60
        while not a.has_ended:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not b.has_ended
        a.close()
        b.join(60)
        assert b.has_ended
        assert a.has_said_goodbye
        assert b.has_said_goodbye

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
    """The main thread may close its links, or fail by itself, without having asked for the failure.

    The thread that would end the process goes then: it refers to the links, and so to the models of a fit that is over.
    """
    monkeypatch.undo()  # of what the other tests have in place of the end of the process
    ended = threading.Event()
    monkeypatch.setattr(alarm_module.os, "_exit", lambda code: ended.set())
    alarm = Alarm("rank 0")
    alarm.fail(PeerLostError("rank 1 disappeared"))
    waiting = timers()
    assert waiting
    alarm.close(0) if reaction == "close" else alarm.report("a mistake")
    alarm.fail(PeerLostError("rank 2 disappeared"))
    for thread in waiting + timers():
        thread.join(alarm_module._LIMIT / 2)
        assert not thread.is_alive()
    assert not ended.is_set()


def test_a_process_whose_main_thread_does_not_react_to_a_failure_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(alarm_module, "_LIMIT", 0.1)
    ended = threading.Event()
    monkeypatch.setattr(alarm_module.os, "_exit", lambda code: ended.set())
    Alarm("rank 0").fail(PeerLostError("rank 1 disappeared"))
    assert ended.wait(30)


def timers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


class TestVectors:
    @pytest.mark.parametrize("elements", [ELEMENTS, PART, 1, 10 * PART], ids=str)
    def test_a_vector_arrives(self, wire: Wire, elements: int) -> None:
        form = (elements, torch.float64)
        a, b = End(wire.link(0, "b", form=form)).start(), End(wire.link(1, "a", form=form)).start()
        vector = torch.arange(elements, dtype=torch.float64)
        a.link.post(Push(0, 0, 1, 1, 1.0, vector=vector))
        a.link.post(LeaseRequest(3))
        push, request = b.wait_for(2)
        assert isinstance(push, Push)
        assert torch.equal(push.vector, vector)
        assert request == LeaseRequest(3)
        assert min(a.link.bytes_sent, b.link.bytes_received) > vector.nbytes

    def test_vectors_in_both_directions_at_once(self, wire: Wire) -> None:
        both = ends(wire)
        for number in range(1, 6):
            for end in both:
                end.link.post(Push(0, 0, 1, 1, 1.0, vector=torch.full((ELEMENTS,), float(number)), number=number))
        for end in both:
            received = end.wait_for(5)
            assert [push.number for push in received] == [1, 2, 3, 4, 5]
            assert all(torch.equal(push.vector, torch.full((ELEMENTS,), float(push.number))) for push in received)

    def test_the_first_parts_are_used_before_the_last_ones_are_filled(self, wire: Wire) -> None:
        used = threading.Event()
        progress_of = End._on_message

        class Using(End):
            def _on_message(self, message: Message, progress: Iterable[int]) -> None:
                for complete in progress:
                    if complete >= PART:
                        used.set()
                progress_of(self, message, ())

        a, b = End(wire.link(0, "b")).start(), Using(wire.link(1, "a")).start()

        def fill(advance: Advance) -> None:
            advance(PART)
            assert used.wait(30)

        a.link.post(Push(0, 0, 1, 1, 1.0, vector=torch.zeros(ELEMENTS)), fill)
        b.wait_for(1)

    def test_a_vector_that_is_cut_off_is_dropped_and_the_failure_follows(self, wire: Wire) -> None:
        a, b = ends(wire)
        send_half(a)
        assert b.wait_for(1) == [Failure("a", "a mistake")]

    def test_the_same_within_a_process(self) -> None:
        first, second = LoopbackLink.pair("b", "a")
        a, b = End(first).start(), End(second).start()
        send_half(a)
        assert b.wait_for(1) == [Failure("a", "a mistake")]


def send_half(a: End) -> None:
    """Sends a vector that is cut off, then the failure."""
    vector = torch.zeros(ELEMENTS)

    def fill(advance: Advance) -> None:
        advance(PART)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        a.link.post(Push(0, 0, 1, 1, 1.0, vector=vector), fill)
    assert torch.equal(vector, torch.zeros(ELEMENTS))
    a.link.post(Failure("a", "a mistake"))


class TestWhatArrives:
    """A peer that does not keep to the protocol is an error that says so, and gets no memory."""

    def failure(self, wire: Wire, *headers: tuple[int, int, int], form: Any = FORM) -> Exception | None:
        asked_for: list[int] = []

        def memory() -> torch.Tensor:
            asked_for.append(1)
            return torch.empty(ELEMENTS)

        end = End(wire.link(0, "b", 60.0, form, memory), 60.0).start()
        for header in headers:
            wire.send_header(1, *header)
        assert end.failed.wait(30)
        assert not asked_for
        return end.failure

    @pytest.mark.parametrize(
        "header",
        [(10, 2**50, 0), (10, -1, 0), (10, ELEMENTS, 1), (10, ELEMENTS, 7), (2**40, 0, 0), (-9, 0, 0)],
        ids=["too many elements", "negative elements", "dtype", "no dtype", "too long", "negative length"],
    )
    def test_absurd_lengths(self, wire: Wire, header: tuple[int, int, int]) -> None:
        failure = self.failure(wire, (-3, PROTOCOL, 0), header)
        assert isinstance(failure, ValueError)
        assert "b announces a message of" in str(failure)

    def test_a_vector_on_a_link_that_carries_none(self, wire: Wire) -> None:
        failure = self.failure(wire, (-3, PROTOCOL, 0), (10, 5, 0), form=None)
        assert "b announces a message of 10 bytes with a vector of 5 elements" in str(failure)

    def test_another_version(self, wire: Wire) -> None:
        failure = self.failure(wire, (-3, PROTOCOL + 1, 0))
        assert isinstance(failure, ProtocolVersionError)
        assert f"b uses version {PROTOCOL + 1} of the protocol" in str(failure)
        assert f"this process uses version {PROTOCOL}" in str(failure)

    def test_a_version_that_says_no_version(self, wire: Wire) -> None:
        failure = self.failure(wire, (10, 0, 0))
        assert isinstance(failure, ProtocolVersionError)
