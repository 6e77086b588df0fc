"""Whether the servers' settings let a run converge: the growth of errors on a quadratic, for a cluster's own staleness.

It works on numbers only: no model, no training, no printing. The order of events is the plan's
(:mod:`lightning_halos.planning.planner`), the rules are those of
:mod:`lightning_halos.core.local_server` and ``global_server``. ``docs/stability.md`` derives it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import SGD, Optimizer

from lightning_halos.core.algorithms import Algorithm, Diloco, ServerAlgorithm, SynchronousAlgorithm
from lightning_halos.core.delayed_nesterov import DelayedNesterov, OptimizerFactory
from lightning_halos.planning.planner import MS_PER_HOUR, Floats, Plan, groups_of, longest_rounds, plan
from lightning_halos.simulation.timing import Timing

MINIMUM = 1.0
"""The inner rate, in units of 1 / curvature, with which a local step goes to the minimum."""
ALONE = 2.0
"""The inner rate, in these units, from which on a worker diverges without any server."""
TOLERANCE = 2e-3
"""Growth per round that still counts as none: errors of differences between workers decay slowly."""

_EXCHANGES, _ROUNDS = 40, 150  # that the recursion is followed for, at least
_EVENTS = 40_000  # but not for more events than these, beyond 20 exchanges
_FEWEST_EXCHANGES = 20
_LONGER = 4  # times as long is a run that is followed where errors grow by less than this factor per round in it:
_LITTLE = 1.01  # what shrinks in the end may grow for that long
_GRID = np.concatenate([np.geomspace(0.001, 0.02, 10)[:-1], np.linspace(0.02, 1.98, 50)])  # slow momentum: low rates
_EVERY = 16  # events between two looks at the errors, or fewer if a quarter of the run had fewer looks than these
_LOOKS = 256
_ZERO = 1e-100  # stands for errors that are 0, which have no logarithm
_REFINED = 20  # points between two points of the grid
_HALVINGS = 7


@dataclass(frozen=True)
class Rule:
    """A server optimizer that is linear in its gradients: :class:`DelayedNesterov`, or ``torch.optim.SGD``.

    Attributes:
        lr: Rate of one update.
        momentum: Decay of the momentum.
        delay: Updates in a window.
        activation: See :class:`DelayedNesterov`.
        is_heavy_ball: Whether it is ``SGD`` without ``nesterov``.
    """

    lr: float
    momentum: float
    delay: int = 1
    activation: float = 0.0
    is_heavy_ball: bool = False

    @classmethod
    def of(cls, name: str, factory: OptimizerFactory) -> Rule:
        """Returns the rule of the optimizer that a function makes.

        Raises:
            ValueError: If it is another kind of optimizer, whose updates are not linear in their gradients.
        """
        optimizer: Optimizer = factory([nn.Parameter(torch.zeros(1))])
        group: dict[str, Any] = optimizer.param_groups[0]
        if type(optimizer) is DelayedNesterov:
            return cls(group["lr"], group["momentum"], group["delay"], group["activation"])
        if type(optimizer) is SGD and not (group["weight_decay"] or group["dampening"] or group["maximize"]):
            return cls(group["lr"], group["momentum"], is_heavy_ball=not group["nesterov"])
        raise ValueError(
            f"{name} makes {type(optimizer).__name__}, whose updates are not linear in its gradients, so that its"
            " stability cannot be computed. It must be a DelayedNesterov, or an SGD without weight decay and dampening."
        )


@dataclass(frozen=True)
class Servers:
    """The settings of the servers that decide on stability.

    Attributes:
        local: The local servers' optimizer.
        outer: The global server's optimizer; ``None`` without one.
        merge_weight: Weight of the global model in a merge.
        local_name: The algorithm's argument that makes the local servers' optimizer.
    """

    local: tuple[Rule, ...]
    outer: Rule | None
    merge_weight: float
    local_name: str


@dataclass(frozen=True)
class Events:
    """The events of a run, in their order, which depends on the cluster and the rounds alone.

    Attributes:
        steps: Local steps per round, by worker.
        home: The local server of each worker; empty for synchronous rounds, in which no worker has a model of its own.
        order: Events: a kind ("push", "update", "merge" or "round") and the index of a worker or a local server. An
            update is sent when the push before it has been applied.
        sends: Numbers of the pushes after which their server sends an update.
        loaded_after: With ``overlap``, the local steps after which each worker loads an answer if its push finds the
            server free; else ``None``.
        rounds: Rounds of a worker, on average.
        plan: The plan that they are from.
    """

    steps: tuple[int, ...]
    home: tuple[int, ...]
    order: tuple[tuple[str, int], ...]
    sends: frozenset[int]
    loaded_after: tuple[int, ...] | None
    rounds: float
    plan: Plan


@dataclass(frozen=True)
class Verdict:
    """What the check found.

    Attributes:
        limit: Inner rate, in units of 1 / curvature, up to which errors do not grow; ``ALONE`` if they never do.
        way: Part of the way to its minimum that a round of the fastest worker goes at this rate.
        growth: Largest factor by which errors grow per round, of all rates up to the one that was asked for.
        lower: New values of single settings with which errors do not grow up to that rate. Empty if they do not grow
            now, or if no single setting helps.
        events: The run that it is about.
    """

    limit: float
    way: float
    growth: float
    lower: Mapping[str, float]
    events: Events

    @property
    def is_stable(self) -> bool:
        """Whether errors do not grow with any rate up to the one that was asked for."""
        return self.growth <= 1 + TOLERANCE


def check(algorithm: Algorithm, timing: Timing, rate: float = MINIMUM) -> Verdict:
    """Checks an algorithm's settings on a cluster.

    Args:
        algorithm: The algorithm.
        timing: The durations on the cluster.
        rate: The inner rate that it should be stable up to, in units of 1 / curvature, in (0, 2).

    Raises:
        ValueError: If an optimizer is of a kind that cannot be checked, or the rate is out of range.
    """
    if not 0 < rate < ALONE:
        raise ValueError(
            f"The inner rate times the curvature is {rate:g}, and must be between 0 and 2: from 2 on a worker diverges"
            " by itself, whatever the servers do."
        )
    run, grid = _Run(algorithm, timing), _grid_with(rate)
    grown = run.growth(grid)
    wanted = grid <= rate
    limit, largest = _limit(run, grid, grown), float(grown[wanted].max())
    lower = {} if largest <= 1 + TOLERANCE else _remedies(run, grid[wanted])
    steps = max(run.events.steps)
    return Verdict(limit, 1 - (1 - min(limit, MINIMUM)) ** steps, largest, lower, run.events)


def is_stable(algorithm: Algorithm, timing: Timing, rate: float = MINIMUM) -> bool:
    """Returns whether errors do not grow on a cluster with any inner rate up to ``rate``; see :func:`check`."""
    grid = _grid_with(rate)
    return _Run(algorithm, timing).is_stable(grid[grid <= rate])


def servers_of(algorithm: Algorithm, timing: Timing) -> Servers:
    """Returns the settings of an algorithm's servers.

    Raises:
        ValueError: If an optimizer is of a kind that cannot be checked, or the algorithm has no servers.
    """
    if isinstance(algorithm, ServerAlgorithm):
        groups, name = groups_of(algorithm, timing.cluster), algorithm.optimizer_argument
        number = len(groups)
        local = [Rule.of(name, algorithm.make_local_optimizer(len(group.ranks), number)) for group in groups]
        outer = Rule.of("global_optimizer", algorithm.make_global_optimizer(number)) if number > 1 else None
        return Servers(tuple(local), outer, algorithm.global_weight(), name)
    if isinstance(algorithm, Diloco):
        name = "outer_optimizer"
        return Servers((Rule.of(name, algorithm.make_outer_optimizer()),), None, 0.0, name)
    raise ValueError(f"{algorithm.title} has no servers, so there is nothing to check.")


def events_of(algorithm: Algorithm, timing: Timing, times: int = 1) -> Events:
    """Returns the events of an algorithm on a cluster, in a run long enough to see whether errors grow.

    Args:
        algorithm: The algorithm.
        timing: The durations on the cluster.
        times: How many times as long the run is.
    """
    steps = tuple(timing.local_steps(algorithm.local_steps, algorithm.dynamic_local_steps))
    rounds = longest_rounds(algorithm, timing)
    if isinstance(algorithm, SynchronousAlgorithm):
        made = plan(algorithm, timing, 2 * float(rounds.max()) / MS_PER_HOUR)
        number = times * _ROUNDS
        return Events(steps, (), (("round", 0),) * number, frozenset(), None, number, made)
    assert isinstance(algorithm, ServerAlgorithm)
    timing, home = timing.on(algorithm.wire), timing.cluster.global_region
    groups = groups_of(algorithm, timing.cluster)
    group_of = {rank: group for group in groups for rank in group.ranks}
    horizon = _ROUNDS * float(rounds.mean())
    if len(groups) > 1:
        links = [
            timing.transfer(group.region, home) + timing.serve + timing.transfer(home, group.region) for group in groups
        ]
        waits = [algorithm.period(len(group.ranks)) / float((1 / rounds[list(group.ranks)]).sum()) for group in groups]
        cycle = max(link + wait for link, wait in zip(links, waits, strict=True))
        per_cycle = cycle * float((1 / rounds).sum())
        horizon = max(horizon, cycle * min(_EXCHANGES, max(_FEWEST_EXCHANGES, _EVENTS / per_cycle)))
    horizon *= times
    made = plan(algorithm, timing, horizon / MS_PER_HOUR, horizon)
    order, sends = _order(made)
    loaded = None
    if algorithm.overlap:
        waits = [2 * timing.way(rank, group_of[rank].region) + timing.serve for rank in range(len(steps))]
        after = [math.ceil(wait / timing.compute(rank, 1)) for rank, wait in enumerate(waits)]
        loaded = tuple(min(own, max(1, number)) for own, number in zip(steps, after, strict=True))
    mean = float(made.rounds.mean())
    return Events(steps, tuple(group_of[rank].index for rank in range(len(steps))), order, sends, loaded, mean, made)


def _order(made: Plan) -> tuple[tuple[tuple[str, int], ...], frozenset[int]]:
    """Returns the events of a plan, and the numbers of the pushes (among the pushes) after which an update is sent."""
    recording = made.recording
    rows: list[tuple[float, int, str, int, bool]] = []
    exchanges = recording.exchanges or (None,) * len(recording.pushes)
    for group, pushes, own in zip(recording.groups, recording.pushes, exchanges, strict=True):
        sending = set() if own is None else set(own.sent_versions.tolist())
        for version, (time, worker) in enumerate(zip(pushes.times.tolist(), pushes.senders.tolist(), strict=True), 1):
            rows.append((time, 0, "push", worker, version in sending))
        for merged in [] if own is None else own.merged.tolist():
            if merged <= recording.until_ms:
                rows.append((merged, 2, "merge", group.index, False))
    if recording.updates is not None:
        updates = recording.updates
        for time, index in zip(updates.times.tolist(), updates.senders.tolist(), strict=True):
            rows.append((time, 1, "update", index, False))
    rows.sort(key=lambda row: row[:2])
    pushes_in_order = [sends for *_, kind, _, sends in rows if kind == "push"]
    sends = frozenset(number for number, does_send in enumerate(pushes_in_order) if does_send)
    return tuple((kind, index) for _, _, kind, index, _ in rows), sends


class _Model:
    """A server's model, and the state of its optimizer."""

    def __init__(self, rule: Rule, size: int) -> None:
        self.rule = rule
        self.model = np.ones(size)
        self.momentum = np.zeros(size)
        self.delta = np.zeros(size)
        self._count = 0

    def apply(self, gradient: Floats) -> None:
        """Applies a gradient by the formulas of :class:`DelayedNesterov`, or of ``SGD``."""
        rule, d, c = self.rule, self.rule.delay, self.rule.activation
        if rule.is_heavy_ball:
            self.momentum = rule.momentum * self.momentum + gradient
            self.model = self.model - rule.lr * self.momentum
            return
        self.delta = self.delta + gradient
        self._count += 1
        share = c
        if self._count % d == 0:
            self.momentum = rule.momentum * self.momentum + self.delta / d
            self.delta = np.zeros_like(gradient)
            share = 1 - c * d + c
        self.model = self.model - rule.lr * (d * share * rule.momentum * self.momentum + gradient)


def growth(events: Events, servers: Servers, rates: Floats) -> Floats:
    """Returns the factors by which errors grow per round, on a quadratic, for inner rates in units of 1 / curvature.

    A local step multiplies a worker's error by ``1 - rate``. So everything is linear in the errors, and the recursion
    of all models is followed for each rate, from errors of 1. The factor compares the last two quarters of the run.
    """
    state = _Recursion(events, servers, rates)
    length = len(events.order)
    apart = length // 4
    every = max(1, min(_EVERY, apart // _LOOKS))
    quarters: tuple[list[Floats], list[Floats]] = ([], [])
    scale = np.zeros(len(rates))
    for number, _ in enumerate(state.run(), 2 * apart - length):  # from 0 on, it is in the last two quarters
        if number % apart % every:  # the same places in both of them
            continue
        size = state.size()
        if number >= 0:
            quarters[number // apart].append(scale + np.log(size))
        if size.max() > 1e30 or size.min() < 1e-30:
            scale = scale + np.log(state.rescale())
    third, last = (_log_mean(np.array(quarter)) for quarter in quarters)
    factors: Floats = np.exp((last - third) / (events.rounds * apart / length))
    return factors


def _log_mean(logarithms: Floats) -> Floats:
    top = logarithms.max(axis=0)
    mean: Floats = top + np.log(np.exp(logarithms - top).mean(axis=0))
    return mean


class _Recursion:
    """The errors of all models on quadratics, one for each inner rate."""

    def __init__(self, events: Events, servers: Servers, rates: Floats) -> None:
        number = len(rates)
        self._events = events
        self._weight = servers.merge_weight
        self._left = 1 - rates  # what a local step leaves of an error
        self._round_leaves = [self._left**steps for steps in events.steps]
        self._locals = [_Model(rule, number) for rule in servers.local]
        self._global = None if servers.outer is None else _Model(servers.outer, number)
        self._pulled = [np.ones(number) for _ in events.home]
        self._pushed: list[Floats | None] = [None] * len(events.home)
        self._bases = [np.ones(number) if self._global else np.zeros(number) for _ in servers.local]
        self._on_the_way = [np.zeros(number) for _ in servers.local]  # updates, then their answers

    def run(self) -> Iterator[None]:
        """Goes through the events, one at a time."""
        pushes = 0
        for kind, index in self._events.order:
            if kind == "push":
                self._push(index, pushes in self._events.sends)
                pushes += 1
            elif kind == "update":
                assert self._global is not None
                self._global.apply(self._on_the_way[index])
                self._on_the_way[index] = self._global.model
            elif kind == "merge":
                server = self._locals[index]
                server.model = (1 - self._weight) * server.model + self._weight * self._on_the_way[index]
                self._bases[index] = server.model
            else:
                server = self._locals[0]
                left = np.mean(self._round_leaves, axis=0)
                server.apply(server.model * (1 - left))
            yield

    def _push(self, worker: int, sends: bool) -> None:
        server, base = self._locals[self._events.home[worker]], self._pulled[worker]
        end = self._round_leaves[worker] * base
        pushed, loaded = self._pushed[worker], self._events.loaded_after
        if pushed is not None and loaded is not None:
            # It has trained on from what it had pushed, and then loaded the answer.
            before, after = self._left ** loaded[worker], self._left ** (self._events.steps[worker] - loaded[worker])
            end = after * (base + (before - 1) * pushed)
        server.apply(base - end)
        self._pulled[worker], self._pushed[worker] = server.model, end
        if sends:
            index = self._events.home[worker]
            self._on_the_way[index] = self._bases[index] - server.model
            self._bases[index] = server.model

    def _servers(self) -> list[_Model]:
        return [*self._locals, *([] if self._global is None else [self._global])]

    def size(self) -> Floats:
        """Returns the size of the errors, for each rate."""
        squares = [server.model**2 + server.momentum**2 for server in self._servers()]
        total: Floats = np.maximum(np.sqrt(np.sum(squares, axis=0)), _ZERO)
        return total

    def rescale(self) -> Floats:
        """Divides all errors, which are linear in each other, by the largest of them. Returns it, for each rate.

        It may be that of a slow worker, whose model is far from those of the servers by now.
        """
        values = [value for server in self._servers() for value in (server.model, server.momentum, server.delta)]
        values += [*self._pulled, *self._bases, *self._on_the_way, *(own for own in self._pushed if own is not None)]
        largest: Floats = np.maximum(np.abs(values).max(axis=0), _ZERO)
        for server in self._servers():
            server.model, server.momentum = server.model / largest, server.momentum / largest
            server.delta = server.delta / largest
        for held in (self._pulled, self._bases, self._on_the_way):
            held[:] = [value / largest for value in held]
        self._pushed = [None if value is None else value / largest for value in self._pushed]
        return largest


class _Run:
    """A run of an algorithm on a cluster, and a longer one for rates that it leaves in doubt."""

    def __init__(self, algorithm: Algorithm, timing: Timing) -> None:
        self._algorithm, self._timing = algorithm, timing
        self.events, self.servers = events_of(algorithm, timing), servers_of(algorithm, timing)

    @cached_property
    def _longer(self) -> Events:
        return events_of(self._algorithm, self._timing, _LONGER)

    def growth(self, rates: Floats, servers: Servers | None = None) -> Floats:
        """Returns what :func:`growth` does, also with other settings of the servers."""
        servers = servers or self.servers
        factors = growth(self.events, servers, rates)
        is_doubtful = (factors > 1 + TOLERANCE) & (factors < _LITTLE)
        if is_doubtful.any():
            factors[is_doubtful] = growth(self._longer, servers, rates[is_doubtful])
        return factors

    def is_stable(self, rates: Floats, servers: Servers | None = None) -> bool:
        """Returns whether errors grow at none of the rates."""
        return bool(self.growth(rates, servers).max() <= 1 + TOLERANCE)


def _grid_with(rate: float) -> Floats:
    """Returns the rates that are looked at. One of them is the given one, so that what is stable up to it is."""
    rates: Floats = np.union1d(_GRID, rate)
    return rates


def _limit(run: _Run, grid: Floats, grown: Floats) -> float:
    """Returns the rate below the first one at which errors grow.

    Args:
        run: The run.
        grid: The rates that have been looked at.
        grown: The growth at these rates.
    """
    grows = grown > 1 + TOLERANCE
    if not grows.any():
        return ALONE
    first = int(grows.argmax())
    low = float(grid[first - 1]) if first else 0.0
    between = np.linspace(low, float(grid[first]), _REFINED + 1)
    grows = run.growth(between[1:]) > 1 + TOLERANCE
    grows[-1] = True  # whatever the rounding
    return float(between[int(grows.argmax())])


def _remedies(run: _Run, rates: Floats) -> dict[str, float]:
    """Returns the largest lower values of single settings with which errors do not grow at any of the rates."""
    remedies, servers = {}, run.servers
    for place, name in (("local", "lr"), ("local", "momentum"), ("outer", "lr"), ("outer", "momentum")):
        rules = servers.local if place == "local" else (servers.outer,)
        values = [getattr(rule, name) for rule in rules if rule is not None]
        if not values or not max(values):
            continue

        def is_stable(factor: float, place: str = place, name: str = name) -> bool:
            return run.is_stable(rates, _scaled(servers, place, name, factor))

        factor = _largest(is_stable)
        if factor is not None:
            argument = servers.local_name if place == "local" else "global_optimizer"
            remedies[f"{argument}: {name}"] = factor * max(values)
    return remedies


def _scaled(servers: Servers, place: str, name: str, factor: float) -> Servers:
    def scale(rule: Rule) -> Rule:
        return dataclasses.replace(rule, **{name: factor * getattr(rule, name)})

    if place == "local":
        return dataclasses.replace(servers, local=tuple(map(scale, servers.local)))
    assert servers.outer is not None
    return dataclasses.replace(servers, outer=scale(servers.outer))


def _largest(is_stable: Callable[[float], bool]) -> float | None:
    """Returns the largest factor below 1 that is stable, by halving; ``None`` if not even a tiny one is."""
    low, high = 0.0, 1.0
    if not is_stable(low):
        return None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_stable(middle) else (low, middle)
    return low or None
