"""The search space of an algorithm on a cluster: its parameters, and the settings that their values mean.

Settings are the arguments of a strategy as LightningCLI has them: an optimizer is a ``class_path`` with ``init_args``.
Nothing is drawn here; optuna does that.

Parameters are chosen so that each can be changed without the others. A server's rate is given as its *gain*,

    gain = rate * pushes of a round of all its workers / (1 - momentum)

which is the part of the way to their mean that the model goes in the long run when every worker pushes once: with gain
1, a round of all workers moves the server's model to the mean of theirs, whatever the momentum and the number of
workers. Momentum is given as the binary logarithm of its *memory* 1 / (1 - momentum), and is 0 where that is negative,
which is for a third of the range. A delay is given in rounds of all workers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from lightning_halos.core.algorithms import Algorithm, Diloco, Halos, ServerAlgorithm
from lightning_halos.core.delayed_nesterov import DelayedNesterov
from lightning_halos.core.wire_formats import PLAIN, WireFormats
from lightning_halos.planning.pace import pace_of
from lightning_halos.planning.planner import groups_of, plan
from lightning_halos.planning.settings import make_arguments
from lightning_halos.planning.stability import Rule, is_stable, servers_of
from lightning_halos.simulation.timing import Timing

Values = dict[str, Any]
"""A value for each parameter."""
Settings = dict[str, Any]

FEWEST_STEPS = 12
"""Global steps that a trial has to have time for."""
_FEWEST_EXCHANGES = 4  # of each region, on average
_WORTH = 1.03  # how many times as fast overlap or a narrow wire has to make a step, to be tried
_STEP = 0.2  # of the range of a parameter, when it is varied
_CHANGED = 0.4  # share of the parameters that are varied together
_MEMORY = (-1.75, 3.5)
_WINDOW = (0.25, 8.0)
_GAIN = (0.25, 8.0)


@dataclass(frozen=True)
class Number:
    """A parameter that is a number."""

    low: float
    high: float
    is_log: bool = False
    is_whole: bool = False

    def near(self, value: float, random: Random) -> float:
        """Returns a value near another one: a normal step whose standard deviation is a fifth of the range."""
        low, high = (math.log(self.low), math.log(self.high)) if self.is_log else (self.low, self.high)
        place = (math.log(value) if self.is_log else value) + random.gauss(0, _STEP * (high - low))
        number = math.exp(place) if self.is_log else place
        return min(max(round(number) if self.is_whole else number, self.low), self.high)

    def including(self, value: float) -> Number:
        """Returns the same with a range that includes a value."""
        return dataclasses.replace(self, low=min(self.low, value), high=max(self.high, value))


@dataclass(frozen=True)
class Choice:
    """A parameter that is one of some values."""

    values: tuple[Any, ...]

    def near(self, value: Any, random: Random) -> Any:
        """Returns another value, or the same."""
        return random.choice(self.values)

    def including(self, value: Any) -> Choice:
        """Returns the same with a value among its values."""
        return self if value in self.values else Choice((*self.values, value))


Parameter = Number | Choice


@dataclass(frozen=True)
class _Server:
    """A server optimizer that is varied, of one server or of several that have it in common.

    Attributes:
        argument: The strategy's argument.
        prefix: Of its parameters' names.
        sizes: Updates that each server gets in a round of all that push to it; 1 if it gets their mean.
        has_delay: Whether it is a :class:`DelayedNesterov`, else SGD with Nesterov momentum.
    """

    argument: str
    prefix: str
    sizes: tuple[int, ...]
    has_delay: bool

    @property
    def pushes(self) -> float:
        """Updates in a round, on average over the servers."""
        return sum(self.sizes) / len(self.sizes)

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Its parameters."""
        parameters: dict[str, Parameter] = {
            f"{self.prefix}gain": Number(*_GAIN, is_log=True),
            f"{self.prefix}memory": Number(*_MEMORY),
        }
        if self.has_delay:
            parameters[f"{self.prefix}window"] = Number(*_WINDOW, is_log=True)
        return parameters

    def settings(self, values: Values) -> Settings:
        """Returns the optimizer that values mean."""
        momentum = max(0.0, _rounded(1 - 2 ** -values[f"{self.prefix}memory"]))
        rate = _rounded(values[f"{self.prefix}gain"] * (1 - momentum) / self.pushes)
        if not self.has_delay:
            arguments = {"lr": rate, **({"momentum": momentum, "nesterov": True} if momentum else {})}
            return {"class_path": "torch.optim.SGD", "init_args": arguments}
        delay = max(1, round(values[f"{self.prefix}window"] * self.pushes)) if momentum else 1
        return {
            "class_path": f"lightning_halos.{DelayedNesterov.__name__}",
            "init_args": {"lr": rate, "momentum": momentum, "delay": delay},
        }

    def values(self, rules: Sequence[Rule]) -> Values:
        """Returns the values that the servers' optimizers come from, or the nearest ones.

        Raises:
            ValueError: If no values mean such a rate or momentum.
        """
        for rule in rules:
            if rule.lr <= 0:
                raise ValueError(f"{self.argument} has lr={rule.lr:g}, which must be positive.")
            if not 0 <= rule.momentum < 1:
                raise ValueError(f"{self.argument} has momentum={rule.momentum:g}, which must be in [0, 1).")
        left, rates = 1 - rules[0].momentum, [rule.lr for rule in rules]
        gain = sum(rate * size for rate, size in zip(rates, self.sizes, strict=True)) / len(self.sizes) / left
        values = {f"{self.prefix}gain": gain, f"{self.prefix}memory": -math.log2(left)}
        if self.has_delay:
            delay = sum(rule.delay for rule in rules) / len(rules)
            values[f"{self.prefix}window"] = delay / self.pushes if rules[0].momentum else 1.0
        return values


class Space:
    """The parameters of an algorithm that have an effect on a cluster.

    Args:
        algorithm: The algorithm with the settings to start from. The ranges include them.
        timing: The durations on the cluster.
        fixed: Settings that are not varied.
        kept: The settings to start from. Those that no parameter is about stay as they are.
        default: The algorithm with its default settings and the fixed ones, which the ranges include, too. Default:
            ``algorithm``.

    Attributes:
        parameters: The parameters, by name.
        start: The values that the algorithm's settings come from, or the nearest ones.
        defaults: The same for the default settings; ``None`` if these have another kind of servers.
        workers: Workers of each server that workers push to.
        common: Arguments that get one value for all local servers, although these have different numbers of workers.
            Their defaults are one per server, which no values mean.

    Raises:
        ValueError: If nothing can be varied.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        timing: Timing,
        fixed: Settings,
        kept: Mapping[str, Any] | None = None,
        default: Algorithm | None = None,
    ) -> None:
        self._timing, self._fixed, self._kept = timing, dict(fixed), dict(kept or {})
        self._default = algorithm if default is None else default
        self._servers, sizes = _servers(algorithm, timing), _sizes(algorithm, timing)
        self.workers, self._mean_workers = sizes, sum(sizes) / len(sizes)
        parameters: dict[str, Parameter]
        if isinstance(algorithm, ServerAlgorithm):
            parameters = {"local_steps": Number(1, 64, is_log=True, is_whole=True)}
            if len(sizes) > 1:
                parameters["pushes_per_worker"] = Number(0.5, 16, is_log=True)
                parameters["merge_weight"] = Number(0.05, 1.0)
            parameters |= _of_links(algorithm, timing)
        else:
            parameters = {
                "local_steps": Number(4, 128, is_log=True, is_whole=True),
                "dynamic_local_steps": Choice((False, True)),
            }
        for server in self._servers:
            parameters |= server.parameters
        free = {name: parameter for name, parameter in parameters.items() if self._argument(name) not in self._fixed}
        if not free:
            raise ValueError(f"Nothing is left to tune: {', '.join(sorted(self._fixed))} are all fixed.")
        values, others = _values(algorithm, timing), _values(self._default, timing)
        self.start = {name: values[name] for name in free}
        self.defaults = {name: others[name] for name in free} if free.keys() <= others.keys() else None
        self.parameters = {name: parameter.including(values[name]) for name, parameter in free.items()}
        if self.defaults is not None:
            for name, value in self.defaults.items():
                self.parameters[name] = self.parameters[name].including(value)
        by_size = ("accumulate_updates", self._servers[0].argument) if len(set(sizes)) > 1 else ()
        self.common = tuple(name for name in by_size if name not in self._fixed)

    def _argument(self, parameter: str) -> str:
        """Returns the strategy's argument that a parameter is about."""
        if parameter.startswith("wire_"):
            return "wire"
        if parameter == "pushes_per_worker":
            return "accumulate_updates"
        found = [server.argument for server in self._servers if parameter in server.parameters]
        return found[0] if found else parameter

    @property
    def averaging(self) -> Values:
        """Values with which every server moves to the mean of what is pushed to it, without momentum.

        Of local servers with different numbers of workers, one with the mean number does.
        """
        changes: Values = {"pushes_per_worker": 2.0}
        for server in self._servers:
            changes |= {f"{server.prefix}gain": 1.0, f"{server.prefix}memory": 0.0, f"{server.prefix}window": 1.0}
        return {name: changes.get(name, value) for name, value in self.start.items()}

    def near(self, values: Values, random: Random) -> Values:
        """Returns values of which some were drawn again, near those that are given. They may mean the same settings."""
        changed = [name for name in self.parameters if random.random() < _CHANGED]
        changed = changed or [random.choice(list(self.parameters))]
        return {
            name: parameter.near(values[name], random) if name in changed else values[name]
            for name, parameter in self.parameters.items()
        }

    def settings(self, values: Values) -> Settings:
        """Returns the settings that values mean, with those that are kept and the fixed ones."""
        return {**self._kept, **self._varied(values, self._kept), **self._fixed}

    def complete(self, settings: Settings, values: Values) -> Settings:
        """Returns settings with all arguments that are varied, as in :meth:`settings`, so that they can be compared.

        Args:
            settings: The settings, which may leave out arguments that are defaults.
            values: The values that they come from.
        """
        varied = self._varied(values, settings)
        return settings | {
            name: value for name, value in varied.items() if name not in self.common or settings.get(name) is not None
        }

    def _varied(self, values: Values, others: Mapping[str, Any]) -> Settings:
        """Returns the settings that values mean, beside others: a format is for one kind of link, of two."""
        settings: Settings = {}
        for name in ("local_steps", "dynamic_local_steps", "overlap"):
            if name in values:
                settings[name] = values[name]
        if "pushes_per_worker" in values:
            settings["accumulate_updates"] = max(1, round(values["pushes_per_worker"] * self._mean_workers))
        if "merge_weight" in values:
            settings["merge_weight"] = _rounded(values["merge_weight"])
        for server in self._servers:
            if f"{server.prefix}gain" in values:
                settings[server.argument] = server.settings(values)
        if wire := {name.removeprefix("wire_"): form for name, form in values.items() if name.startswith("wire_")}:
            settings["wire"] = {**dataclasses.asdict(WireFormats.of(others.get("wire", PLAIN))), **wire}
        return settings

    def algorithm(self, settings: Settings) -> Algorithm:
        """Returns the algorithm with settings. Those that are left out are defaults."""
        return dataclasses.replace(self._default, **make_arguments(type(self._default), settings))

    def steps(self, settings: Settings, seconds: float) -> int:
        """Returns the global steps that settings can do in a virtual time."""
        return pace_of(self.algorithm(settings), self._timing).steps(seconds)

    def objection(self, settings: Settings, seconds: float) -> str | None:
        """Says why settings need not be tried, or returns ``None``.

        The reasons can be computed without training: an update of the servers that makes errors grow
        (:mod:`~lightning_halos.planning.stability`), and too few steps or exchanges in the virtual time.
        """
        algorithm = self.algorithm(settings)
        steps = pace_of(algorithm, self._timing).steps(seconds)
        if steps < FEWEST_STEPS:
            return f"only {steps} global steps in the time"
        if isinstance(algorithm, Halos) and "accumulate_updates" in settings:
            try:
                made = plan(algorithm, self._timing, seconds / 3600)
            except ValueError:
                return "no round ends in the time"
            if made.updates is not None and made.updates.count < _FEWEST_EXCHANGES * len(made.accumulate_updates):
                return "too few exchanges in the time"
        if not is_stable(algorithm, self._timing):
            return "unstable"
        return None


def _sizes(algorithm: Algorithm, timing: Timing) -> tuple[int, ...]:
    """Returns the numbers of workers of the servers that workers push to."""
    if not isinstance(algorithm, ServerAlgorithm):
        return (timing.cluster.num_workers,)
    return tuple(len(group.ranks) for group in groups_of(algorithm, timing.cluster))


def _servers(algorithm: Algorithm, timing: Timing) -> list[_Server]:
    """Returns the server optimizers that can be varied.

    Raises:
        ValueError: If there are none.
    """
    if isinstance(algorithm, Diloco):
        return [_Server("outer_optimizer", "", (1,), has_delay=False)]
    if not isinstance(algorithm, ServerAlgorithm):
        raise ValueError(f"{algorithm.title} has no settings to tune but the module's own optimizer.")
    name, sizes = algorithm.optimizer_argument, _sizes(algorithm, timing)
    if len(sizes) == 1:
        return [_Server(name, "", sizes, has_delay=True)]
    return [
        _Server(name, "local_", sizes, has_delay=True),
        _Server("global_optimizer", "global_", (len(sizes),), has_delay=True),
    ]


def _values(algorithm: Algorithm, timing: Timing) -> Values:
    """Returns the values that an algorithm's settings come from, also of parameters that have no effect."""
    values: Values = {"local_steps": algorithm.local_steps, "dynamic_local_steps": algorithm.dynamic_local_steps}
    sizes = _sizes(algorithm, timing)
    if isinstance(algorithm, ServerAlgorithm):
        values["overlap"] = algorithm.overlap
        values |= {f"wire_{link}": form for link, form in dataclasses.asdict(algorithm.wire).items()}
        if len(sizes) > 1:
            values["pushes_per_worker"] = sum(map(algorithm.period, sizes)) / sum(sizes)
            values["merge_weight"] = algorithm.global_weight()
    found = servers_of(algorithm, timing)
    rules = [found.local, *([] if found.outer is None else [(found.outer,)])]
    for server, own in zip(_servers(algorithm, timing), rules, strict=True):
        values |= server.values(own)
    return values


def _of_links(algorithm: ServerAlgorithm, timing: Timing) -> dict[str, Parameter]:
    """Returns the parameters that have an effect only where links are slow."""
    parameters: dict[str, Parameter] = {}
    for link in ("within", "between"):
        wires = [WireFormats.of({**dataclasses.asdict(algorithm.wire), link: form}) for form in ("float32", "int4")]
        wide, narrow = (pace_of(dataclasses.replace(algorithm, wire=wire), timing).step for wire in wires)
        # An update between regions is older the longer its message takes, also where no worker waits for it.
        if wide / narrow > _WORTH or (link == "between" and len(timing.cluster.regions) > 1):
            parameters[f"wire_{link}"] = Choice(("float32", "int8", "int4"))
    other = dataclasses.replace(algorithm, overlap=not algorithm.overlap)
    faster = pace_of(other, timing).step / pace_of(algorithm, timing).step
    if max(faster, 1 / faster) > _WORTH:
        parameters["overlap"] = Choice((False, True))
    return parameters


def _rounded(value: float) -> float:
    """Rounds to three significant digits, so that people can read and copy what was trained."""
    return float(f"{value:.3g}")
