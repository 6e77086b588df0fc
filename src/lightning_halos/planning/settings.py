"""Settings of a run in YAML, as LightningCLI has them, without Lightning and without starting anything.

What the settings mean is decided by the algorithms in ``core``.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_halos.core.algorithms import Algorithm, AsyncLocalSGD, Diloco, Halos, SyncSGD
from lightning_halos.core.checks import is_finite, is_number
from lightning_halos.core.delayed_nesterov import DelayedNesterov
from lightning_halos.core.wire_formats import WireFormats
from lightning_halos.yaml_files import read_yaml

_ALGORITHMS: dict[str, type[Algorithm]] = {
    "HalosStrategy": Halos,
    "AsyncLocalSGDStrategy": AsyncLocalSGD,
    "DilocoStrategy": Diloco,
    "SyncSGDStrategy": SyncSGD,
}
_NAMES = {
    "halos": "HalosStrategy",
    "halos_spawn": "HalosStrategy",
    "halos_fork": "HalosStrategy",
    "halos_notebook": "HalosStrategy",
    "async_local_sgd": "AsyncLocalSGDStrategy",
    "diloco": "DilocoStrategy",
    "sync_sgd": "SyncSGDStrategy",
}
_OPTIMIZERS: dict[str, type[Optimizer]] = {"DelayedNesterov": DelayedNesterov}
_OF_RUN = {"global_steps", "has_momentum"}
"""What a run finds out by itself."""
_OF_DEVICE = {"foreach", "fused", "capturable", "differentiable"}
"""Arguments of optimizers that say how an update is computed, and not which one."""
_EXAMPLE = "lr: 0.7"  # of an optimizer's arguments


class Settings(NamedTuple):
    """What a file of settings says."""

    algorithm: Algorithm
    strategy: str  # name of the strategy's class
    arguments: Mapping[str, Any]  # that the file gives it, as they are there
    max_steps: int | None = None  # of the Trainer, in a configuration that has it


def read_settings(path: Path) -> Settings:
    """Reads a file of settings.

    Args:
        path: A YAML file: a configuration of ``LightningCLI``, of which it reads ``trainer.strategy``; or a strategy,
            as its name or with ``class_path`` and ``init_args``; or the arguments of ``HalosStrategy`` alone.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not such a file, or a setting of the algorithm is invalid.
    """
    settings = read_yaml(path, "has the settings")
    try:
        name, arguments = _strategy(settings)
        kind = _ALGORITHMS[name]
        algorithm = kind(**make_arguments(kind, arguments))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return Settings(algorithm, name, arguments, _max_steps(settings))


def _max_steps(settings: Any) -> int | None:
    """Returns the length of the run that a configuration of ``LightningCLI`` asks for, if it has one."""
    trainer = settings.get("trainer") if isinstance(settings, Mapping) else None
    steps = trainer.get("max_steps") if isinstance(trainer, Mapping) else None
    return steps if isinstance(steps, int) and steps > 0 else None


def _strategy(settings: Any) -> tuple[str, Mapping[str, Any]]:
    """Returns the name of the strategy's class in settings, and its arguments."""
    if isinstance(settings, Mapping) and "trainer" in settings:
        trainer = settings["trainer"]
        settings = trainer.get("strategy") if isinstance(trainer, Mapping) else None
        if settings is None:
            raise ValueError("trainer.strategy is missing. Give one there, such as trainer: {strategy: halos}.")
    if isinstance(settings, str):
        settings = {"class_path": _NAMES.get(settings, settings)}
    if settings is None:
        settings = {}
    if not isinstance(settings, Mapping):
        raise ValueError("it must contain a mapping: trainer.strategy of LightningCLI, or the arguments of a strategy.")
    name, arguments = "HalosStrategy", settings
    if "class_path" in settings:
        path = str(settings["class_path"])
        name = _own_name(path)
        if name not in _ALGORITHMS:
            raise ValueError(f"the strategy is {path}, and must be one of {', '.join(_ALGORITHMS)}.")
        arguments = _init_args(name, settings, "local_steps: 8")
    return name, arguments


def _own_name(path: str) -> str:
    """Returns the name of a class of this package, with or without its module; empty if it is of another package."""
    module, _, name = path.rpartition(".")
    return name if module.partition(".")[0] in ("", "lightning_halos") else ""


def make_arguments(kind: type[Algorithm], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of an algorithm among settings, with functions for its optimizers.

    Args:
        kind: The algorithm's class.
        settings: Arguments of its strategy as in YAML: an optimizer is a mapping with ``class_path`` and ``init_args``.

    Raises:
        ValueError: If an optimizer is invalid.
    """
    chosen = {key: value for key, value in settings.items() if key in _fields(kind)}
    for key, value in chosen.items():
        if key.endswith("optimizer") and value is not None:
            chosen[key] = _optimizer(key, value)
    return chosen


def name_defaults(settings: Mapping[str, Any], algorithm: Algorithm, known: Collection[str]) -> dict[str, Any]:
    """Returns settings that name what they leave to defaults, too, also inside optimizers.

    LightningCLI merges the arguments of a strategy, and of an optimizer, with those of other configurations. What a
    configuration leaves out has the value of another one there.

    Args:
        settings: Arguments of a strategy as in YAML.
        algorithm: The algorithm that they make.
        known: The arguments that the strategy has.
    """
    named: dict[str, Any] = {}
    for name in _fields(type(algorithm)):
        value = getattr(algorithm, name)
        if name not in known or (callable(value) and name not in settings):
            continue  # the strategy's class decides; a function has no form in YAML
        if callable(value):
            value = _with_defaults(name, settings[name])
        elif isinstance(value, WireFormats):
            value = dataclasses.asdict(value)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            value = list(value)
        named[name] = value
    return {**settings, **named}


def arguments_of(strategy: type[Any]) -> set[str]:
    """Returns the names of the arguments that a strategy's class takes: its own, and those that it passes on."""
    names: set[str] = set()
    for kind in strategy.__mro__:
        if "__init__" in vars(kind):
            parameters = inspect.signature(kind).parameters
            passed_on = {name for name, parameter in parameters.items() if parameter.kind is parameter.VAR_KEYWORD}
            names |= parameters.keys() - passed_on
            if not passed_on:
                break
    return names


def unknown_arguments(strategy: type[Any], names: Sequence[str]) -> str:
    """Returns the error about arguments that a strategy's class does not have, with what may be meant."""
    known = arguments_of(strategy)
    near = [close[0] for name in names if (close := difflib.get_close_matches(name, known, 1))]
    question = f" Did you mean {', '.join(near)}?" if near else ""
    return f"{strategy.__name__} has no argument {', '.join(names)}.{question}"


def _fields(kind: type[Algorithm]) -> list[str]:
    """Returns the names of an algorithm's values that settings may have."""
    return [field.name for field in dataclasses.fields(kind) if field.name not in _OF_RUN]


def _optimizer(key: str, value: Any) -> Any:
    kind, arguments = _optimizer_class(key, value), _init_args(key, value, _EXAMPLE)
    for name, argument in arguments.items():
        if is_number(argument) and not is_finite(argument):  # torch takes some of them
            raise ValueError(f"{key}: {name}={argument!r} must be a finite number.")
    try:
        kind([nn.Parameter(torch.zeros(1, 1))], **arguments)
    except Exception as error:  # those of torch have many types
        path = value["class_path"]
        raise ValueError(f"{key}: {path} does not take init_args={dict(arguments)}: {error}") from None
    return partial(kind, **arguments)


def _optimizer_class(key: str, value: Any) -> type[Optimizer]:
    if not isinstance(value, Mapping) or "class_path" not in value:
        raise ValueError(f"{key}={value!r} must have a class_path, such as lightning_halos.DelayedNesterov.")
    path = str(value["class_path"])
    module, _, name = path.rpartition(".")
    of_torch = getattr(torch.optim, name, None) if module.startswith("torch.optim") else None
    kind = _OPTIMIZERS.get(_own_name(path)) or of_torch
    if not isinstance(kind, type) or not issubclass(kind, Optimizer) or kind is Optimizer:
        raise ValueError(
            f"{key} has the class_path {path}, and must be lightning_halos.DelayedNesterov or an optimizer of"
            " torch.optim."
        )
    return kind


def _with_defaults(key: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an optimizer with the defaults of its class, of arguments that change what is trained."""
    parameters = inspect.signature(_optimizer_class(key, value)).parameters.values()
    defaults = {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.default is not parameter.empty and parameter.name not in _OF_DEVICE
    }
    return {"class_path": value["class_path"], "init_args": {**defaults, **_init_args(key, value, _EXAMPLE)}}


def _init_args(owner: str, value: Mapping[str, Any], example: str) -> Mapping[str, Any]:
    """Returns the arguments of a class; LightningCLI passes ``dict_kwargs``, too."""
    names = ("init_args", "dict_kwargs")
    if others := sorted(str(key) for key in value if key not in ("class_path", *names)):
        raise ValueError(
            f"{owner} has {', '.join(others)} beside class_path. Arguments belong into init_args: {{{example}}}."
        )
    found: dict[str, Any] = {}
    for name in names:
        arguments = value.get(name)
        if arguments is None:
            continue
        if not isinstance(arguments, Mapping):
            raise ValueError(f"{owner} has {name}={arguments!r}, and they must be a mapping, such as {{{example}}}.")
        found |= arguments
    return found
