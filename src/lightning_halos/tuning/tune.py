"""The entrance of a search: it checks what the user gives, prepares all parts, searches, and writes what was found."""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightning_halos.core.algorithms import Algorithm
from lightning_halos.core.checks import check_count, check_seed, is_finite, is_positive
from lightning_halos.planning.pace import pace_of
from lightning_halos.planning.settings import arguments_of, make_arguments, name_defaults
from lightning_halos.simulation.cluster import SimulatedCluster
from lightning_halos.simulation.timing import Timing
from lightning_halos.transport.compute import usable_cores
from lightning_halos.tuning.goal import Goal, Mode
from lightning_halos.tuning.make import Make, describe_value, name_of
from lightning_halos.tuning.report import Tuned, as_yaml, make_table
from lightning_halos.tuning.search import Search, TuningError
from lightning_halos.tuning.space import FEWEST_STEPS, Settings, Space
from lightning_halos.tuning.study import Study, Tried
from lightning_halos.tuning.trial import Process, measure

_OURS = {"strategy", "max_steps", "max_epochs", "val_check_interval", "check_val_every_n_epoch"}

Strategy = Callable[..., Any]


def tune(
    strategy: Strategy,
    cluster: SimulatedCluster | str | Path,
    make: Make,
    *,
    hours: float,
    steps: int = 600,
    virtual_hours: float | None = None,
    monitor: str = "val_loss",
    mode: Mode = "min",
    target: float | None = None,
    start: Settings | None = None,
    fixed: Settings | None = None,
    trainer: Mapping[str, Any] | None = None,
    jobs: int | None = None,
    trials: int | None = None,
    folder: str | Path = "tuning",
    seed: int = 0,
    progress: bool = True,
    command: str = "",
) -> Tuned:
    """Searches settings for a strategy's class; see ``AlgorithmStrategy.tune`` for the arguments.

    Raises:
        TypeError: If an argument has the wrong type, or the user's function returns something else.
        ValueError: As there.
    """
    if not isinstance(cluster, SimulatedCluster):
        cluster = SimulatedCluster.from_yaml(cluster)
    # One process stands for a worker in a trial, with the speed and the links that the worker's devices have together.
    cluster = dataclasses.replace(cluster, devices_per_worker=None)
    start, fixed, trainer = dict(start or {}), dict(fixed or {}), dict(trainer or {})
    _check(hours, steps, virtual_hours, mode, target, trainer, jobs, trials)
    check_seed("seed", seed)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    default = _algorithm(strategy, cluster, fixed)
    first = {**start, **fixed}
    algorithm = _algorithm(strategy, cluster, first)
    timing = _timing(cluster, make, folder)
    seconds = pace_of(algorithm, timing).seconds(steps) if virtual_hours is None else virtual_hours * 3600
    # The defaults depend on the length of the trials.
    length = steps if virtual_hours is None else max(1, pace_of(algorithm, timing).steps(seconds))
    default, algorithm = (dataclasses.replace(one, global_steps=length) for one in (default, algorithm))
    goal = Goal(seconds, monitor, mode, target)
    space = Space(algorithm, timing, fixed, start, default)
    if (possible := space.steps(first, seconds)) < FEWEST_STEPS:
        raise ValueError(
            f"The settings to start from do {possible} global steps in {seconds / 3600:.3g} virtual hours, and a trial"
            f" needs {FEWEST_STEPS}, to be validated on its way. Give more steps or virtual hours."
        )
    if space.common:
        sizes, names = ", ".join(map(str, space.workers)), " and ".join(space.common)
        warnings.warn(
            f"The local servers have {sizes} workers. The search gives {names} one value for all of them, made for the"
            " mean number of workers; by default each server has its own. See docs/tuning.md.",
            stacklevel=3,
        )
    objection = _objection_to_defaults(space, fixed, seconds)
    if objection is not None:
        warnings.warn(f"The strategy's defaults are not tried: {objection}.", stacklevel=3)
    identity = {
        "cluster": dataclasses.asdict(cluster),
        "module": name_of(make),
        "algorithm": algorithm.name,
        "objective": {**dataclasses.asdict(goal), "seconds": round(seconds, 3)},
        "start": start,
        "fixed": fixed,
        "trainer": {key: describe_value(value) for key, value in trainer.items()},
        "seed": seed,
        "parameters": {name: dataclasses.astuple(parameter) for name, parameter in space.parameters.items()},
    }
    study = Study(folder, space, goal, identity, seed)
    try:
        study.enqueue("the start", space.start, first)
        if space.defaults is not None and objection is None:
            study.enqueue("the defaults", space.defaults, fixed)
        study.enqueue("averaging", space.averaging, space.settings(space.averaging))
        if progress:
            print(f"{algorithm.title}: {goal.title}; {len(space.parameters)} parameters", file=sys.stderr)
        number = jobs or usable_cores()
        search = Search(study, space, goal, make, strategy, cluster, trainer, folder, number, seed)
        search.run(hours * 3600, trials, progress)
        defaults = None if space.defaults is None else study.result_of(fixed, space.defaults)
        return _report(study, space, goal, strategy, type(algorithm), folder, command, defaults)
    finally:
        study.close()


def _check(
    hours: float,
    steps: int,
    virtual_hours: float | None,
    mode: str,
    target: float | None,
    trainer: Mapping[str, Any],
    jobs: int | None,
    trials: int | None,
) -> None:
    for name, value in (("hours", hours), ("virtual_hours", virtual_hours)):
        if value is not None and not is_positive(value):
            raise ValueError(f"{name}={value!r} must be a positive number of hours.")
    for name, count in (("steps", steps), ("jobs", jobs), ("trials", trials)):
        if count is not None:
            check_count(name, count)
    if mode not in ("min", "max"):
        raise ValueError(f"mode={mode!r} must be 'min' or 'max'.")
    if target is not None and not is_finite(target):
        raise ValueError(f"target={target!r} must be a number.")
    if ours := sorted(_OURS & trainer.keys()):
        raise ValueError(f"trainer has {', '.join(ours)}, which the search sets itself. Leave it out.")


def _objection_to_defaults(space: Space, fixed: Settings, seconds: float) -> str | None:
    """Says why the default settings cannot be tried, or returns ``None``."""
    if space.defaults is None:
        return "they have one local server, and the settings to start from have several, which are what is searched"
    if (possible := space.steps(fixed, seconds)) < FEWEST_STEPS:
        return (
            f"they do {possible} global steps in {seconds / 3600:.3g} virtual hours, and a trial needs {FEWEST_STEPS}"
        )
    return None


def _algorithm(strategy: Strategy, cluster: SimulatedCluster, settings: Settings) -> Algorithm:
    """Returns the algorithm that the strategy makes from settings, which this checks."""
    plain = strategy(simulate=cluster).algorithm
    algorithm: Algorithm = strategy(simulate=cluster, **{**settings, **make_arguments(type(plain), settings)}).algorithm
    return algorithm


def _timing(cluster: SimulatedCluster, make: Make, folder: Path) -> Timing:
    """Returns the durations on the cluster, and checks the user's function in a process of its own."""
    log = folder / f"make-{os.getpid()}.log"  # another search may start there at the same time
    process = Process.start(measure(make), log)
    try:
        report = process.receive()
        if report is None or report.model is None:
            reason = process.describe_end() if report is None else report.error
            raise TuningError(f"{name_of(make)} fails: {reason} See {log}.")
    finally:
        process.end(5.0)
    log.unlink()
    return Timing.of(cluster, *report.model)


def _report(
    study: Study,
    space: Space,
    goal: Goal,
    strategy: Strategy,
    algorithm: type[Algorithm],
    folder: Path,
    command: str,
    defaults: Tried | None,
) -> Tuned:
    trials = study.results()
    importances = study.importances()
    table = make_table(goal, trials, space.start, importances, study.left_out)
    (folder / "table.txt").write_text(f"$ {command}\n\n{table}" if command else table, encoding="utf-8")
    complete = [trial for trial in trials if trial.value is not None]
    if not complete:
        raise TuningError(
            f"No trial was complete in this time. Give more hours: the search in {folder} goes on.\n\n{table}"
        )
    best = min(complete, key=lambda trial: trial.value or 0.0)
    assert best.value is not None
    first = next((trial for trial in trials if trial.name == "the start"), None)
    found = f"{goal.title}: {goal.describe(best.value)}"
    if first is not None and (defaults is None or first.number != defaults.number):
        found += f", {_outcome(goal, first)} at the start"
    if defaults is not None:
        found += f", {_outcome(goal, defaults)} with the defaults"
    settings = name_defaults(best.settings, space.algorithm(best.settings), arguments_of(_class(strategy)))
    text = as_yaml(settings, _class_path(strategy), [found, *([f"$ {command}"] if command else [])])
    (folder / "best.yaml").write_text(text, encoding="utf-8")
    return Tuned(
        settings=best.settings,
        value=goal.shown(best.value),
        start_value=None if first is None or first.value is None else goal.shown(first.value),
        steps=best.curve[-1].step,
        table=table,
        yaml=text,
        importances=importances,
        trials=tuple(trials),
        algorithm=algorithm,
    )


def _outcome(goal: Goal, trial: Tried) -> str:
    return trial.outcome if trial.value is None else goal.describe(trial.value)


def _class_path(strategy: Strategy) -> str:
    """Returns where users import a strategy from."""
    kind = _class(strategy)
    module = "lightning_halos" if kind.__module__.startswith("lightning_halos.") else kind.__module__
    return f"{module}.{kind.__qualname__}"


def _class(strategy: Strategy) -> type[Any]:
    kind: Any = strategy.func if isinstance(strategy, partial) else strategy
    assert isinstance(kind, type)
    return kind
