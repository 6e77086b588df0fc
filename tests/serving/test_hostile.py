"""What somebody with a valid key may try: it costs him the membership, his name is in the log, and the run goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from lightning_halos.core.messages import Join, Progress, Refusal
from lightning_halos.transport import wire
from tests.serving.conftest import Server
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
    evil.post(Join(evil.process, 1, DESCRIPTION, held))
    assert evil.expect(Refusal).for_good
    assert "us (127.0.0.1:" in server.events
    grant = good.lease()
    assert (grant.epoch, grant.first) == (0, 0)
