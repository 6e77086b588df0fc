"""``lightning-halos check``: says whether the servers' settings let a run converge on a cluster."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from lightning_halos.commands.inputs import given_count, given_path, read_cluster, read_known_settings
from lightning_halos.core.checks import check_count, is_positive

if TYPE_CHECKING:
    from lightning_halos.planning.settings import Settings
    from lightning_halos.planning.stability import Verdict

SUMMARY = "Say up to which inner learning rate the servers' settings are stable on a cluster, without training."
EXAMPLES = """\
examples:
  lightning-halos check settings.yaml examples/clusters/paper.yaml
      up to which inner rate the recursion of all servers converges, or which setting to lower
  lightning-halos check settings.yaml cluster.yaml --inner-rate 0.01 --curvature 30
      the same, for an inner optimizer SGD with this rate and a loss with this largest curvature
"""
UNSTABLE = 1
"""Exit status if the settings are unstable."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments, and ``run``."""
    parser.set_defaults(run=_check)
    parser.add_argument(
        "settings",
        type=given_path,
        help="a YAML file: a configuration of LightningCLI with trainer.strategy; a strategy, as its name or with"
        " class_path and init_args; or the arguments of HalosStrategy alone",
    )
    parser.add_argument("cluster", type=given_path, help="the cluster's description, a YAML file")
    parser.add_argument("--message-bytes", type=given_count, metavar="N", help="bytes of the model on a link")
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="global steps of the run, by which settings that are left out go (default: trainer.max_steps, else as"
        " many as in the paper)",
    )
    parser.add_argument("--inner-rate", type=float, metavar="R", help="learning rate of the workers' SGD")
    parser.add_argument(
        "--curvature", type=float, metavar="L", help="largest eigenvalue of the loss's Hessian; with --inner-rate"
    )


def _check(arguments: argparse.Namespace) -> int:
    from lightning_halos.core.run_length import shortcomings
    from lightning_halos.planning.planner import groups_of, make_timing
    from lightning_halos.planning.stability import MINIMUM, check

    if (arguments.inner_rate is None) != (arguments.curvature is None):
        raise ValueError("give --inner-rate and --curvature together, or none of them.")
    for name, value in (("--inner-rate", arguments.inner_rate), ("--curvature", arguments.curvature)):
        if value is not None and not is_positive(value):
            raise ValueError(f"{name}={value:g} must be a positive number.")
    rate = MINIMUM if arguments.curvature is None else arguments.inner_rate * arguments.curvature
    settings = read_known_settings(arguments.settings)
    cluster = read_cluster(arguments.cluster)
    if arguments.steps is not None:
        check_count("--steps", arguments.steps)
    steps = arguments.steps or settings.max_steps
    algorithm = dataclasses.replace(settings.algorithm, global_steps=steps)
    verdict = check(algorithm, make_timing(cluster, arguments.message_bytes), rate)
    print("\n".join(_lines(settings, verdict, rate, arguments.curvature)))
    if steps is not None:
        for shortcoming in shortcomings(algorithm, groups_of(algorithm, cluster), steps):
            print(f"\n{shortcoming}")
    return 0 if verdict.is_stable else UNSTABLE


def _lines(settings: Settings, verdict: Verdict, rate: float, curvature: float | None) -> list[str]:
    """Returns the report."""
    from lightning_halos.planning.report import count_workers, span
    from lightning_halos.planning.stability import ALONE

    plan = verdict.events.plan
    lines = [
        f"{settings.algorithm.title} with {count_workers(len(verdict.events.steps))}:"
        f" {span(verdict.events.steps)} local steps per round",
        f"staleness: {plan.pushes.mean:.2f} versions for a push on average, {plan.pushes.maximum} at most"
        + (
            ""
            if plan.updates is None
            else f"; {plan.updates.mean:.2f} and {plan.updates.maximum} for a region's update"
        ),
        "",
    ]

    def inner(value: float) -> str:
        return f"{value:.3g} / L" if curvature is None else f"{value / curvature:.3g}"

    if verdict.limit >= ALONE:
        lines.append(f"Stable up to an inner rate of {inner(ALONE)}, at which even a single worker starts to diverge.")
    else:
        lines.append(
            f"Stable up to an inner rate of {inner(verdict.limit)} (a worker alone: {inner(ALONE)}). With it, a round"
            f" goes {verdict.way:.0%} of the way to the minimum."
        )
    if curvature is None:
        lines.append("L is the largest curvature of the loss: the largest eigenvalue of its Hessian.")
    if verdict.is_stable:
        lines.append(f"The inner rate {inner(rate)} is stable.")
        return lines
    lines += [
        "",
        f"Up to the inner rate {inner(rate)} errors grow, by a factor of {verdict.growth:.3g} per round there.",
    ]
    if verdict.lower:
        lines.append("Lower the inner rate, or one of these:")
        lines += [f"  {name} to {value:.3g}" for name, value in verdict.lower.items()]
    else:
        lines.append("No single setting of the servers is enough: lower the momentum of all of them, and their rates.")
    return lines
