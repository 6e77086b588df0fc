"""What somebody with a valid key may try: it costs him the membership, his name is in the log, and the run goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from lightning_halos.core import member_checks
from lightning_halos.core.messages import Enrol, Join, Progress, Refusal, StatusRequest
from lightning_halos.transport import frames, wire
from tests.serving.conftest import Server, until
from tests.serving.region import DESCRIPTION, STEPS, Region

Serve = Callable[..., Server]
Regions = Callable[..., Region]


def report(**changes: Any) -> bytes:
    """The fields of a report, also such as no program of this package would send."""
    fields = msgspec.msgpack.decode(wire.encode(Progress(0, 1, 0, STEPS, 0.1, 0.0, 1.0, update=1)))
    return msgspec.msgpack.encode({**fields, **changes})


@pytest.mark.parametrize(
    ("length", "elements", "data"),
    [
        pytest.param(2**40, 0, b"", id="2^40 bytes are announced"),
        pytest.param(10, 2**40, b"", id="2^40 numbers are announced"),
        pytest.param(-9, 0, b"", id="a length that means nothing"),
        pytest.param(5, 0, b"\x80\x04K\x01.", id="a pickle"),
        pytest.param(None, 0, report(steps=-1), id="a negative number of steps"),
        pytest.param(None, 0, report(steps=math.nan), id="NaN steps"),
        pytest.param(None, 0, report(seconds=math.inf), id="infinite seconds"),
        pytest.param(None, 0, report(data=[[5, -5]]), id="data that ends before it starts"),
        pytest.param(None, 0, report(data=[[2**62, 2**62 + 4]]), id="data that does not exist"),
        pytest.param(None, 0, report(worker="x"), id="a text as a number"),
        pytest.param(None, 0, report(more=1), id="a field that no message has"),
    ],
)
def test_a_frame_that_no_member_sends(
    serve: Serve, region: Regions, length: int | None, elements: int, data: bytes
) -> None:
    server = serve(workers=1)
    evil, good = region("us", server), region("eu", server)
    evil.enter()
    good.enter()
    evil.session.control._send_frame(len(data) if length is None else length, elements, 0, data)
    assert evil.expect(Refusal).for_good
    assert "us (127.0.0.1:" in server.events
    assert "loses its membership" in server.events
    good.work()
    good.answer()
    assert server.status()["run"]["total"] == STEPS
    assert server.status()["members"]["us"]["state"] == "lost"


@pytest.mark.parametrize("held", [[(0, 2**62)], [(2**61, 2**62)], [(0, 1000)], [(8, 4)]])
def test_data_that_a_new_process_says_it_holds(serve: Serve, region: Regions, held: list[tuple[int, int]]) -> None:
    server = serve(workers=1)
    good, evil = region("eu", server), region("us", server)
    good.enter()
    evil.connect()
    evil.post(Join(evil.process, 1, DESCRIPTION, held))
    assert evil.expect(Refusal).for_good
    grant = good.lease()
    assert (grant.epoch, grant.first) == (0, 0)


def test_a_process_that_comes_again_and_again_with_another_name_for_itself(serve: Serve, region: Regions) -> None:
    server = serve(workers=1)
    good = region("eu", server)
    good.enter()
    for _ in range(30):
        evil = region("us", server)
        evil.connect()
        evil.join()
        evil.settle()
        evil.post(Progress(evil.index, 1, 9, STEPS, 0.1, 0.0, 1.0, update=1))
        evil.expect(Refusal)
        evil.goodbye()
    good.work()
    good.answer()
    assert server.status()["run"]["total"] == STEPS


@pytest.mark.parametrize("held", [[(0, 2**62)], [(900, 1001)], [(0, 1000)], [(8, 4)]])
def test_data_that_a_member_says_it_holds_when_it_is_back(
    serve: Serve, region: Regions, held: list[tuple[int, int]]
) -> None:
    server = serve(workers=1)
    good, evil = region("eu", server), region("us", server)
    good.enter()
    evil.enter()
    evil.cut()
    evil.connect()
    evil.post(Join(evil.process, 1, DESCRIPTION, held, run=evil.run))
    assert evil.expect(Refusal).for_good
    assert "us (127.0.0.1:" in server.events
    grant = good.lease()
    assert (grant.epoch, grant.first) == (0, 0)


def expel(evil: Region) -> None:
    evil.post(Progress(evil.index, 9, 0, STEPS, 0.1, 0.0, 1.0, update=1))
    evil.expect(Refusal)


def test_a_member_that_uses_the_identity_of_another_ones_process(serve: Serve, region: Regions) -> None:
    server = serve(workers=1)
    good, evil = region("eu", server), region("us", server)
    good.enter()
    evil.process = good.process  # whoever knows it
    evil.enter()
    expel(evil)
    good.cut()
    good.connect()
    good.join()
    assert not good.settle().is_new
    good.work()
    good.answer()


def test_requests_for_the_status_whose_answers_nobody_reads(serve: Serve, region: Regions) -> None:
    server = serve(workers=1)
    good, evil = region("eu", server), region("us", server)
    good.enter()
    evil.dial()
    control = evil.session.control
    control._send_frame(frames.HELLO, frames.PROTOCOL)
    request = wire.encode(StatusRequest())
    frame = frames.HEADER.pack(len(request), 0, 0) + request
    for _ in range(100):
        if "does not take what it asks for" in server.events:
            break
        with suppress(OSError):  # it is expelled already
            control._connections[0].send(frame * 1000)
    until(lambda: "us (127.0.0.1:" in server.events and "does not take what it asks for" in server.events)
    good.work()
    good.answer()


LONG = "x" * 2**20


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(Enrol(LONG, 1), id="enrols"),
        pytest.param(Join(LONG, 1, DESCRIPTION), id="joins"),
        pytest.param(Join("1", 1, replace(DESCRIPTION, model=LONG, names=[LONG, LONG])), id="describes itself"),
    ],
)
@pytest.mark.parametrize("has_begun", [True, False])
def test_long_texts_are_not_kept(serve: Serve, region: Regions, message: Enrol | Join, has_begun: bool) -> None:
    server = serve(workers=1, min_regions=1 if has_begun else 2)
    good, evil = region("eu", server), region("us", server)
    good.connect()
    good.join()
    if has_begun:
        good.settle()
    until(lambda: "eu" in server.status()["members"])
    evil.connect()
    evil.post(message)
    until(lambda: "refused" in server.events or "loses its membership" in server.events)
    assert "us (127.0.0.1:" in server.events
    assert len(server.server.reporter.text()) < 2**16


def test_reports_whose_updates_never_come(serve: Serve, region: Regions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_checks, "_MOST_UNCOVERED", 100)
    server = serve(workers=1)
    good, evil = region("eu", server), region("us", server)
    good.enter()
    evil.enter()
    for number in range(1, 102):
        evil.post(Progress(evil.index, number, 0, 0, 0.1, 0.0, 1.0, update=1))
    assert evil.expect(Refusal).for_good
    good.work()
    good.answer()


def test_steps_of_an_update_that_cannot_come(serve: Serve, region: Regions) -> None:
    server = serve(workers=1)
    good, evil = region("eu", server), region("us", server)
    good.enter()
    evil.enter()
    evil.post(Progress(evil.index, 1, 0, STEPS, 0.1, 0.0, 1.0, update=1000))
    assert evil.expect(Refusal).for_good
    assert server.status()["run"]["total"] == 0


def test_a_last_update_without_steps_that_were_reported(serve: Serve, region: Regions) -> None:
    server = serve(workers=1)
    good, evil = region("eu", server), region("us", server)
    good.enter()
    evil.enter()
    evil.post(Progress(evil.index, 1, 0, STEPS, 0.1, 0.0, 1.0, update=2))
    evil.flush()  # with number 1
    assert evil.expect(Refusal).for_good
    assert server.status()["run"]["total"] == 0


def test_a_member_that_joins_again_and_again_on_one_connection(serve: Serve, region: Regions) -> None:
    server = serve(workers=1)
    good, evil = region("eu", server), region("us", server)
    good.enter()
    evil.enter()
    evil.join()
    assert "Join twice on one connection" in evil.expect(Refusal).reason
    good.work()
    good.answer()


def test_refusals_without_end_leave_the_events_of_others(serve: Serve, region: Regions) -> None:
    server = serve(workers=1)
    good = region("eu", server)
    good.enter()
    for _ in range(20):
        evil = region("us", server)
        evil.connect()
        evil.post(Join("1", 1, replace(DESCRIPTION, model="another")))
        evil.expect(Refusal)
        evil.goodbye()
    assert "The run begins." in server.events
    assert "eu (127.0.0.1:" in server.events
    assert "(20 times)" in server.events
    assert server.events.count("us (127.0.0.1:") <= 10
