"""Says which default settings a run has, and whether it is long enough for its settings.

It works on numbers only. The rule for the defaults is in :mod:`lightning_halos.core.algorithms.defaults`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lightning_halos.core.algorithms.base import Algorithm, ServerAlgorithm
from lightning_halos.core.algorithms.diloco import Diloco
from lightning_halos.core.delayed_nesterov import OptimizerFactory
from lightning_halos.core.topology import ServerGroup

_FEWEST_EXCHANGES = 3
_LARGEST_SHARE, _GOOD_SHARE = 0.25, 0.05  # of a server's updates, over which its momentum acts


def settings(algorithm: Algorithm, groups: Sequence[ServerGroup], joins: bool = False) -> dict[str, Any]:
    """Returns the servers' settings that are defaults, by the names of the strategy's arguments.

    Optimizers are dictionaries of their arguments. Settings that depend on the number of a server's workers are those
    of the server with the most.

    Args:
        algorithm: The algorithm.
        groups: The local servers and their workers.
        joins: Whether they are one job of several, whose global server is elsewhere and has settings of its own.
    """
    values: dict[str, Any] = {}
    if isinstance(algorithm, ServerAlgorithm) and (joins or len(groups) > 1):
        values["accumulate_updates"] = algorithm.period(_workers(groups))
        values["merge_weight"] = algorithm.global_weight()
    fields = {field.name for field in dataclasses.fields(algorithm)}
    values = {name: value for name, value in values.items() if name in fields and getattr(algorithm, name) is None}
    for name, factory in _optimizers(algorithm, groups, joins).items():
        if name in fields and getattr(algorithm, name) is None:
            group = _arguments(factory)
            values[name] = {key: group[key] for key in ("lr", "momentum", "delay") if key in group}
    return values


def length_of_defaults(algorithm: Algorithm) -> str:
    """Returns the length of the runs that an algorithm's defaults are for, for users."""
    is_long = algorithm.defaults == "published" or algorithm.global_steps is None
    return "a long run" if is_long else f"{algorithm.global_steps} global steps"


def summary(algorithm: Algorithm, groups: Sequence[ServerGroup], joins: bool = False, reason: str = "") -> str:
    """Returns the defaults as a line for users; empty if there are none.

    Args:
        algorithm: The algorithm.
        groups: As for :func:`settings`.
        joins: As for :func:`settings`.
        reason: Why the defaults are for another length than that of the run, if they are.
    """
    chosen = settings(algorithm, groups, joins)
    if not chosen:
        return ""
    words = []
    for name, value in chosen.items():
        if isinstance(value, dict):
            value = "/".join(f"{number:.3g}" for number in value.values()) + f" ({'/'.join(value)})"
        words.append(f"{name} {value}")
    why = f" ({reason})" if reason and algorithm.defaults == "run" else ""
    return f"{algorithm.title}, defaults for {length_of_defaults(algorithm)}{why}: {', '.join(words)}."


def shortcomings(algorithm: Algorithm, groups: Sequence[ServerGroup], global_steps: int) -> list[str]:
    """Says for which of its settings a run is too short, and what to lower.

    Args:
        algorithm: The algorithm.
        groups: The local servers and their workers.
        global_steps: Length of the run.
    """
    return [*_few_exchanges(algorithm, groups, global_steps), *_slow_momenta(algorithm, groups, global_steps)]


def _few_exchanges(algorithm: Algorithm, groups: Sequence[ServerGroup], global_steps: int) -> Iterator[str]:
    if not isinstance(algorithm, ServerAlgorithm) or len(groups) == 1:
        return
    workers = min(len(group.ranks) for group in groups)
    period, pushes = algorithm.period(workers), workers * global_steps / algorithm.local_steps
    if pushes >= _FEWEST_EXCHANGES * period:
        return
    lower = max(1, int(pushes / (2 * _FEWEST_EXCHANGES)))
    if lower < period and global_steps >= _FEWEST_EXCHANGES * algorithm.local_steps:
        remedy = f"Lower accumulate_updates to {lower}."
    elif (steps := max(1, global_steps // _FEWEST_EXCHANGES)) < algorithm.local_steps:
        remedy = f"Lower local_steps to {steps}, or train longer."
    else:
        remedy = "Train longer."
    yield (
        f"{global_steps} global steps are few for accumulate_updates={period}: a server with {workers} worker(s) gets"
        f" about {round(pushes, 1):g} pushes, and exchanges with the global server {pushes / period:.1f} times."
        f" {remedy}"
    )


def _slow_momenta(algorithm: Algorithm, groups: Sequence[ServerGroup], global_steps: int) -> Iterator[str]:
    rounds, workers = global_steps / algorithm.local_steps, _workers(groups)
    updates = {"outer_optimizer": rounds}
    if isinstance(algorithm, ServerAlgorithm):
        updates[algorithm.optimizer_argument] = rounds * workers
        pushes = sum(len(group.ranks) / algorithm.period(len(group.ranks)) for group in groups)
        updates["global_optimizer"] = rounds * pushes
    for name, factory in _optimizers(algorithm, groups).items():
        if getattr(algorithm, name, None) is None and algorithm.defaults == "run":
            continue
        group = _arguments(factory)
        momentum, delay = group.get("momentum") or 0.0, group.get("delay", 1)
        time = delay / (1 - momentum) if momentum < 1 else float("inf")
        if not momentum or time <= _LARGEST_SHARE * updates[name]:
            continue
        lower = max(0.0, 1 - delay / (_GOOD_SHARE * updates[name]))
        yield (
            f"{global_steps} global steps are few for the momentum {momentum:g} of {name}, which adds up about"
            f" {time:.0f} updates: the server gets about {updates[name]:.0f}. Lower the momentum to {lower:.2g}, with"
            " rates that sum to 1 over all senders, or leave the optimizer to its default."
        )


def _optimizers(
    algorithm: Algorithm, groups: Sequence[ServerGroup], joins: bool = False
) -> dict[str, OptimizerFactory]:
    """Returns the functions that make the servers' optimizers, by the names of the algorithm's arguments."""
    if isinstance(algorithm, Diloco):
        return {"outer_optimizer": algorithm.make_outer_optimizer()}
    if not isinstance(algorithm, ServerAlgorithm):
        return {}
    number = len(groups) + joins
    factories = {algorithm.optimizer_argument: algorithm.make_local_optimizer(_workers(groups), number)}
    if number > 1 and not joins:
        factories["global_optimizer"] = algorithm.make_global_optimizer(number)
    return factories


def _arguments(factory: OptimizerFactory) -> dict[str, Any]:
    """Returns the arguments of an optimizer; none if its function works with the parameters of the module only."""
    try:
        return dict(factory([nn.Parameter(torch.zeros(1))]).param_groups[0])
    except Exception:  # a user's function, which the run calls with other parameters; this is only for a warning
        return {}


def _workers(groups: Sequence[ServerGroup]) -> int:
    return max(len(group.ranks) for group in groups)
