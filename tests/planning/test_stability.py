"""What the check calls stable converges in a simulation, and what it calls unstable diverges."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_halos.cli import main
from lightning_halos.core.algorithms import Algorithm, AsyncLocalSGD, Diloco, Halos, SyncSGD
from lightning_halos.core.wire_formats import WireFormats
from lightning_halos.planning.planner import make_timing
from lightning_halos.planning.settings import read_settings
from lightning_halos.planning.stability import ALONE, check, events_of, is_stable
from lightning_halos.simulation.cluster import SimulatedCluster
from tests.planning.quadratics import compare, draw, nesterov, summary
from tests.simulation.paper import PAPER, PAPER_FILE


def alike(workers: int) -> SimulatedCluster:
    return SimulatedCluster([[100.0]], [[1.0] * workers], step_ms=100, message_bytes=1000)


class TestAgainstFormulas:
    @pytest.mark.parametrize("workers", [1, 2, 4, 7])
    @pytest.mark.parametrize("lr", [1.0, 0.5])
    def test_stale_updates_without_momentum(self, workers: int, lr: float) -> None:
        """Of n equal workers each push is n - 1 versions old: z^n - z^(n-1) + lr x = 0."""
        algorithm = Halos(local_steps=1, local_optimizer=nesterov(lr))
        limit = check(algorithm, make_timing(alike(workers))).limit
        assert limit == pytest.approx(min(ALONE, 2 * math.sin(math.pi / (2 * (2 * workers - 1))) / lr), rel=0.01)

    @pytest.mark.parametrize("beta", [0.3, 0.9])
    def test_nesterov_momentum_of_one_worker(self, beta: float) -> None:
        """z^2 - (1 + beta) (1 - x) z + beta (1 - x) = 0, for x = lr * rate."""
        algorithm = Halos(local_steps=1, local_optimizer=nesterov(1.0, beta))
        limit = check(algorithm, make_timing(alike(1))).limit
        assert limit == pytest.approx(2 * (1 + beta) / (1 + 2 * beta), rel=0.01)

    def test_heavy_ball_momentum_of_synchronous_rounds(self) -> None:
        """A round of H steps leaves (1 - x)^H of an error: z^2 - (1 + beta - lr c) z + beta = 0."""
        outer = partial(torch.optim.SGD, lr=2.5, momentum=0.2)
        limit = check(Diloco(local_steps=3, outer_optimizer=outer), make_timing(alike(3))).limit
        contraction = 2 * (1 + 0.2) / 2.5
        assert 1 - (1 - limit) ** 3 == pytest.approx(contraction, rel=0.01)

    @pytest.mark.parametrize("algorithm", [AsyncLocalSGD, Diloco])
    @pytest.mark.parametrize("lr", [3.0, 2.5])
    def test_growth_in_a_run_of_few_events(self, algorithm: Any, lr: float) -> None:
        """One worker, one step per round, no momentum: each round multiplies the error by 1 - lr at the rate 1 / L."""
        name = "optimizer" if algorithm is AsyncLocalSGD else "outer_optimizer"
        steep = algorithm(local_steps=1, **{name: partial(torch.optim.SGD, lr=lr)})
        assert check(steep, make_timing(alike(1))).growth == pytest.approx(lr - 1, rel=1e-3)


@pytest.mark.parametrize("settings", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_what_is_called_unstable_diverges_and_what_is_called_stable_does_not(settings: int) -> None:
    counts = summary([compare(seed) for seed in range(settings)])
    wrong = counts["called stable, but diverging"] + counts["called unstable, but not diverging"]
    assert 0.1 < counts["called unstable"] / counts["in all"] < 0.9
    assert wrong <= 0.03 * counts["in all"]
    assert counts["wrong although the growth per round is more than 0.02 from 1"] == 0


def test_slow_momentum_is_unstable_at_low_rates_only() -> None:
    """In long runs errors grow at rates from about 0.002 to 0.045, by less than 1 % per round."""
    slow = partial(nesterov, momentum=0.9, delay=5)
    algorithm = Halos(
        local_steps=1,
        accumulate_updates=2,
        merge_weight=0.25,
        local_optimizer=slow(0.987),
        global_optimizer=slow(0.3),
    )
    links, speeds = [[100.0, 0.43554806], [0.43554806, 100.0]], [[0.1456075], [0.8238742]]
    timing = make_timing(SimulatedCluster(links, speeds, step_ms=238.391, message_bytes=100_000))
    verdict = check(algorithm, timing, 0.001)
    assert verdict.is_stable
    assert 0.0015 < verdict.limit < 0.003
    assert not is_stable(algorithm, timing)


@pytest.mark.parametrize("seed", [4, 25])
def test_what_is_stable_up_to_a_rate_is_stable_at_all_rates_below(seed: int) -> None:
    algorithm, timing = draw(seed)[0], make_timing(draw(seed)[1])
    limit = check(algorithm, timing).limit
    for rate in (0.0024, 1.0):
        verdict = check(algorithm, timing, rate)
        assert verdict.is_stable == is_stable(algorithm, timing, rate) == (verdict.limit >= rate) == (limit >= rate)


@pytest.fixture
def cluster(tmp_path: Path) -> str:
    """Two regions of two workers."""
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "{bandwidths: [[10, 1], [1, 10]], worker_speeds: [[1, 0.5], [0.8, 0.9]], step_ms: 100, message_bytes: 1000000}"
    )
    return str(path)


def write(folder: Path, settings: object) -> str:
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def optimizer(**arguments: float) -> dict[str, object]:
    return {"class_path": "lightning_halos.DelayedNesterov", "init_args": arguments}


STEEP = {
    "local_steps": 8,
    "accumulate_updates": 8,
    "timeout": 60,
    "local_optimizer": optimizer(lr=2.0, momentum=0.9, delay=4),
    "global_optimizer": optimizer(lr=0.25, momentum=0.0, delay=1),
}


class TestCommand:
    def test_the_settings_of_the_paper_are_stable(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["check", write(tmp_path, {}), str(PAPER_FILE)]) == 0
        out = capsys.readouterr().out
        assert "HALoS with 16 workers: 1 to 8 local steps per round" in out
        assert "staleness: 3.00 versions for a push" in out
        assert "The inner rate 1 / L is stable." in out

    def test_one_worker_is_called_one(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        alone = tmp_path / "alone.yaml"
        alone.write_text("{bandwidths: [[9]], worker_speeds: [[1]], step_ms: 5, message_bytes: 1}")
        assert main(["check", write(tmp_path, {}), str(alone)]) == 0
        assert "HALoS with 1 worker: 8 local steps" in capsys.readouterr().out

    def test_it_says_which_setting_to_lower_and_that_helps(
        self, tmp_path: Path, cluster: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["check", write(tmp_path, STEEP), cluster]) == 1
        out = capsys.readouterr().out
        assert "errors grow" in out
        (line,) = [line for line in out.splitlines() if line.startswith("  local_optimizer: lr to ")]
        lower = float(line.rpartition(" ")[2])
        assert 0.02 < lower < 1
        settings = {**STEEP, "local_optimizer": optimizer(lr=lower, momentum=0.9, delay=4)}
        assert main(["check", write(tmp_path, settings), cluster]) == 0

    def test_an_inner_rate_and_a_curvature_may_be_given(
        self, tmp_path: Path, cluster: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = write(tmp_path, STEEP)
        assert main(["check", path, cluster, "--inner-rate", "0.0001", "--curvature", "10"]) == 0
        assert "The inner rate 0.0001 is stable." in capsys.readouterr().out
        assert main(["check", path, cluster, "--inner-rate", "0.1"]) == 2
        assert main(["check", path, cluster, "--inner-rate", "1", "--curvature", "3"]) == 2
        assert "must be between 0 and 2" in capsys.readouterr().err
        assert main(["check", path, cluster, "--inner-rate=-1", "--curvature=-1"]) == 2
        assert "--inner-rate=-1 must be a positive number" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("settings", "error"),
        [
            ({"acumulate_updates": 3}, "HalosStrategy has no argument acumulate_updates"),
            ({"updates_per_worker": 2}, "HalosStrategy has no argument updates_per_worker"),
            (
                {"class_path": "AsyncLocalSGDStrategy", "init_args": {"merge_weight": 0.9}},
                "AsyncLocalSGDStrategy has no argument merge_weight",
            ),
            (
                {"class_path": "SyncSGDStrategy", "init_args": {"local_steps": 4, "defaults": "run"}},
                "SyncSGDStrategy has no argument defaults, local_steps",
            ),
            ({"local_steps": 0}, "local_steps=0 must be"),
            ({"local_optimizer": 0.3}, "local_optimizer=0.3 must have a class_path"),
            ({"local_optimizer": {"class_path": "x.Y"}}, "x.Y, and must be"),
            ({"local_optimizer": {"class_path": "torch.optim.Adam"}}, "makes Adam, whose updates are not linear"),
            (
                {"local_optimizer": {"class_path": "torch.optim.SGD", "init_args": [1]}},
                "local_optimizer has init_args=[1], and they must be a mapping, such as {lr: 0.7}",
            ),
            (
                {"class_path": "HalosStrategy", "init_args": [1]},
                "HalosStrategy has init_args=[1], and they must be a mapping, such as {local_steps: 8}",
            ),
            (
                {"local_optimizer": {"class_path": "torch.optim.lr_scheduler"}},
                "local_optimizer has the class_path torch.optim.lr_scheduler, and must be lightning_halos.Delayed",
            ),
            (
                {"local_optimizer": {"class_path": "torch.optim.Optimizer"}},
                "local_optimizer has the class_path torch.optim.Optimizer, and must be lightning_halos.DelayedNesterov",
            ),
            (
                {"local_optimizer": {"class_path": "torch.optim.SGD", "init_args": {"rate": 1}}},
                "local_optimizer: torch.optim.SGD does not take init_args={'rate': 1}: ",
            ),
            (
                {"local_optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": "fast"}}},
                "local_optimizer: torch.optim.SGD does not take init_args={'lr': 'fast'}: ",
            ),
            (
                {"local_optimizer": {"class_path": "torch.optim.SGD", "init_args": {"foreach": True, "fused": True}}},
                "local_optimizer: torch.optim.SGD does not take init_args={'foreach': True, 'fused': True}: ",
            ),
            (
                {"local_optimizer": {"class_path": "torch.optim.Adam", "init_args": {"betas": [0.9]}}},
                "local_optimizer: torch.optim.Adam does not take init_args={'betas': [0.9]}: ",
            ),
            (
                {
                    "class_path": "AsyncLocalSGDStrategy",
                    "init_args": {"optimizer": {"class_path": "torch.optim.Adam"}},
                },
                "error: optimizer makes Adam",
            ),
            (
                {"local_optimizer": {"class_path": "lightning_halos.DelayedNesterov", "lr": 100}},
                "local_optimizer has lr beside class_path. Arguments belong into init_args: {lr: 0.7}.",
            ),
            (
                {"local_optimizer": {"class_path": "lightning_halos.DelayedNesterov", "init_arg": {"lr": 100}}},
                "local_optimizer has init_arg beside class_path",
            ),
            (
                {"local_optimizer": {"class_path": "lightning_halos.DelayedNesterov", "dict_kwargs": {"lr": -1}}},
                "lightning_halos.DelayedNesterov does not take init_args={'lr': -1}",
            ),
            (
                {"local_optimizer": {"class_path": "foo.bar.DelayedNesterov", "init_args": {"lr": 0.1}}},
                "local_optimizer has the class_path foo.bar.DelayedNesterov, and must be lightning_halos.Delayed",
            ),
            (
                {"class_path": "lightning_halos.HalosStrategy", "local_steps": 400},
                "HalosStrategy has local_steps beside class_path. Arguments belong into init_args: {local_steps: 8}.",
            ),
            ({"class_path": "HalosStrategy", "init_arg": {"local_steps": 4}}, "HalosStrategy has init_arg beside"),
            ({"class_path": "foo.HalosStrategy"}, "the strategy is foo.HalosStrategy, and must be one of"),
            ({"trainer": {"max_steps": 3}}, "trainer.strategy is missing. Give one there, such as trainer: {strategy"),
            ({"trainer": {"strategy": None}}, "trainer.strategy is missing"),
            (
                {"local_optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": float("nan")}}},
                "local_optimizer: lr=nan must be a finite number.",
            ),
            ("ddp", "the strategy is ddp, and must be one of HalosStrategy"),
            ([1], "must contain a mapping"),
            ("sync_sgd", "has no servers"),
        ],
        ids=str,
    )
    def test_bad_settings_are_refused(
        self, tmp_path: Path, cluster: str, capsys: pytest.CaptureFixture[str], settings: object, error: str
    ) -> None:
        assert main(["check", write(tmp_path, settings), cluster]) == 2
        assert error in capsys.readouterr().err

    def test_settings_may_be_a_configuration_of_lightning_cli(self, tmp_path: Path) -> None:
        strategy = {"class_path": "lightning_halos.AsyncLocalSGDStrategy", "init_args": {"local_steps": 5}}
        path = Path(write(tmp_path, {"trainer": {"strategy": strategy, "max_steps": 3}, "model": {}}))
        assert read_settings(path).algorithm == AsyncLocalSGD(local_steps=5)
        path = Path(write(tmp_path, {"trainer": {"strategy": "diloco"}}))
        assert read_settings(path).algorithm == Diloco()
        assert isinstance(read_settings(Path(write(tmp_path, "sync_sgd"))).algorithm, SyncSGD)


def test_the_defaults_are_stable_with_and_without_overlap() -> None:
    for algorithm in (Halos(), Halos(overlap=True), AsyncLocalSGD(), Diloco()):
        assert check(algorithm, make_timing(PAPER)).is_stable, algorithm


@pytest.mark.filterwarnings("error::RuntimeWarning")  # NumPy's of an overflow; no garbage of other tests
def test_errors_that_shrink_or_grow_by_far_overflow_nothing() -> None:
    for lr in (1.0, 3.0):
        check(Diloco(outer_optimizer=partial(torch.optim.SGD, lr=lr)), make_timing(PAPER))
    slow = dataclasses.replace(alike(2), worker_speeds=[[1.0, 0.001]])
    check(AsyncLocalSGD(optimizer=nesterov(1.0)), make_timing(slow))


def test_a_setting_to_lower_has_the_name_of_its_argument() -> None:
    steep, timing = nesterov(3.0, 0.9), make_timing(alike(4))
    names = {
        "local_optimizer": Halos(local_optimizer=steep),
        "optimizer": AsyncLocalSGD(optimizer=steep),
        "outer_optimizer": Diloco(outer_optimizer=partial(torch.optim.SGD, lr=3.0, momentum=0.9, nesterov=True)),
    }
    for name, algorithm in names.items():
        lower = check(algorithm, timing).lower
        assert {setting.partition(":")[0] for setting in lower} == {name}


def test_answers_arrive_when_those_of_the_plan_do() -> None:
    """Formats and the time of servers decide after which local step a worker has its answer."""
    formats = WireFormats.of("int4")
    slow = SimulatedCluster([[0.1]], [[1.0] * 2], step_ms=10, message_bytes=1_000_000)
    plain, narrow = (events_of(Halos(overlap=True, wire=wire), make_timing(slow)) for wire in ("float32", formats))
    assert (plain.loaded_after, narrow.loaded_after) == ((8, 8), (3, 3))
    fast = dataclasses.replace(slow, bandwidths=[[100.0]], server_gigabytes_per_second=0.04)
    assert events_of(Halos(overlap=True), make_timing(fast)).loaded_after == (3, 3)


@pytest.mark.parametrize(
    ("algorithm", "speed"),
    [(Diloco(), 1.0), (Halos(), 0.05), (Halos(overlap=True), 0.05)],
    ids=["diloco", "halos", "overlap"],
)
def test_a_run_is_long_enough_for_servers_that_take_long(algorithm: Algorithm, speed: float) -> None:
    """They are slower than all workers together, in each of the two regions."""
    cluster = SimulatedCluster(
        [[100.0, 10.0], [10.0, 100.0]],
        [[1.0] * 4] * 2,
        step_ms=1,
        message_bytes=10**9,
        server_gigabytes_per_second=speed,
    )
    one = dataclasses.replace(cluster, bandwidths=[[100.0]], worker_speeds=[[1.0]], names=())
    for own in (cluster, one):
        timing = make_timing(own)
        events = events_of(algorithm, timing)
        assert check(algorithm, timing).is_stable
        if isinstance(algorithm, Halos):
            assert events.rounds >= 150
            assert sum(kind == "merge" for kind, _ in events.order) >= 40 * (len(own.regions) - 1)
