"""The host of a region's server, which a job's main thread asks for numbers while workers push."""

from __future__ import annotations

import threading

import pytest

from lightning_halos.core.counters import ServerCounters
from lightning_halos.core.messages import Progress
from lightning_halos.core.protocol import GLOBAL, Send
from lightning_halos.training.worlds.member import MemberWorld
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.link import LoopbackLink
from lightning_halos.transport.member_host import MemberHost
from tests.core.star import Star


def report(number: int) -> Progress:
    return Progress(0, number, number, steps=1, seconds=1.0, waited=0.0, fastest=1.0, staleness=0)


def test_a_worker_may_report_for_the_first_time_while_the_counters_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Star().job("us", workers=3)
    assert job.node is not None
    assert job.joining.welcome is not None
    host = MemberHost(job.node, Alarm("rank 0"), (), None, job.joining.welcome)
    host.attach(GLOBAL, *LoopbackLink.pair("the server", "rank 0"))
    host._post([Send(GLOBAL, report(1))])

    def add() -> None:
        with host.locked():
            host._post([Send(GLOBAL, report(2))])

    threads = [threading.Thread(target=add, daemon=True)]
    rounds_of = ServerCounters.rounds_of

    def slowly(counters: ServerCounters, worker: int) -> int:
        while threads:
            thread = threads.pop()
            thread.start()
            thread.join(0.5)
        return rounds_of(counters, worker)

    monkeypatch.setattr(ServerCounters, "rounds_of", slowly)
    world = MemberWorld.__new__(MemberWorld)
    world._host = host
    assert [set(server["rounds"]) for server in world.statistics()] == [{1}]
