"""Random runs with faults: the nodes keep their promises, and a run that breaks one is found and can be seen again."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_halos.core.servers import LocalServer
from tests.chaos import command as chaos


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "lightning_halos")  # runs drop and repeat updates on purpose


def test_300_random_runs_with_faults_keep_every_promise() -> None:
    failed = {seed: fault for seed in range(300) if (fault := chaos.fault_of(seed)) is not None}
    assert not failed, "see one with: python -m tests.chaos --runs 1 --verbose --seed SEED"


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
