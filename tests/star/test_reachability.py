"""Regions only dial out: what a star needs of the network, and what it says when the network does not give it."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from lightning_halos.transport import certificates
from tests.star.evidence import Evidence
from tests.star.network import Network, inhabitants, needs_namespaces
from tests.star.processes import Starter, wait_until
from tests.star.roles import Task
from tests.star.star import Star

pytestmark = needs_namespaces

PORT = 29600
TASK = Task()
LIMIT = 120.0


def test_two_regions_behind_one_nat_and_a_server_with_one_open_port(
    net: Network, starter: Starter, tmp_path: Path
) -> None:
    there = net.place("server")
    net.open_only(there, PORT)
    office, address = net.office("office", there, PORT)
    net.dials_only(office, PORT)
    star = Star(starter, tmp_path, TASK, [there.ipv4, office.ipv4], ["one", "two"])
    server = star.server("--min-regions", "2", listen=f"0.0.0.0:{PORT}", place=there)
    jobs = [star.job(name, f"{address}:{PORT}", net.place(name, ipv6=False, behind=office)) for name in ("one", "two")]
    for party in (server, *jobs):
        party.start()
    evidence = star.wait(server, jobs, LIMIT)
    assert_complete(evidence, [worker for job in jobs for worker in job.workers])
    star.assert_keys_are_hidden()
    assert not any(inhabitants(place.namespace) for place in net.places if place is not office)


def test_an_ipv6_only_and_an_ipv4_only_region(net: Network, starter: Starter, tmp_path: Path) -> None:
    """The server has both, and its name gives both addresses to regions that have one of the two."""
    there = net.place("server")
    star = Star(starter, tmp_path, TASK, ["halos.test"], ["old", "new"])
    server = star.server("--min-regions", "2", listen=f":{PORT}", place=there)
    places = {"old": net.place("old", ipv6=False), "new": net.place("new", ipv4=False)}
    for place in places.values():
        place.hosts(("halos.test", there.ipv6), ("halos.test", there.ipv4))
    jobs = [star.job(name, f"halos.test:{PORT}", place) for name, place in places.items()]
    for party in (server, *jobs):
        party.start()
    evidence = star.wait(server, jobs, LIMIT)
    assert_complete(evidence, [worker for job in jobs for worker in job.workers])


def assert_complete(evidence: Evidence, workers: list[str]) -> None:
    """A run without faults did what was ordered, and no more."""
    evidence.assert_used_once(TASK.epochs, TASK.samples)
    evidence.assert_same_step(workers, TASK.steps // len(workers))
    evidence.assert_same_model(workers)


def test_errors_name_address_interface_and_remedy(
    net: Network, starter: Starter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each region cannot join for a reason of its own, and says so within its ``timeout``."""
    timeout = 8.0
    there = net.place("server")
    net.open_only(there, PORT)
    good, names = f"{there.ipv4}:{PORT}", ["firewall", "port", "here", "unknown", "family", "other", "early", "late"]
    star = Star(starter, tmp_path, replace(TASK, timeout=timeout), [there.ipv4, "halos.test"], names[:-2])
    # As on machines whose clocks are a day behind, and a year ahead of, that of the machine where the keys were made.
    for name, days in ("early", 1), ("late", -366):
        then = datetime.now(timezone.utc) + timedelta(days=days)
        with monkeypatch.context() as patch:
            patch.setattr(certificates, "_now", lambda then=then: then)
            star.make_keys(name)
    places = {name: net.place(name, ipv6=name == "family", ipv4=name != "family") for name in names}
    places["here"].hosts(("halos.test", "127.0.1.1"))
    places["other"].hosts(("elsewhere.test", there.ipv4))
    expected = {
        "firewall": (
            f"{there.ipv4}:{PORT + 1}",
            [f"{there.ipv4}:{PORT + 1}", "eth0", places["firewall"].ipv4, "firewall"],
        ),
        "port": (
            f"{places['firewall'].ipv4}:{PORT}",
            ["eth0", places["port"].ipv4, f"timeout={timeout:g}", "nothing listens", "--listen"],
        ),
        "here": (f"halos.test:{PORT}", ["127.0.1.1", "lo", "/etc/hosts"]),
        "unknown": (f"nowhere.test:{PORT}", ["nowhere.test", "DNS"]),
        "family": (good, [good, "no way from this machine"]),
        "early": (good, ["early.pem", "not valid yet", "clock", "date -u"]),
        "late": (good, ["late.pem", "has expired", "keys region FOLDER late --replace", "clock", "date -u"]),
        "other": (f"elsewhere.test:{PORT}", [good, "eth0", places["other"].ipv4, "elsewhere.test", "--host"]),
    }
    server = star.server(listen=f":{PORT}", place=there)
    server.start()
    wait_until(lambda: "isten" in starter.log("server"), LIMIT, starter.logs)
    jobs = [star.job(name, expected[name][0], places[name]) for name in names]
    for job in jobs:
        job.start()
    wait_until(lambda: all(job.has_ended() for job in jobs), timeout + LIMIT, starter.logs)
    for job in jobs:
        message = starter.log(job.workers[0]).splitlines()[-1]
        assert job.codes() == [1, 1], message
        for word in expected[job.name][1]:
            assert word in message, f"{word!r} is missing in what {job.name} says: {message}"
        assert message.split(": ")[-1] in starter.log(job.workers[1]), "the other worker does not say why"
    assert server.pids(), starter.log("server")
    assert not starter.left()
