"""A real server before its run begins, and with members that are connected and do not do their part."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from lightning_halos.checkpoint.errors import CheckpointError
from lightning_halos.core.messages import Enrol, Enrolled, Failure, Refusal, Welcome
from lightning_halos.core.placement import Placement
from lightning_halos.core.topology import Topology
from lightning_halos.serving import snapshots
from lightning_halos.serving.storage import RunDirectory
from lightning_halos.training.membership import Membership
from lightning_halos.training.server_settings import ServerSettings
from lightning_halos.training.site import Site
from lightning_halos.transport.address import Address
from tests.serving.conftest import Server, until
from tests.serving.region import LIMIT, Region

Serve = Callable[..., Server]
Regions = Callable[..., Region]


def enrol(region: Region, workers: int, port: int | None = None) -> None:
    region.connect(port)
    region.post(Enrol(region.process, workers))


def told(region: Region) -> tuple[int, int]:
    """The workers of a global step, and those of the regions that have enrolled before."""
    answer = region.expect(Enrolled)
    return answer.workers, answer.first


def kill(server: Server) -> None:
    server.server.stop(signal.SIGKILL)
    server.wait()


def test_a_server_that_is_killed_before_the_start_tells_each_region_the_same_numbers_again(
    serve: Serve, region: Regions
) -> None:
    server = serve(min_regions=2)
    us, eu, ap = (region(name, server) for name in ("us", "eu", "ap"))
    enrol(us, 3)
    until(lambda: "us (127.0.0.1" in server.events)
    enrol(eu, 2)
    assert [told(us), told(eu)] == [(5, 0), (5, 3)]
    kill(server)
    server = serve(min_regions=2)
    enrol(ap, 4, server.port)
    enrol(eu, 2, server.port)
    enrol(us, 3, server.port)
    assert [told(ap), told(eu), told(us)] == [(5, 5), (5, 3), (5, 0)]


def test_a_region_that_waits_may_connect_again_before_its_loss_is_noticed(serve: Serve, region: Regions) -> None:
    server = serve(min_regions=2)
    us, eu = region("us", server), region("eu", server)
    enrol(us, 3)
    until(lambda: "us (127.0.0.1" in server.events)
    old = us.session  # neither end closes it
    enrol(us, 3)
    until(lambda: "is connected. (2 times)" in server.events)
    enrol(eu, 2)
    assert [told(us), told(eu)] == [(5, 0), (5, 3)]
    old.abort()


def test_a_region_that_waits_and_was_away_is_not_forgotten(serve: Serve, region: Regions) -> None:
    liveness = 2.0
    server = serve(min_regions=2, liveness=liveness)
    us, eu = region("us", server), region("eu", server)
    enrol(us, 3)
    until(lambda: "us (127.0.0.1" in server.events)
    us.cut()
    until(lambda: "The connection of us" in server.events)
    enrol(us, 3)
    time.sleep(1.5 * liveness)
    assert "us is lost" not in server.events
    enrol(eu, 2)
    assert [told(us), told(eu)] == [(5, 0), (5, 3)]


def test_a_region_that_has_enrolled_in_a_run_that_goes_on_keeps_its_numbers(serve: Serve, region: Regions) -> None:
    server = serve()
    us, eu, ap = (region(name, server) for name in ("us", "eu", "ap"))
    us.enter()
    enrol(eu, 2)
    assert told(eu) == (1, 1)
    kill(server)
    server = serve()
    enrol(ap, 1, server.port)
    enrol(eu, 2, server.port)
    assert [told(ap), told(eu)] == [(1, 3), (1, 1)]


def test_nobody_is_told_what_could_not_be_written(
    serve: Serve, region: Regions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(snapshots, "_RETRY", 0.1)
    save, failures = RunDirectory.save_founding, 2

    def fail(directory: RunDirectory, state: Any) -> None:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise OSError("no space")
        save(directory, state)

    monkeypatch.setattr(RunDirectory, "save_founding", fail)
    server = serve()
    us = region("us", server)
    enrol(us, 3)
    assert told(us) == (3, 0)
    assert "could not be written, and is tried again: no space" in server.events
    state = json.loads((tmp_path / "run" / "founding.json").read_text())
    us_told = {"name": "us", "first": 0, "workers": 3, "session": us.process, "is_told": True}
    assert state == {"workers": 3, "regions": [us_told], "gone": []}


@pytest.mark.parametrize("end", ["it says goodbye", "it fails", "it disappears", "and the server, too"])
def test_a_job_that_has_ended_before_the_start_does_not_count(serve: Serve, region: Regions, end: str) -> None:
    server = serve(liveness=5.0)
    us, eu = region("us", server), region("eu", server)
    enrol(us, 1)
    assert told(us) == (1, 0)
    match end:
        case "it says goodbye":
            us.goodbye()
        case "it fails":
            us.post(Failure("us", "a mistake in setup()"))
        case "it disappears":
            us.cut()
        case _:
            us.cut()
            kill(server)
            server = serve(liveness=5.0)
            server.server.host._missing[0] -= 30.0  # the time that jobs have for their return
    until(lambda: not server.server.host.ask(lambda node: node.told))
    enrol(eu, 2, server.port)
    assert told(eu) == (2, 0)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_file_of_what_regions_were_told_is_an_error_that_says_what_to_do(tmp_path: Path, text: str) -> None:
    directory = RunDirectory(tmp_path)
    assert directory.load_founding() is None
    (tmp_path / "founding.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"founding.json cannot be read.* Remove it if no job waits"):
        directory.load_founding()


def test_a_founder_that_is_connected_and_sends_no_model_does_not_block_the_start(serve: Serve, region: Regions) -> None:
    server = serve(min_regions=2, patience=3.0)
    us, eu = region("us", server), region("eu", server)
    us.connect()
    us.join()
    assert us.expect(Welcome).needs_model
    eu.enter()
    assert "us is asked for the initial model" in server.events
    assert "eu is asked for the initial model" in server.events
    welcome = us.expect(Welcome)
    assert not welcome.needs_model
    us.index = welcome.member
    us.work()
    us.answer()


def test_a_member_that_lets_the_others_wait_for_the_end_is_refused_and_may_come_back(
    serve: Serve, region: Regions
) -> None:
    server = serve(workers=1)
    us, eu = region("us", server), region("eu", server)
    us.enter()
    us.work()
    us.answer()
    eu.enter()
    while not eu.is_stopped:
        eu.work()
        eu.answer()
    eu.flush()
    until(lambda: server.status()["members"]["eu"]["is_flushed"])
    for days in (1, 2):  # later
        now = time.monotonic() + 86400.0 * days
        server.server.host.act(lambda node, now=now: node.tick(now))  # type: ignore[misc]
    refusal = us.expect(Refusal)
    assert not refusal.for_good
    assert "for its last update" in refusal.reason
    assert "is refused: The others have waited" in server.events
    assert eu.final().position == 40
    us.connect()
    us.join()
    assert us.final().position == 40
    for one in (us, eu):
        one.goodbye()
    assert server.wait() == 0


def test_a_job_that_is_interrupted_while_it_waits_for_others_gives_up_its_place(serve: Serve, keys: Path) -> None:
    """As in a notebook: the cell is stopped and run again, in the same process."""
    server = serve(min_regions=2)
    settings = ServerSettings(Address("127.0.0.1", server.port), keys / "us.pem", 1)

    def stop_when_connected() -> None:
        if list(server.server.host._clients):
            raise KeyboardInterrupt

    for _ in range(2):
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        place = store, 0, Placement.build([0], 1), Topology.build([[0]], 1), False
        with pytest.raises(KeyboardInterrupt):
            Membership(settings, Site(*place, LIMIT, stop_when_connected))
        until(lambda: not list(server.server.host._clients))
    assert "is refused" not in server.events
