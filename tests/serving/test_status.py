"""The state of a run fits into a message, whatever the numbers of regions and workers."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from lightning_halos.core.founding import Founding
from lightning_halos.core.members import MemberState
from lightning_halos.core.messages import StatusReply
from lightning_halos.core.open_global_node import OpenGlobalNode
from lightning_halos.serving.dashboard import page
from lightning_halos.serving.host import RunHost
from lightning_halos.serving.report import table
from lightning_halos.serving.snapshots import SnapshotWriter
from lightning_halos.serving.status import Reporter
from lightning_halos.transport import wire
from tests.core.star import DESCRIPTION


def node_of(regions: int, workers: int, state: MemberState = MemberState.ACTIVE) -> OpenGlobalNode:
    """A node whose members have reported rounds of all their workers. Of worker 7, pushes were rejected."""
    node = OpenGlobalNode("a run", torch.zeros(2), DESCRIPTION, 1)
    for number in range(regions):
        member = node._members[node.index_of(f"region {number:05d} {'x' * 40}")]
        member.session, member.workers, member.state = "s" * 64, workers, state
        ranks = range(workers)
        counters = member.counters
        counters.applied, counters.staleness = dict.fromkeys(ranks, 12345), {rank: 10**6 + rank for rank in ranks}
        counters.computed, counters.waited = dict.fromkeys(ranks, 3.0), dict.fromkeys(ranks, 1.0)
        counters.rejected = {7: 5} if workers > 7 else {}
    return node


def reporter_of(node: OpenGlobalNode | Founding) -> Reporter:
    return Reporter(RunHost(node, 30.0), cast(SnapshotWriter, SimpleNamespace(last=None)), Path("runs/pile"), 1)


def received(text: str) -> dict[str, Any]:
    """What a peer gets."""
    reply = wire.decode(wire.encode(StatusReply(text)), None)
    assert isinstance(reply, StatusReply)
    return cast(dict[str, Any], json.loads(reply.text))


def test_a_region_with_100000_workers_is_as_large_as_one_with_10() -> None:
    few, many = (received(reporter_of(node_of(1, workers)).text()) for workers in (10, 100_000))
    (member,) = many["members"].values()
    assert len(json.dumps(many)) < len(json.dumps(few)) + 200
    assert len(member["outliers"]) == 8
    assert member["outliers"][0] == {
        "rank": 7,
        "rounds": 12350,
        "rejected": 5,
        "staleness": (10**6 + 7) / 12345,
        "round_seconds": 3.0,
    }
    assert [worker["rank"] for worker in member["outliers"][1:3]] == [99_999, 99_998], "the stalest"
    assert member["counters"]["compute_share"] == 0.75
    assert member["rejected"] == 5


def test_of_3000_regions_those_that_take_part_are_shown_and_the_others_are_counted() -> None:
    node = node_of(3000, 8, MemberState.LOST)
    for index in (5, 2999):
        node._members[index].state = MemberState.ACTIVE
    status = received(reporter_of(node).text())
    assert list(status["members"])[:2] == [node.name_of(5), node.name_of(2999)]
    assert len(status["members"]) == 300
    assert (status["left_out"], status["states"]) == (2700, {"active": 2, "lost": 2998})
    sentence = "2,700 more regions are not shown; of all regions, 2 active, 2,998 lost."
    assert sentence in table(status)
    assert sentence in page(status)


def test_names_of_metrics_do_not_make_it_too_large() -> None:
    node = node_of(300, 8)
    node._metrics = {f"{number} {chr(0x1F600) * 400}\0\0\0": 1.0 for number in range(2000)}
    status = received(reporter_of(node).text())
    assert len(status["run"]["metrics"]) == 200
    assert len(status["members"]) == 300


def test_numbers_that_json_does_not_have_are_null() -> None:
    """The loss of a run that diverged, and counters that a member has made overflow."""
    node = node_of(1, 8)
    node._metrics = {"val_loss": math.nan, "train_loss": math.inf, "accuracy": 0.5}
    node._members[0].counters.computed = {0: sys.float_info.max, 1: sys.float_info.max}

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    status = json.loads(reporter_of(node).text(), parse_constant=refuse)
    assert status["run"]["metrics"] == {"val_loss": None, "train_loss": None, "accuracy": 0.5}
    assert table(status)


def test_if_it_is_too_large_anyway_fewer_regions_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_halos.serving.status.MOST_CHARACTERS", 20_000)
    text = reporter_of(node_of(300, 8)).text()
    assert len(text) <= 20_000
    assert 0 < len(received(text)["members"]) < 20
    assert received(text)["left_out"] + len(received(text)["members"]) == 300


def test_the_speed_of_a_region_that_has_just_joined_is_that_since_it_joined() -> None:
    node = node_of(1, 4)
    reporter = reporter_of(node)
    for now in (0.0, 30.0):
        reporter.sample(now)
        node._members[0].counted += 300
    late = node._members[node.index_of("late")]
    late.session, late.workers, late.state = "s" * 64, 4, MemberState.ACTIVE
    speeds = []
    for now in (50.0, 55.0):
        reporter.sample(now)
        speeds.append([member["steps_per_second"] for member in reporter.describe()["members"].values()])
        late.counted += 200
    assert speeds == [[12.0, None], [pytest.approx(600 / 55), 40.0]]


def test_before_the_run_begins_it_is_the_same() -> None:
    status = received(reporter_of(Founding("a run")).text())
    assert (status["members"], status["left_out"], status["states"]) == ({}, 0, {})
