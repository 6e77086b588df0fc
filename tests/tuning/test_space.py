"""What is searched, and what its values mean."""

from __future__ import annotations

import math
from functools import partial
from random import Random

import pytest
import torch

from lightning_halos.core.algorithms import Algorithm, AsyncLocalSGD, Diloco, Halos, SyncSGD
from lightning_halos.planning.pace import pace_of
from lightning_halos.planning.planner import make_timing
from lightning_halos.planning.settings import make_arguments
from lightning_halos.planning.stability import servers_of
from lightning_halos.simulation.cluster import SimulatedCluster
from tests.simulation.paper import PAPER

pytest.importorskip("optuna")
from lightning_halos.tuning.goal import Goal, Point
from lightning_halos.tuning.report import describe_settings, make_table
from lightning_halos.tuning.space import Choice, Number, Space
from lightning_halos.tuning.study import Tried
from lightning_halos.tuning.trial import VALIDATIONS, fitting

TIMING = make_timing(PAPER)
ONE_REGION = make_timing(SimulatedCluster([[100.0]], [[1.0, 0.5, 0.7]], step_ms=100, message_bytes=1000))


@pytest.mark.parametrize("algorithm", [Halos(), AsyncLocalSGD(), Diloco(), Halos(overlap=True, wire="int4")])
@pytest.mark.parametrize("timing", [TIMING, ONE_REGION], ids=["paper", "one region"])
def test_the_start_means_the_settings_that_it_comes_from(algorithm: Algorithm, timing: object) -> None:
    space = Space(algorithm, timing, {})
    again = space.algorithm(space.settings(space.start))
    before, after = servers_of(algorithm, timing), servers_of(again, timing)
    assert (again.local_steps, again.dynamic_local_steps) == (algorithm.local_steps, algorithm.dynamic_local_steps)
    for one, other in zip([*before.local, before.outer], [*after.local, after.outer], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert other.lr == pytest.approx(one.lr, rel=2e-3)
            assert (other.momentum, other.delay) == (one.momentum, one.delay)


def test_only_what_has_an_effect_is_searched() -> None:
    server = {"gain", "memory", "window"}
    halos = {"local_steps", "pushes_per_worker", "merge_weight", "wire_between"}
    assert Space(Halos(), TIMING, {}).parameters.keys() == halos | {
        f"{where}_{name}" for where in ("local", "global") for name in server
    }
    assert Space(Halos(), ONE_REGION, {}).parameters.keys() == {"local_steps"} | server
    assert {"overlap", "wire_within"} <= Space(Halos(local_steps=1), _slow(), {}).parameters.keys()
    assert Space(Diloco(), TIMING, {}).parameters.keys() == {"local_steps", "dynamic_local_steps", "gain", "memory"}
    fixed = Space(Halos(), TIMING, {"local_steps": 4, "global_optimizer": None, "wire": "int4"})
    assert not {"local_steps", "global_gain", "wire_between"} & fixed.parameters.keys()
    assert fixed.settings(fixed.start)["local_steps"] == 4
    one_link = Space(Halos(servers_per_region=2), ONE_REGION, {"servers_per_region": 2}).parameters
    assert "merge_weight" in one_link
    assert "wire_between" not in one_link
    assert "wire_between" in Space(AsyncLocalSGD(), TIMING, {}).parameters
    with pytest.raises(ValueError, match="no settings to tune"):
        Space(SyncSGD(local_steps=1, dynamic_local_steps=False), TIMING, {})


def _slow() -> object:
    return make_timing(SimulatedCluster([[1.0, 0.1], [0.1, 1.0]], [[1.0], [1.0]], step_ms=10, message_bytes=10**6))


def test_the_gain_is_apart_from_the_momentum() -> None:
    space = Space(Halos(), TIMING, {})
    values = {**space.start, "local_gain": 1.0}
    for memory, momentum, rate in ((-1.0, 0.0, 0.25), (0.0, 0.0, 0.25), (1.0, 0.5, 0.125), (2.0, 0.75, 0.0625)):
        settings = space.settings({**values, "local_memory": memory})["local_optimizer"]["init_args"]
        assert (settings["momentum"], settings["lr"]) == (momentum, pytest.approx(rate, rel=5e-3))
        assert settings["delay"] == (16 if momentum else 1)
    memory = space.parameters["local_memory"]
    assert 0.25 < -memory.low / (memory.high - memory.low) < 0.4, "a fair share is without momentum"


def test_ranges_include_the_start() -> None:
    assert Number(1, 64).including(100.0) == Number(1, 100)
    assert Choice(("float32", "int4")).including("bfloat16").values == ("float32", "int4", "bfloat16")
    assert Space(Halos(local_steps=200), TIMING, {}).parameters["local_steps"].high == 200


@pytest.mark.parametrize("local_steps", [1, 8])
def test_the_defaults_have_values_too(local_steps: int) -> None:
    """Also if they would not vary all that the start does, or are outside of the usual ranges."""
    start, defaults = Halos(local_steps=local_steps), Halos(local_steps=8, overlap=False, global_steps=6144)
    space = Space(start, TIMING, {}, {"local_steps": local_steps}, defaults)
    values = space.defaults
    assert values is not None
    assert values.keys() == space.parameters.keys() == space.start.keys()
    for name, parameter in space.parameters.items():
        assert parameter.including(values[name]) == parameter
    assert space.algorithm({}) == defaults
    again = space.algorithm(space.settings(values))
    assert (again.local_steps, again.overlap, again.wire) == (8, False, defaults.wire)
    assert [rule.lr for rule in servers_of(again, TIMING).local] == pytest.approx([0.2] * 4)


def test_defaults_with_other_servers_than_the_start_have_no_values() -> None:
    space = Space(Halos(servers_per_region=2), ONE_REGION, {}, {"servers_per_region": 2}, Halos())
    assert space.defaults is None


def test_variations_stay_in_the_ranges() -> None:
    space, random = Space(Halos(), TIMING, {}), Random(0)
    values, changes = space.start, []
    for _ in range(200):
        varied = space.near(values, random)
        changes.append(sum(varied[name] != values[name] for name in values))
        values = varied
        for name, parameter in space.parameters.items():
            assert parameter.including(values[name]) == parameter
        assert isinstance(values["local_steps"], int)
    assert 2 < sum(changes) / len(changes) < 5


def test_what_diverges_or_takes_too_long_is_left_out() -> None:
    space = Space(Halos(), TIMING, {})
    assert space.objection(space.settings(space.start), 250) is None
    assert space.objection(space.settings(space.averaging), 250) is None
    assert space.objection(space.settings({**space.start, "local_gain": 400.0}), 250) == "unstable"
    assert "global steps" in space.objection(space.settings(space.start), 2)
    assert "exchanges" in space.objection(space.settings({**space.start, "pushes_per_worker": 200}), 250)


@pytest.mark.parametrize("algorithm", [Halos(), Halos(local_steps=4), AsyncLocalSGD(), Diloco(), SyncSGD()])
def test_the_pace_agrees_with_the_benchmark(algorithm: Algorithm) -> None:
    """The virtual hours in ``docs/time_to_loss``, where runs of 600 steps were simulated."""
    hours = {"halos": 0.068761, "async_local_sgd": 0.1163, "diloco": 0.512397, "sync_sgd": 5.882196}[algorithm.name]
    if algorithm.local_steps == 4:
        hours = 0.069984
    pace = pace_of(algorithm, TIMING)
    assert pace.seconds(600) / 3600 == pytest.approx(hours, rel=0.01 if algorithm.name != "async_local_sgd" else 0.05)
    for steps in (20, 31, 32, 33, 600):
        assert pace.steps(pace.seconds(steps)) in (steps, steps - 1)


def test_validations_end_with_the_run() -> None:
    for steps in range(12, 2000):
        rounded, every = fitting(steps)
        assert rounded % every == 0
        assert rounded > (0.95 if steps < 200 else 0.975) * steps
        assert rounded / every >= 0.7 * min(VALIDATIONS, steps)


def test_goals() -> None:
    curve = [Point(10, 100.0, 3.0), Point(20, 200.0, 2.0), Point(30, 300.0, 2.5)]
    loss = Goal(300.0)
    assert (loss.at(curve, 1 / 2), loss.at(curve[:1], 1 / 2), loss.value(curve)) == (2.5, None, 2.5)
    time = Goal(300.0, target=2.5)
    assert time.value(curve) == pytest.approx(150)
    assert (time.is_reached(curve[:1]), time.is_reached(curve[:2])) == (False, True)
    missed = Goal(300.0, target=1.0)
    assert missed.value(curve) == pytest.approx(600)
    assert missed.describe(missed.value(curve)) == "not reached (100.0% off)"
    assert time.describe(time.value(curve)) == "0.04167 h"
    high = Goal(300.0, mode="max")
    assert (high.value(curve), high.describe(high.value(curve))) == (-2.5, "2.5")
    assert Goal(300.0, mode="max", target=2.2).value([Point(1, 100, 2.0), Point(2, 200, 2.4)]) == pytest.approx(150)
    assert not math.isnan(missed.value(curve[:1]))


def test_a_table_counts_the_trials() -> None:
    trial = Tried(0, "failed", {}, {}, None, [], 1.0, "", "")
    for trials, ends in (
        ([], "No trial has ended."),
        ([trial], "1 trial: 1 failed."),
        ([trial] * 2, "2 trials: 2 failed."),
    ):
        assert ends in make_table(Goal(300.0), trials, {}, {}, {})


def test_settings_to_start_from_that_are_not_varied_stay() -> None:
    kept = {"servers_per_region": 2, "max_norm_ratio": 10, "overlap": True, "wire": "int4"}
    algorithm = Halos(**kept)
    space = Space(algorithm, TIMING, {}, kept)
    for values in (space.start, space.averaging):
        assert space.complete(space.settings(values), values) == space.settings(values)
        made = Halos(**make_arguments(Halos, space.settings(values)))
        for name in ("servers_per_region", "max_norm_ratio", "overlap", "wire"):
            assert getattr(made, name) == getattr(algorithm, name), name


def test_what_is_noted_of_servers_of_different_sizes_is_what_is_trained() -> None:
    """Their defaults are one per server, and what is searched is one for all of them."""
    unequal = make_timing(SimulatedCluster([[10.0, 1.0], [1.0, 10.0]], [[1.0] * 7, [1.0]], 100, 10_000_000))
    space = Space(Halos(global_steps=600), unequal, {})
    assert space.common == ("accumulate_updates", "local_optimizer")
    assert (space.start["local_gain"], space.start["pushes_per_worker"]) == (1.0, 2.0)
    noted = space.complete({}, space.start)
    assert not {"local_optimizer", "accumulate_updates"} & noted.keys()
    assert {"local_steps", "merge_weight", "global_optimizer"} <= noted.keys()
    same = space.settings(space.start)
    assert (same["local_optimizer"]["init_args"]["lr"], same["accumulate_updates"]) == (0.25, 8)
    assert space.complete(same, space.start) != noted, "they are not tried already"
    given = {"accumulate_updates": 6, "local_optimizer": same["local_optimizer"]}
    again = Space(Halos(**make_arguments(Halos, given)), unequal, {}, given)
    assert again.complete(given, again.start) == again.settings(again.start)
    assert again.settings(again.start)["accumulate_updates"] == 6
    assert again.settings(again.start)["local_optimizer"] == same["local_optimizer"]
    assert not Space(Halos(), TIMING, {}).common
    fixed = {"accumulate_updates": 6, "local_optimizer": None}
    assert not Space(Halos(accumulate_updates=6), unequal, fixed).common


@pytest.mark.parametrize(
    ("arguments", "error"),
    [({"lr": 0.0}, "outer_optimizer has lr=0, "), ({"lr": 0.1, "momentum": 1.0}, "outer_optimizer has momentum=1, ")],
    ids=str,
)
def test_a_server_that_no_values_mean_is_refused_by_name(arguments: dict[str, float], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Space(Diloco(outer_optimizer=partial(torch.optim.SGD, **arguments)), TIMING, {})


def test_settings_are_described_in_a_line() -> None:
    optimizers = {
        "local_optimizer": {"class_path": "lightning_halos.DelayedNesterov", "init_args": {"lr": 0.5, "delay": 2}},
        "global_optimizer": {"class_path": "lightning_halos.DelayedNesterov", "init_args": None},
        "outer_optimizer": {"class_path": "torch.optim.SGD"},
    }
    text = describe_settings({"local_steps": 4, **optimizers, "wire": {"between": "int4"}})
    assert text == "H 4, local 0.5/0/2, global by default, outer by default, wire between int4"
