"""The servers' default settings, by the topology and the length of the run."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_halos.core import run_length
from lightning_halos.core.algorithms import AsyncLocalSGD, Diloco, Halos
from lightning_halos.core.algorithms.defaults import PUBLISHED_STEPS
from lightning_halos.core.delayed_nesterov import DelayedNesterov, OptimizerFactory
from lightning_halos.core.description import global_rates
from lightning_halos.core.topology import ServerGroup
from tests.core.star import DESCRIPTION

FOUR_BY_FOUR = [ServerGroup(r, r, tuple(range(4 * r, 4 * r + 4))) for r in range(4)]


def values(factory: OptimizerFactory) -> tuple[float, ...]:
    """Rate, momentum and delay (1 without one) of an optimizer."""
    group: dict[str, Any] = factory([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    return pytest.approx((group["lr"], group["momentum"], group.get("delay", 1)))  # type: ignore[return-value]


@pytest.mark.parametrize(
    "length", [{"global_steps": PUBLISHED_STEPS}, {"global_steps": 10**6}, {"defaults": "published"}, {}]
)
def test_runs_as_long_as_the_papers_have_its_values(length: Any) -> None:
    halos = Halos(**length)
    assert (halos.period(4), halos.global_weight()) == (32, 0.25)
    assert values(halos.make_local_optimizer(4, 4)) == (0.2, 0.9, 16)
    assert values(halos.make_global_optimizer(4)) == (0.15, 0.5, 2)
    assert values(AsyncLocalSGD(**length).make_local_optimizer(16, 1)) == (0.05, 0.9, 32)
    assert values(Diloco(**length).make_outer_optimizer()) == (0.7, 0.9, 1)


@pytest.mark.parametrize(("steps", "per_worker"), [(50, 1), (300, 1), (600, 2), (1000, 3), (3000, 8)])
def test_short_runs_have_no_momentum_and_frequent_exchanges(steps: int, per_worker: int) -> None:
    halos = Halos(global_steps=steps)
    assert halos.period(4) == 4 * per_worker
    assert 0.37 < halos.global_weight() <= 0.5
    assert values(halos.make_local_optimizer(4, 4)) == (0.25, 0, 1)
    assert values(halos.make_global_optimizer(4)) == (2.2 / 4, 0, 1)
    assert values(AsyncLocalSGD(global_steps=steps).make_local_optimizer(16, 1)) == (1 / 16, 0, 1)
    assert values(Diloco(global_steps=steps).make_outer_optimizer()) == (0.7, 0.6, 1)


@pytest.mark.parametrize(("servers", "total"), [(1, 1.0), (2, 1.4), (3, 1.8), (4, 2.2), (10, 2.2)])
def test_the_rates_of_several_servers_sum_to_more_than_1(servers: int, total: float) -> None:
    assert values(Halos(global_steps=600).make_global_optimizer(servers)) == (total / servers, 0, 1)


def test_values_change_steadily_with_the_length() -> None:
    between = Halos(global_steps=4608)
    assert values(between.make_local_optimizer(4, 4)) == (0.9 / 4, 0.45, 16)
    assert values(between.make_global_optimizer(4)) == (1.4 / 4, 0.25, 2)


def test_what_counts_is_the_number_of_rounds() -> None:
    short = Halos(global_steps=600, local_steps=4)
    assert short.period(4) == Halos(global_steps=1200).period(4)


def test_given_values_stay_and_so_does_no_momentum_for_lbfgs() -> None:
    given = Halos(global_steps=100, accumulate_updates=5, merge_weight=0.1, defaults="published")
    assert (given.period(4), given.global_weight()) == (5, 0.1)
    assert values(Halos(defaults="published", has_momentum=False).make_local_optimizer(4, 4)) == (0.25, 0, 1)


def test_a_bad_choice_of_defaults_is_refused() -> None:
    with pytest.raises(ValueError, match=r"defaults='paper' must be 'run' \(for the length"):
        Halos(defaults="paper")  # type: ignore[arg-type]


def test_a_global_server_of_its_own_has_the_same_values() -> None:
    settings = DESCRIPTION.settings | {"local_steps": 8}

    def rates(**more: Any) -> dict[str, Any]:
        return global_rates(replace(DESCRIPTION, settings=settings | more, global_optimizer=None), 4)

    assert rates(defaults="run", global_steps=600) == {"lr": pytest.approx(2.2 / 4), "momentum": 0.0, "delay": 1}
    assert rates(defaults="published", global_steps=600)["momentum"] == 0.5
    assert rates()["momentum"] == 0.5  # of a run that an earlier version began


def test_a_summary_names_what_was_chosen_and_not_what_was_given() -> None:
    algorithm = Halos(global_steps=600, merge_weight=0.3, local_optimizer=DelayedNesterov)
    assert run_length.summary(algorithm, FOUR_BY_FOUR) == (
        "HALoS, defaults for 600 global steps: accumulate_updates 8, global_optimizer 0.55/0/1 (lr/momentum/delay)."
    )
    unknown = run_length.summary(algorithm, FOUR_BY_FOUR, reason="the length of this run is unknown")
    assert unknown.startswith("HALoS, defaults for 600 global steps (the length of this run is unknown): accum")
    published = run_length.summary(replace(algorithm, defaults="published"), FOUR_BY_FOUR, reason="unknown")
    assert published.startswith("HALoS, defaults for a long run: accum")
    assert run_length.summary(Diloco(global_steps=600), FOUR_BY_FOUR).endswith("outer_optimizer 0.7/0.6 (lr/momentum).")


def test_a_run_that_is_too_short_for_its_settings_says_what_to_lower() -> None:
    few, local, _ = run_length.shortcomings(Halos(defaults="published", global_steps=150), FOUR_BY_FOUR, 150)
    assert (
        "gets about 75 pushes, and exchanges with the global server 2.3 times. Lower accumulate_updates to 12." in few
    )
    single = Halos(local_steps=8, accumulate_updates=1, global_steps=5)
    assert "gets about 2.5 pushes, and exchanges with the global server 2.5 times." in "".join(
        run_length.shortcomings(single, FOUR_BY_FOUR, 5)
    )
    assert "momentum 0.9 of local_optimizer, which adds up about 160 updates: the server gets about 75." in local
    (outer,) = run_length.shortcomings(Diloco(defaults="published", global_steps=600), FOUR_BY_FOUR, 600)
    assert "outer_optimizer" in outer


@pytest.mark.parametrize("steps", [30, 100, 300, 1000, 3000, 4000, 6144, 100_000])
def test_defaults_never_draw_a_warning(steps: int) -> None:
    for algorithm in (Halos(global_steps=steps), AsyncLocalSGD(global_steps=steps), Diloco(global_steps=steps)):
        groups = FOUR_BY_FOUR if isinstance(algorithm, Halos) else FOUR_BY_FOUR[:1]
        assert not run_length.shortcomings(algorithm, groups, steps)


def test_functions_that_need_the_parameters_of_the_module_are_left_alone() -> None:
    def with_rates(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": p, "lr": rate} for p, rate in zip(params, (0.1, 0.2), strict=True)])

    algorithm = Halos(global_steps=100, local_optimizer=with_rates)
    groups = algorithm.arrange([[0, 1], [2, 3]]).groups
    assert "local_optimizer" not in run_length.summary(algorithm, groups)
    assert run_length.shortcomings(algorithm, groups, 100) == []


@pytest.mark.parametrize(
    ("steps", "local_steps", "remedy"),
    [(30, 8, "Lower accumulate_updates to 1."), (8, 8, "Lower local_steps to 2, or"), (2, 1, "Train longer.")],
)
def test_a_warning_names_what_helps(steps: int, local_steps: int, remedy: str) -> None:
    algorithm = Halos(local_steps=local_steps, accumulate_updates=16)
    (text, *_) = run_length.shortcomings(algorithm, algorithm.arrange([[0, 1], [2, 3]]).groups, steps)
    assert remedy in text
