"""``lightning-halos plan``: predicts how workers would spend their time on a cluster."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any, get_args

from lightning_halos.commands.inputs import (
    check_folder,
    given_count,
    given_path,
    read_cluster,
    read_known_settings,
    refuse,
)
from lightning_halos.core.checks import check_count
from lightning_halos.extras import picture_package

if TYPE_CHECKING:
    from lightning_halos.core.algorithms import Algorithm
    from lightning_halos.core.wire_formats import WireFormats
    from lightning_halos.simulation.cluster import SimulatedCluster

SUMMARY = "Say where the time would go on a cluster, under each algorithm, without training."
EXAMPLES = """\
examples:
  lightning-halos plan examples/clusters/paper.yaml
      where the time would go, under each algorithm
  lightning-halos plan cluster.yaml --message-bytes 4000000000 --output plans
      the same for a model of a billion parameters, with a picture, a JSON and timelines for https://ui.perfetto.dev
  lightning-halos plan cluster.yaml --sweep
      which local_steps, accumulate_updates and servers_per_region to choose
  lightning-halos plan cluster.yaml --wire float32 int4
      the same if models travel in 4 bits between regions
  lightning-halos plan --random-cluster 100x100 --algorithm halos
      10,000 workers
"""
_MS_PER_MINUTE = 6e4
_TIMELINE_MINUTES = 5.0
_TIMELINE_WORKERS = 1000  # with more, the default timeline gets shorter in proportion, so that viewers can open it
_DEFAULTS = {"local_steps": 8, "servers_per_region": 1, "baseline_local_steps": 32}
_CHOSEN = ("algorithm", "same_local_steps", "accumulate_updates", *_DEFAULTS)  # by a sweep, and by a file of settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments, and ``run``."""
    from lightning_halos.core.algorithms import ALGORITHMS
    from lightning_halos.simulation.cluster import AllReduce

    parser.set_defaults(run=_plan)
    where = parser.add_argument_group("the cluster")
    where.add_argument("cluster", nargs="?", type=given_path, help="its description, a YAML file")
    where.add_argument("--random-cluster", metavar="RxW", help="draw one: R regions of W workers, like the paper's")
    where.add_argument("--seed", type=int, help="of --random-cluster (default: 0)")
    where.add_argument("--message-bytes", type=given_count, metavar="N", help="bytes of the model on a link")
    where.add_argument(
        "--server-gigabytes-per-second",
        type=float,
        metavar="X",
        help="bytes of a model, divided by the time that a server needs for a push (default: as the cluster's"
        " description says, else servers take no time)",
    )
    how = parser.add_argument_group("the algorithms")
    how.add_argument(
        "--algorithm",
        action="append",
        choices=list(ALGORITHMS),
        help=f"{', '.join(ALGORITHMS)}; may be given again (default: all)",
        metavar="NAME",
    )
    how.add_argument(
        "--settings",
        type=given_path,
        metavar="FILE",
        help="one algorithm with the settings of a YAML file, as for `lightning-halos check`, instead of those below",
    )
    how.add_argument("--local-steps", type=int, metavar="H", help="of HALoS (default: 8)")
    how.add_argument("--same-local-steps", action="store_true", help="under HALoS, H steps for slower workers too")
    how.add_argument(
        "--accumulate-updates",
        type=int,
        metavar="K",
        help="of HALoS (default: by --steps, at most 8 per worker of a server)",
    )
    how.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="global steps of the run, by which the default K goes (default: as many as in the paper)",
    )
    how.add_argument("--servers-per-region", type=int, metavar="S", help="of HALoS (default: 1)")
    how.add_argument(
        "--overlap", action="store_true", help="under HALoS and Async-Local-SGD, train on while pushes are answered"
    )
    how.add_argument(
        "--baseline-local-steps", type=int, metavar="H", help="of DiLoCo and Async-Local-SGD (default: 32)"
    )
    how.add_argument(
        "--all-reduce",
        choices=get_args(AllReduce),
        help="of DiLoCo and synchronous SGD: through rank 0, as in real runs, or in a ring of all workers (default: as"
        " the cluster's description says, else star)",
    )
    how.add_argument(
        "--wire",
        nargs="+",
        metavar="FORMAT",
        help="format of models and updates between workers and servers: float32, bfloat16, int8 or int4; two formats"
        " are for links inside and links between regions (default: float32)",
    )
    how.add_argument("--sweep", action="store_true", help="vary H, K and the number of servers of HALoS instead")
    what = parser.add_argument_group("what to simulate and write")
    what.add_argument("--hours", type=float, default=1.0, help="virtual hours (default: 1)")
    what.add_argument(
        "--output",
        type=given_path,
        metavar="FOLDER",
        help="also write the table, a picture, a JSON and timelines there",
    )
    what.add_argument(
        "--timeline-minutes",
        type=float,
        metavar="M",
        help=f"length of the timelines (default: {_TIMELINE_MINUTES:g}; proportionally less with more than"
        f" {_TIMELINE_WORKERS} workers)",
    )


def _plan(arguments: argparse.Namespace) -> None:
    from lightning_halos.core.algorithms import ServerAlgorithm
    from lightning_halos.planning.advice import advice_on_overlap
    from lightning_halos.planning.planner import make_timing, plan
    from lightning_halos.planning.report import as_json, save_picture, table
    from lightning_halos.planning.sweep import sweep, sweep_table
    from lightning_halos.planning.timeline import write_trace

    name, cluster = _cluster(arguments)
    if arguments.all_reduce is not None:
        cluster = dataclasses.replace(cluster, all_reduce=arguments.all_reduce)
    if arguments.server_gigabytes_per_second is not None:
        cluster = dataclasses.replace(cluster, server_gigabytes_per_second=arguments.server_gigabytes_per_second)
    wire, folder = _wire(arguments.wire or ["float32"]), arguments.output
    if folder:
        check_folder("--output", folder)
    timing = make_timing(cluster, arguments.message_bytes)
    if arguments.sweep:
        refuse(arguments, "--sweep varies the settings of HALoS", "settings", "steps", *_CHOSEN)
        refuse(arguments, "--sweep plans HALoS only, and writes no timelines", "all_reduce", "timeline_minutes")
        timing = timing.on(wire)
        trials = sweep(timing, arguments.hours, overlap=arguments.overlap, wire=wire)
        _report(arguments, "sweep", sweep_table(trials, timing))
        return
    if not folder:
        refuse(arguments, "timelines are written with --output only", "timeline_minutes")
    else:
        picture_package("matplotlib")  # if it is missing, fail before simulating and writing half of the files
    record_ms = _timeline_ms(arguments, cluster.num_workers) if folder else 0.0
    algorithms = _algorithms(arguments, wire)
    _refuse_without_effect(arguments, algorithms)
    timing = timing.on(next((one.wire for one in algorithms if isinstance(one, ServerAlgorithm)), wire))
    plans = [plan(algorithm, timing, arguments.hours, record_ms) for algorithm in algorithms]
    advice = advice_on_overlap(algorithms, plans, timing, arguments.hours)
    _report(arguments, name, table(plans, timing) + (f"\n{advice}" if advice else ""))
    if folder:
        values = {"command": arguments.command, **as_json(plans, timing)}
        (folder / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        for one in plans:
            write_trace(one, timing, folder / f"{name}-{one.algorithm}.trace.json")
        save_picture(plans, timing, folder / f"{name}.png")
        print(f"\nSee {folder / name}.* and, in https://ui.perfetto.dev, {folder / name}-*.trace.json")


def _report(arguments: argparse.Namespace, name: str, text: str) -> None:
    """Prints a text and, with ``--output``, writes it to a file with the command that made it."""
    print(text, end="")
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / f"{name}.txt").write_text(f"$ {arguments.command}\n\n{text}", encoding="utf-8")


def _wire(formats: list[str]) -> WireFormats:
    from lightning_halos.core.quantization import check_format
    from lightning_halos.core.wire_formats import WireFormats

    for form in formats:
        check_format("--wire", form)
    if len(formats) > 2:
        raise ValueError(f"--wire {' '.join(formats)} must be one format, or two: inside regions, and between them.")
    return WireFormats.of({"within": formats[0], "between": formats[-1]})


def _refuse_without_effect(arguments: argparse.Namespace, algorithms: list[Algorithm]) -> None:
    """Refuses options that are about other algorithms than those that are planned."""
    from lightning_halos.core.algorithms import Halos, ServerAlgorithm

    if not any(isinstance(one, Halos) for one in algorithms):
        own = ("local_steps", "same_local_steps", "accumulate_updates", "servers_per_region", "steps")
        refuse(arguments, "HALoS is not planned", *own)
    if not any(isinstance(one, ServerAlgorithm) for one in algorithms):
        refuse(arguments, "neither HALoS nor Async-Local-SGD is planned", "overlap", "wire")
    if all(isinstance(one, Halos) or one.averages_gradients for one in algorithms):
        refuse(arguments, "neither DiLoCo nor Async-Local-SGD is planned", "baseline_local_steps")
    if all(isinstance(one, ServerAlgorithm) for one in algorithms):
        refuse(arguments, "neither DiLoCo nor synchronous SGD is planned", "all_reduce")


def _algorithms(arguments: argparse.Namespace, wire: WireFormats) -> list[Algorithm]:
    """Makes the algorithms that were asked for, in the order of the table."""
    from lightning_halos.core.algorithms import ALGORITHMS, Halos, ServerAlgorithm

    if arguments.steps is not None:
        check_count("--steps", arguments.steps)
    if arguments.settings is not None:
        refuse(arguments, "--settings has the algorithm and all of its settings", *_CHOSEN, "overlap", "wire")
        settings = read_known_settings(arguments.settings)
        return [dataclasses.replace(settings.algorithm, global_steps=arguments.steps or settings.max_steps)]
    given = _DEFAULTS | {name: getattr(arguments, name) for name in _DEFAULTS if getattr(arguments, name) is not None}
    check_count("baseline_local_steps", given["baseline_local_steps"])
    algorithms = []
    for algorithm in [make() for name, make in ALGORITHMS.items() if name in (arguments.algorithm or ALGORITHMS)]:
        changes: dict[str, Any] = {"global_steps": arguments.steps}
        if isinstance(algorithm, Halos):
            changes |= {
                "local_steps": given["local_steps"],
                "dynamic_local_steps": not arguments.same_local_steps,
                "accumulate_updates": arguments.accumulate_updates,
                "servers_per_region": given["servers_per_region"],
            }
        elif not algorithm.averages_gradients:
            changes["local_steps"] = given["baseline_local_steps"]
        if isinstance(algorithm, ServerAlgorithm):
            changes["overlap"] = arguments.overlap
            changes["wire"] = wire
        algorithms.append(dataclasses.replace(algorithm, **changes))
    return algorithms


def _cluster(arguments: argparse.Namespace) -> tuple[str, SimulatedCluster]:
    """The name for files about the cluster, and the cluster."""
    from lightning_halos.planning.random_cluster import random_cluster

    path, size = arguments.cluster, arguments.random_cluster
    if (path is None) == (size is None):
        raise ValueError("give either the file that describes the cluster, or --random-cluster RxW such as 4x4.")
    if size is None:
        refuse(arguments, "--seed is for --random-cluster", "seed")
        return path.stem, read_cluster(path)
    regions, _, workers = size.partition("x")
    if not (regions.isdecimal() and workers.isdecimal()):
        raise ValueError(f"--random-cluster {size} must be RxW, regions and workers per region, such as 4x4.")
    return f"random-{size}", random_cluster(int(regions), int(workers), arguments.seed or 0)


def _timeline_ms(arguments: argparse.Namespace, workers: int) -> float:
    minutes: float | None = arguments.timeline_minutes
    if minutes is None:
        minutes = _TIMELINE_MINUTES * min(1.0, _TIMELINE_WORKERS / workers)
    if not minutes > 0:
        raise ValueError(f"--timeline-minutes {minutes:g} must be positive.")
    return float(min(minutes, 60 * arguments.hours) * _MS_PER_MINUTE)
