"""``lightning-halos tune``: searches settings for a cluster and a module, by training in simulations of the cluster."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lightning_halos.commands.inputs import (
    check_folder,
    given_path,
    read_cluster,
    read_known_settings,
    refuse,
    refuse_unknown,
)

SUMMARY = "Search settings for a cluster and your module, by training it in simulations of the cluster."
EXAMPLES = """\
examples:
  lightning-halos tune examples/clusters/paper.yaml --module my_project:make --hours 1
      the settings with the lowest val_loss in the virtual time in which the defaults train 600 global steps;
      make() returns (module, datamodule) or (module, train_loader, val_loader)
  lightning-halos tune cluster.yaml --module my_project:make --hours 1 --steps 2000 --trainer gradient_clip_val=1.0
      the same for longer runs, with arguments of the Trainer
  lightning-halos tune cluster.yaml --module my_project:make --hours 1 --monitor val_acc --mode max
      the highest accuracy
  lightning-halos tune cluster.yaml --module my_project:make --hours 1 --to-loss 2.0
      the shortest virtual time to a loss
  lightning-halos tune cluster.yaml --module my_project:make --hours 1 --algorithm diloco --output tuning-diloco
      the same for DiLoCo
The same command again goes on with the search.
"""
_STRATEGIES = {
    "halos": "HalosStrategy",
    "async_local_sgd": "AsyncLocalSGDStrategy",
    "diloco": "DilocoStrategy",
}
_STEPS = 600
_LEFT_OUT = frozenset(
    ("regions", "server", "keys", "streams", "start_method", "timeout", "grace_time", "worker", "inner", "simulate")
)
"""Arguments that a configuration may have, and that the search sets itself or that change nothing in a simulation."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments, and ``run``."""
    parser.set_defaults(run=_tune)
    parser.add_argument("cluster", type=given_path, help="the cluster's description, a YAML file")
    parser.add_argument(
        "--module",
        required=True,
        metavar="MODULE:FUNCTION",
        help="a function that returns a LightningModule and its data: (module, datamodule) or (module, train_loader,"
        " val_loader)",
    )
    parser.add_argument("--hours", type=float, required=True, help="hours to search, of wall-clock time")
    parser.add_argument("--algorithm", choices=list(_STRATEGIES), default="halos", help="default: halos")
    goal = parser.add_argument_group("what counts")
    goal.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="global steps of the settings to start from; their virtual time is what each trial gets"
        f" (default: {_STEPS})",
    )
    goal.add_argument("--virtual-hours", type=float, metavar="T", help="the virtual time of each trial, instead")
    goal.add_argument(
        "--monitor", default="val_loss", metavar="METRIC", help="what the module logs (default: val_loss)"
    )
    goal.add_argument(
        "--mode", choices=("min", "max"), default="min", help="whether low or high is good (default: min)"
    )
    goal.add_argument(
        "--to-loss", type=float, metavar="L", help="search the shortest virtual time to this value of the metric"
    )
    how = parser.add_argument_group("how to search")
    how.add_argument(
        "--start",
        type=given_path,
        metavar="FILE",
        help="settings to start from, a YAML file as for `lightning-halos check`",
    )
    how.add_argument(
        "--fix",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of the strategy that is not varied, such as local_steps=8; may be given again",
    )
    how.add_argument(
        "--trainer",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of the Trainer, such as gradient_clip_val=1.0 or accelerator=gpu; may be given again",
    )
    how.add_argument(
        "--jobs", type=int, metavar="N", help="trials side by side (default: one per core that this process may use)"
    )
    how.add_argument("--trials", type=int, metavar="N", help="the most trials to train now (default: no limit)")
    how.add_argument("--seed", type=int, default=0, help="of the module, the data and the search (default: 0)")
    how.add_argument(
        "--output",
        type=given_path,
        default=Path("tuning"),
        metavar="FOLDER",
        help="for best.yaml, table.txt and study.db, from which the same command goes on (default: tuning)",
    )


def _tune(arguments: argparse.Namespace) -> None:
    from lightning_halos.extras import tuning_package

    tuning_package("optuna")
    from lightning_halos import interface
    from lightning_halos.tuning.make import import_make

    if arguments.virtual_hours is not None:
        refuse(arguments, "--virtual-hours is the time of each trial", "steps")
    check_folder("--output", arguments.output)
    kind = getattr(interface, _STRATEGIES[arguments.algorithm])
    start: dict[str, Any] = {}
    if arguments.start is not None:
        settings = read_known_settings(arguments.start)
        if (name := settings.strategy) != kind.__name__:
            raise ValueError(f"{arguments.start} has settings of {name}, but --algorithm is {arguments.algorithm}.")
        made, defaults = vars(settings.algorithm), vars(kind().algorithm)
        same = {argument for argument in made if made[argument] == defaults[argument]}
        start = {key: value for key, value in settings.arguments.items() if key not in _LEFT_OUT | same}
    fixed = _pairs("--fix", arguments.fix)
    refuse_unknown("--fix", kind.__name__, fixed)
    try:
        found = kind.tune(
            read_cluster(arguments.cluster),
            import_make(arguments.module),
            hours=arguments.hours,
            steps=_STEPS if arguments.steps is None else arguments.steps,
            virtual_hours=arguments.virtual_hours,
            monitor=arguments.monitor,
            mode=arguments.mode,
            target=arguments.to_loss,
            start=start,
            fixed=fixed,
            trainer=_pairs("--trainer", arguments.trainer),
            jobs=arguments.jobs,
            trials=arguments.trials,
            folder=arguments.output,
            seed=arguments.seed,
            command=arguments.command,
        )
    except TypeError as error:
        raise ValueError(str(error)) from error
    print(f"\n{found.table}\n{found.yaml}\nSee {arguments.output / 'best.yaml'}.")


def _pairs(option: str, texts: list[str]) -> dict[str, Any]:
    """Reads ``NAME=VALUE``, with values as in YAML."""
    from lightning_halos.yaml_files import load_yaml

    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise ValueError(f"{option} {text} must be NAME=VALUE.")
        pairs[name.replace("-", "_")] = load_yaml(value, f"{option} {text}: {value}")
    return pairs
