"""A search as a user starts it: what it finds, how it goes on, and what it says of mistakes."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import re
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_halos import AsyncLocalSGDStrategy, DilocoStrategy, HalosStrategy, SimulatedCluster, SyncSGDStrategy
from lightning_halos.cli import main
from lightning_halos.core.algorithms import Algorithm, Halos
from lightning_halos.core.wire_formats import WireFormats
from lightning_halos.planning.pace import pace_of
from lightning_halos.planning.planner import make_timing
from lightning_halos.planning.settings import read_settings
from lightning_halos.planning.stability import servers_of
from lightning_halos.simulation.timing import Timing
from tests.tuning.toys import CLUSTER, Counting, Killed, Regression, loader, make

pytest.importorskip("optuna")
from lightning_halos.tuning.make import call, import_make, name_of
from lightning_halos.tuning.trial import measure

STEPS = 24


def tune(folder: Path, make: Callable[[], Any] = make, strategy: Any = HalosStrategy, **options: Any) -> Any:
    options = {"hours": 1, "steps": STEPS, "jobs": 2, "folder": folder, "progress": False, **options}
    return strategy.tune(CLUSTER, make, **options)


def test_a_search_survives_a_failing_trial_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3 trials one fails; another call goes on, from Ctrl-C as well, and LightningCLI takes what was found."""
    counting = Counting(tmp_path / "calls", fails_at=4)  # the first call only measures the model
    trainer = {"callbacks": [pl.Callback()]}
    found = tune(tmp_path / "out", counting, trials=3, trainer=trainer)
    outcomes = [trial.outcome for trial in found.trials]
    assert len(outcomes) == 3
    assert outcomes.count("failed") == 1
    assert "no memory is left" in next(trial.reason for trial in found.trials if trial.outcome == "failed")
    assert [trial.name for trial in found.trials[:2]] == ["the start", "averaging"]
    complete = [trial for trial in found.trials if trial.value is not None]
    assert found.value == min(trial.value for trial in complete)
    assert found.start_value == next(trial.value for trial in complete if trial.name == "the start")
    seconds = found.trials[0].curve[-1].seconds
    for trial in complete:  # slow settings get fewer steps, and all of them the same time
        assert trial.curve[-1].seconds == pytest.approx(seconds, rel=0.25)
        assert trial.curve[-1].step <= 2 * STEPS
    for text in ("the start", "importance", "local momentum", "3 trials", "1 failed"):
        assert text in found.table
    assert f": {found.value:.4g}, {found.start_value:.4g} with the defaults\n" in found.yaml

    with sqlite3.connect(tmp_path / "out" / "study.db") as study:  # as an earlier version left it
        assert study.execute("DELETE FROM trial_user_attributes WHERE key = 'complete'").rowcount >= 3
    counting.interrupts_at = len(counting.path.read_text()) + 3  # after the model is measured, the second trial
    counting.fails_at = 0
    trainer = {"callbacks": [pl.Callback()]}  # at another address
    more = tune(tmp_path / "out", counting, trials=4, jobs=1, trainer=trainer)
    assert 3 < len(more.trials) < 7, "the trial in which Ctrl-C came, and those after it, are missing"

    for change, word in (
        ({"make": make}, "module"),
        ({"monitor": "x"}, "objective"),
        ({"seed": 1}, "seed"),
        ({"trainer": {}}, "trainer"),
    ):
        with pytest.raises(ValueError, match=f"another search .*{word}"):
            tune(tmp_path / "out", **{"make": counting, "trials": 1, "trainer": trainer, **change})

    monkeypatch.setattr(sys, "argv", ["train.py"])
    path = tmp_path / "out" / "best.yaml"
    real = tmp_path / "real.yaml"
    mine = {"class_path": "lightning_halos.HalosStrategy", "init_args": {"regions": [[0], [1]], "timeout": 60}}
    real.write_text(yaml.safe_dump({"trainer": {"max_steps": 7, "strategy": mine}}))
    quiet = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.logger=false"]
    cli = LightningCLI(Regression, args=["--config", str(real), "--config", str(path), *quiet], run=False)
    assert type(cli.trainer.strategy) is HalosStrategy
    assert (cli.trainer.max_steps, cli.trainer.strategy.timeout) == (7, 60)
    assert len(cli.trainer.strategy.topology.names) == 2
    timing = make_timing(CLUSTER)
    wanted = HalosStrategy(simulate=CLUSTER, **more.arguments).algorithm
    for algorithm in (cli.trainer.strategy.algorithm, read_settings(path).algorithm):
        assert servers_of(algorithm, timing) == servers_of(wanted, timing)
        for name in ("local_steps", "accumulate_updates", "merge_weight", "wire", "overlap"):
            assert getattr(algorithm, name) == getattr(wanted, name)


def _nesterov(**arguments: Any) -> dict[str, Any]:
    return {"class_path": "lightning_halos.DelayedNesterov", "init_args": arguments}


def _sgd(**arguments: Any) -> dict[str, Any]:
    return {"class_path": "torch.optim.SGD", "init_args": arguments}


_OTHERS = {
    "local_steps": 5,
    "dynamic_local_steps": False,
    "accumulate_updates": 7,
    "merge_weight": 0.9,
    "servers_per_region": [2, 1],
    "local_optimizer": _nesterov(lr=0.9, momentum=0.9, delay=3, activation=0.3),
    "global_optimizer": _sgd(lr=0.9, momentum=0.9, nesterov=True),
    "max_norm_ratio": 5,
    "overlap": True,
    "wire": {"between": "int4"},
    "defaults": "published",
}
_SGD = _sgd(lr=0.9, momentum=0.9, dampening=0, weight_decay=0.1, nesterov=True)


@pytest.mark.parametrize(
    ("strategy", "start", "others"),
    [
        (HalosStrategy, {}, _OTHERS),
        (
            HalosStrategy,
            {
                "local_optimizer": _nesterov(lr=0.5, momentum=0.1),
                "global_optimizer": _nesterov(lr=0.6),
                "wire": {"within": "int8"},
            },
            _OTHERS,
        ),
        pytest.param(
            AsyncLocalSGDStrategy,
            {"optimizer": _nesterov(lr=0.5, delay=1)},
            {"optimizer": _SGD, "defaults": "published"},
            marks=pytest.mark.slow,
        ),
        (DilocoStrategy, {}, {"outer_optimizer": _SGD, "dynamic_local_steps": True, "defaults": "published"}),
        pytest.param(
            DilocoStrategy, {"outer_optimizer": _sgd(lr=1.04)}, {"outer_optimizer": _SGD}, marks=pytest.mark.slow
        ),
    ],
    ids=["halos: defaults", "halos", "async_local_sgd", "diloco: defaults", "diloco"],
)
def test_what_was_found_replaces_the_settings_of_another_configuration(
    strategy: Any, start: dict[str, Any], others: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LightningCLI merges the arguments of one strategy, and of one optimizer, in two files; so best.yaml names all."""
    found = tune(tmp_path, strategy=strategy, start=start, trials=1)
    assert found.settings == start
    mine = {"class_path": f"lightning_halos.{strategy.__name__}", "init_args": {**others, "timeout": 60}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"trainer": {"strategy": mine}}))
    best = tmp_path / "best.yaml"
    monkeypatch.setattr(sys, "argv", ["train.py"])
    files = ["--config", str(tmp_path / "mine.yaml"), "--config", str(best)]
    cli = LightningCLI(Regression, args=[*files, "--trainer.accelerator=cpu", "--trainer.logger=false"], run=False)
    assert cli.trainer.strategy.timeout == 60  # is no setting of the algorithm
    searched = _meaning(strategy(**found.arguments).algorithm)
    assert _meaning(cli.trainer.strategy.algorithm) == searched
    assert _meaning(read_settings(best).algorithm) == searched


def _meaning(algorithm: Algorithm) -> dict[str, Any]:
    """Returns the values of an algorithm, with those of its optimizers."""
    values = {field.name: getattr(algorithm, field.name) for field in dataclasses.fields(algorithm)}
    for name, make_optimizer in values.items():
        if name.endswith("optimizer") and make_optimizer is not None:
            optimizer = make_optimizer([nn.Parameter(torch.zeros(1))])
            values[name] = (type(optimizer), optimizer.defaults)
    return values


def test_a_search_starts_from_what_another_one_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defaults that best.yaml names are no settings of their own: they are not trained twice, nor in every row."""
    tune(tmp_path / "out", trials=1)  # the defaults
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(dataclasses.asdict(CLUSTER)))
    cluster, best = str(tmp_path / "cluster.yaml"), str(tmp_path / "out" / "best.yaml")
    assert main(["check", best, cluster, "--steps", "600"]) == 0
    assert main(["plan", cluster, "--settings", best]) == 0
    tried: list[Any] = []

    def run(study: Any, *others: Any) -> Any:
        tried.extend(study.ask() for _ in range(2))
        raise ValueError("stop here")

    monkeypatch.setattr("lightning_halos.tuning.tune.Search", run)
    options = ["--module", "tests.tuning.toys:make", "--hours", "1", "--start", best]
    assert main(["tune", cluster, *options, "--output", str(tmp_path / "again")]) == 2
    assert [trial.user_attrs["name"] for trial, _ in tried] == ["the start", "averaging"]
    assert tried[0][1] == {}


@pytest.mark.parametrize("strategy", [DilocoStrategy, AsyncLocalSGDStrategy])
def test_baselines_are_tuned_too(tmp_path: Path, strategy: Any) -> None:
    found = tune(tmp_path, strategy=strategy, trials=1, fixed={"local_steps": 2}, target=2.0, start={"local_steps": 3})
    assert yaml.safe_load(found.yaml)["trainer"]["strategy"]["class_path"] == f"lightning_halos.{strategy.__name__}"
    assert found.settings["local_steps"] == 2
    assert "with the defaults\n" in found.yaml
    assert "at the start" not in found.yaml
    assert found.trials[0].curve[-1].value <= 2.0 or found.value > found.trials[0].curve[-1].seconds * 0.9
    strategy(simulate=CLUSTER, **found.arguments)


def test_one_process_stands_for_a_worker_of_several_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = mock.Mock(side_effect=ValueError("stop here"))
    monkeypatch.setattr("lightning_halos.tuning.tune.Search", search)
    cluster = dataclasses.replace(CLUSTER, devices_per_worker=8)
    with pytest.raises(ValueError, match="stop here"):
        HalosStrategy.tune(cluster, make, hours=1, steps=STEPS, jobs=1, folder=tmp_path, progress=False)
    *_, strategy, simulated, _, _, _, _ = search.call_args.args
    assert strategy(simulate=simulated).cluster == CLUSTER


def test_a_search_ends_when_all_settings_have_been_tried(tmp_path: Path) -> None:
    fixed = {"local_steps": 2, "outer_optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}}
    start = {"dynamic_local_steps": True}
    found = tune(tmp_path, strategy=DilocoStrategy, fixed=fixed, start=start)
    assert [trial.settings.get("dynamic_local_steps", False) for trial in found.trials] == [True, False]
    assert [trial.name for trial in found.trials] == ["the start", "the defaults"]
    at_start, defaults = (trial.value for trial in found.trials)
    assert f", {at_start:.4g} at the start, {defaults:.4g} with the defaults\n" in found.yaml
    assert "Left out without training" in found.table
    assert "tried already" in found.table


def test_a_trial_that_is_killed_fails_at_once(tmp_path: Path) -> None:
    """Also while processes that it has started live on."""
    for first, words in ((2, "All of the first 3 trials failed. The last one: its process"), (1, "fails: its process")):
        killed, begin = Killed(tmp_path / f"calls-{first}", first), time.monotonic()
        with pytest.raises(ValueError, match=rf"{words} was ended by SIGKILL \(out of memory\?\)"):
            tune(tmp_path / f"out-{first}", killed, jobs=3)
        assert time.monotonic() - begin < 50


def test_by_default_all_cores_that_this_process_may_use_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3), raising=False)
    search = mock.Mock(side_effect=InterruptedError)
    monkeypatch.setattr("lightning_halos.tuning.tune.Search", search)
    with pytest.raises(InterruptedError):
        tune(tmp_path, jobs=None)
    assert search.call_args.args[8] == 3


@pytest.mark.parametrize(
    ("cluster", "options", "message"),
    [
        (
            SimulatedCluster([[10.0, 1.0], [1.0, 10.0]], [[1.0, 1.0], [1.0]], step_ms=100),
            {},
            r"have 2, 1 workers\. .* accumulate_updates and local_optimizer one value for all of them",
        ),
        (
            SimulatedCluster([[10.0]], [[1.0, 1.0]], step_ms=100),
            {"start": {"servers_per_region": 2}},
            "defaults are not tried: they have one local server",
        ),
        (
            SimulatedCluster([[0.01]], [[1.0, 1.0]], step_ms=100, message_bytes=1_000_000),
            {"start": {"overlap": True, "wire": "int4"}, "virtual_hours": 2.4 / 3600},
            "defaults are not tried: they do 8 global steps",
        ),
    ],
    ids=["servers of different sizes", "other servers", "slow defaults"],
)
def test_what_a_search_cannot_do_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: SimulatedCluster, options: Any, message: str
) -> None:
    monkeypatch.setattr("lightning_halos.tuning.tune.Search", mock.Mock(side_effect=InterruptedError))
    monkeypatch.setattr(f"{__name__}.CLUSTER", cluster)
    with pytest.raises(InterruptedError), pytest.warns(UserWarning, match=message):
        tune(tmp_path, **options)


def test_the_defaults_come_between_others_and_averaging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the settings to start from vary what the defaults need not, such as overlap on slow links."""
    tried: list[Any] = []

    def run(study: Any, space: Any, *others: Any) -> Any:
        tried.extend(study.ask() for _ in range(3))
        tried.extend(space.steps(settings, 1000) for _, settings in tried[:2])
        raise InterruptedError

    monkeypatch.setattr("lightning_halos.tuning.tune.Search", run)
    with pytest.raises(InterruptedError):
        tune(tmp_path, start={"local_steps": 1})
    assert [trial.user_attrs["name"] for trial, _ in tried[:3]] == ["the start", "the defaults", "averaging"]
    assert "overlap" in tried[0][0].params
    assert [settings for _, settings in tried[:2]] == [{"local_steps": 1}, {}]
    timing = make_timing(CLUSTER)
    assert tried[3:] == [pace_of(Halos(local_steps=one), timing).steps(1000) for one in (1, 8)]


def test_a_system_that_cannot_fork_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    for name in ("tune", "search", "study", "trial"):
        monkeypatch.delitem(sys.modules, f"lightning_halos.tuning.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(ValueError, match="forks its trials' processes, which this system cannot"):
        tune(tmp_path)


def test_searches_may_start_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_halos.tuning.tune.Search", mock.Mock(side_effect=ValueError("stop here")))

    def slow() -> Any:
        with pytest.raises(ValueError, match="stop here"):
            tune(tmp_path)  # which starts and ends while the first search looks at the user's function
        return make()

    with pytest.raises(ValueError, match="has another search"):
        tune(tmp_path, slow)


def test_a_search_that_was_killed_leaves_its_folder_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while trials of it live on."""
    waits, ends = os.pipe()

    def killed(*_: Any) -> None:
        if os.fork() == 0:
            os.close(ends)
            os.read(waits, 1)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("lightning_halos.tuning.tune.Search", killed)
    search = multiprocessing.get_context("fork").Process(target=tune, args=(tmp_path,))
    search.start()
    search.join()
    assert search.exitcode == -signal.SIGKILL
    monkeypatch.setattr("lightning_halos.tuning.tune.Search", mock.Mock(side_effect=ValueError("stop here")))
    with pytest.raises(ValueError, match="stop here"):
        tune(tmp_path)
    os.close(ends)


def test_a_file_that_is_no_study_is_named(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_bytes(b"anything else" * 100)
    with pytest.raises(ValueError, match=r"study\.db is not the study of a search, or it is damaged: .*not a database"):
        tune(tmp_path)


def test_mistakes_end_a_search(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"logs no 'val_acc'.*It logs val_loss"):
        tune(tmp_path / "metric", monitor="val_acc")
    with pytest.raises(ValueError, match=r"fails: TypeError: .* <int> as its first value, and must return a"):
        tune(tmp_path / "values", lambda: (1, 2))
    with pytest.raises(ValueError, match="no settings to tune"):
        tune(tmp_path / "sync", strategy=SyncSGDStrategy)
    with pytest.raises(ValueError, match="needs 12"):
        tune(tmp_path / "short", steps=5)
    for options, word in (
        ({"hours": 0}, "hours=0"),
        ({"trainer": {"max_steps": 3}}, "max_steps"),
        ({"fixed": {"merge_weight": 3}}, "merge_weight=3"),
        ({"mode": "low"}, "mode='low'"),
        ({"jobs": 0}, "jobs=0"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0 to 4294967295"),
    ):
        with pytest.raises(ValueError, match=word):
            tune(tmp_path / "options", **options)


def test_what_the_users_function_may_return() -> None:
    module = Regression()
    assert call(lambda: (module, loader(), loader())).data.keys() == {"train_dataloaders", "val_dataloaders"}
    for made, word in (
        (module, "returns <Regression>"),
        ((module,), "1 values"),
        ((loader(), module), "<DataLoader> as its first"),
        ((module, loader()), "<DataLoader> as its second"),
    ):
        with pytest.raises(TypeError, match=word):
            call(lambda made=made: made)
    assert import_make("tests.tuning.toys:make") is make
    made = name_of(partial(partial(make), 3, callback=pl.Callback()))
    assert re.fullmatch(r"tests\.tuning\.toys:make\(3, callback=<.*Callback object>\)", made)
    for path, word in (
        ("toys", "module:function"),
        ("no_such:make", "no module no_such"),
        ("math:make", "has no make"),
    ):
        with pytest.raises(ValueError, match=word):
            import_make(path)


def test_messages_have_the_size_that_a_simulation_sends() -> None:
    """Buffers that are not averaged are not sent, and what is averaged has no narrow format."""

    class Buffered(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.register_buffer("table", torch.randn(1000))

    connection = mock.Mock()
    measure(lambda: (Buffered(), loader(), loader()))(connection)
    layout, itemsize = connection.send.call_args.args[0].model
    timing = Timing.of(dataclasses.replace(CLUSTER, message_bytes=None), layout, itemsize)
    parameters, averaged = (4 + 1) + (4 + 4), 4 + 4
    assert timing.message_bytes == 4 * (parameters + averaged)
    assert timing.on(WireFormats.of("bfloat16")).bytes_within == 2 * parameters + 4 * averaged


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fix", "local_step=8"], "--fix: HalosStrategy has no argument local_step."),
        (["--fix", "local_steps=[8"], "--fix local_steps=[8: [8 is not YAML"),
        (["--steps", "100", "--virtual-hours", "1"], "--virtual-hours is the time of each trial: leave --steps out."),
        (["--start", "start.yaml"], "start.yaml: HalosStrategy has no argument local_step."),
    ],
)
def test_the_command_names_a_setting_that_no_strategy_has(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "start.yaml").write_text("{local_step: 4}")
    assert main(["tune", "none.yaml", "--module", "tests.tuning.toys:make", "--hours", "1", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "tuning").exists()


def test_without_optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["tune", str(tmp_path / "none.yaml"), "--module", "a:b", "--hours", "1"]) == 2
    assert 'pip install "lightning-halos[tune]"' in capsys.readouterr().err
