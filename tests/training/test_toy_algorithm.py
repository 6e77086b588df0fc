"""A new algorithm is one file: it is defined here, and it trains for real, is simulated, and is planned.

Nothing but this file knows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn

from lightning_halos import AlgorithmStrategy, SimulatedCluster
from lightning_halos.cli import main
from lightning_halos.core.algorithms import ALGORITHMS, ServerAlgorithm
from lightning_halos.core.delayed_nesterov import OptimizerFactory
from lightning_halos.planning.planner import make_timing, plan
from tests.integration.conftest import Run, run  # noqa: F401
from tests.integration.harness import Result
from tests.integration.toys import Toy, assert_trained, fit, loader, make_trainer


@dataclass(frozen=True, kw_only=True)
class Averaging(ServerAlgorithm):
    """Every server moves towards what it is sent, by an equal share for each sender, without momentum."""

    local_steps: int = 4
    dynamic_local_steps: bool = True

    @property
    def name(self) -> str:
        return "averaging"

    @property
    def title(self) -> str:
        return "Averaging"

    def period(self, workers: int) -> int:
        return 2 * workers

    def make_local_optimizer(self, workers: int, servers: int) -> OptimizerFactory:
        return partial(torch.optim.SGD, lr=1 / workers)

    def make_global_optimizer(self, servers: int) -> OptimizerFactory:
        return partial(torch.optim.SGD, lr=1 / servers)


CLUSTER = SimulatedCluster([[10.0, 0.1], [0.2, 10.0]], [[1.0, 0.5], [0.8, 0.25]], 100.0, message_bytes=1_000_000)


def trained() -> Result:
    return fit(Toy(), strategy=AlgorithmStrategy(Averaging(), regions=2, timeout=60), max_steps=20)


def test_it_trains_for_real(run: Run) -> None:  # noqa: F811
    assert_trained(run(trained), 20)


def test_it_is_simulated() -> None:
    strategy, module = AlgorithmStrategy(Averaging(), simulate=CLUSTER, timeout=60), Toy(nn.Linear(8, 1))
    module.pause = 0.0
    trainer = make_trainer(strategy, devices=1, max_steps=20)
    trainer.fit(module, loader())
    assert {event.kind for event in strategy.history} == {"push", "update", "merge", "end"}
    assert {event.server for event in strategy.history if event.kind == "push"} == {0, 1}
    assert 20 * 4 <= strategy.history[-1].steps <= 24 * 4


def test_it_is_planned() -> None:
    result = plan(Averaging(), make_timing(CLUSTER), hours=0.1)
    assert (result.algorithm, result.title) == ("averaging", "Averaging")
    assert result.local_steps.tolist() == [4, 2, 4, 1]
    assert result.accumulate_updates == (4, 4)
    assert result.updates is not None
    assert result.updates.count > 0


def test_a_line_in_the_table_gives_it_a_name_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ALGORITHMS, "averaging", Averaging)
    main(["plan", "--random-cluster", "2x2", "--hours", "0.1", "--algorithm", "averaging"])
    assert "averaging" in capsys.readouterr().out
