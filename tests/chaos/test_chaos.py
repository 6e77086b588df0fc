"""Random runs with faults: the nodes keep their promises, and a run that breaks one is found and can be seen again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_halos.core.cursor import Spans
from lightning_halos.core.leasing import Leasing
from lightning_halos.core.local_server import LocalServer
from lightning_halos.core.members import Member
from lightning_halos.core.messages import RegionUpdate
from lightning_halos.core.open_global_node import OpenGlobalNode
from lightning_halos.core.open_region_node import OpenRegionNode
from lightning_halos.core.protocol import Send
from tests.chaos import command as chaos


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "lightning_halos")  # runs drop and repeat updates on purpose


def test_300_random_runs_with_faults_keep_every_promise() -> None:
    failed = {seed: fault for seed in range(300) if (fault := chaos.fault_of(seed)) is not None}
    assert not failed, "see one with: python -m tests.chaos --runs 1 --verbose --seed SEED"


def test_200_random_stars_whose_members_and_server_come_and_go_keep_every_promise() -> None:
    failed = {seed: fault for seed in range(200) if (fault := chaos.fault_of(seed, star=True)) is not None}
    assert not failed, "see one with: python -m tests.chaos --star --runs 1 --verbose --seed SEED"


def test_stars_cover_what_can_happen() -> None:
    traces = []
    for seed in range(60):
        lines: list[str] = []
        chaos.fault_of(seed, lines.append, star=True)
        traces.append("\n".join(lines))
    faults = (
        "cut",
        "silence",
        "kill a member",
        "kill the server",
        "leave",
        "join",
        "publish",
        "is damaged",
        "revive",
        "hang",
        "let the others wait",
    )
    messages = ("Refusal(", "Decide(", "InitialModel(", "leave=True", "final=True", "lost=[(")
    for what in (*faults, "hang", "let the others wait", *messages):
        assert any(what in trace for trace in traces), what


def not_taken_back(node: OpenGlobalNode, member: Any, reports: Any) -> None:
    """A lost member's reports count though their update never arrives."""


def leases_forgotten(leasing: Leasing, member: Member) -> None:
    """The data of a lost member is never used."""
    member.open = Spans()


def kept_without_copy(node: OpenRegionNode, update: RegionUpdate) -> None:
    """The answer overwrites the update that may have to be repeated."""
    node._kept.append(update)


def awaits_nobody(leasing: Leasing, is_over: bool) -> list[Send]:
    """Data is leased before a restarted server knows what is leased."""
    leasing.awaited.clear()
    return lease(leasing, is_over)


lease = Leasing.lease
BUGS = [
    (OpenGlobalNode, "_take_back", not_taken_back),
    (Leasing, "return_all", leases_forgotten),
    (Leasing, "lease", awaits_nobody),
    (OpenRegionNode, "_keep", kept_without_copy),
]


@pytest.mark.parametrize(("node", "rule", "broken"), BUGS, ids=[rule for _, rule, _ in BUGS])
def test_a_star_that_breaks_a_rule_is_found(
    monkeypatch: pytest.MonkeyPatch, node: type, rule: str, broken: Callable[..., Any]
) -> None:
    monkeypatch.setattr(node, rule, broken)
    assert any(chaos.fault_of(seed, star=True) is not None for seed in range(200))


def test_they_cover_what_can_happen() -> None:
    traces = []
    for seed in range(60):
        lines: list[str] = []
        chaos.fault_of(seed, lines.append)
        traces.append("\n".join(lines))
    for what in ("publish", "stop", "lose a worker", "restart", "is complete", "nan", "RegionModel", "LeaseGrant"):
        assert any(what in trace for trace in traces), what


def test_a_seed_is_always_the_same_run() -> None:
    first: list[str] = []
    second: list[str] = []
    for lines in (first, second):
        assert chaos.fault_of(7, lines.append) is None
    assert first == second
    assert len(first) > 100


def test_a_failing_seed_is_printed_with_its_reason_and_fails_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    apply = LocalServer.apply

    def apply_twice(server: LocalServer, vector: Tensor, is_accepted: bool, *answer: Any) -> None:
        apply(server, vector.clone(), is_accepted, torch.empty_like(server.model))
        apply(server, vector, is_accepted, *answer)

    monkeypatch.setattr(LocalServer, "apply", apply_twice)
    assert chaos.main(["--runs", "20"]) == 1
    failures = [line for line in capsys.readouterr().out.splitlines() if line.startswith("seed ")]
    seed = failures[0].split()[1]
    assert chaos.main(["--runs", "1", "--seed", seed, "--verbose"]) == 1
    output = capsys.readouterr().out
    assert failures[0] in output.splitlines()
    assert "Push(worker=" in output, "the trace of events"


def test_without_a_failure_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert chaos.main(["--runs", "3"]) == 0
    assert "3 runs, 0 failed" in capsys.readouterr().out
