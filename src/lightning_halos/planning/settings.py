"""Reads the settings of a run from YAML, as LightningCLI has them, without Lightning and without starting anything.

What the settings mean is decided by the algorithms in ``core``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import nn
from torch.optim import Optimizer

from lightning_halos.core.algorithms import Algorithm, AsyncLocalSGD, Diloco, Halos, SyncSGD
from lightning_halos.core.optim import DelayedNesterov

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
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist. Give the YAML file that has the settings.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
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
        settings = settings["trainer"]
    if isinstance(settings, Mapping) and "strategy" in settings:
        settings = settings["strategy"]
    if isinstance(settings, str):
        settings = {"class_path": _NAMES.get(settings, settings)}
    if settings is None:
        settings = {}
    if not isinstance(settings, Mapping):
        raise ValueError("it must contain a mapping: trainer.strategy of LightningCLI, or the arguments of a strategy.")
    name, arguments = "HalosStrategy", settings
    if "class_path" in settings:
        name = str(settings["class_path"]).rpartition(".")[2]
        arguments = _init_args(name, settings, "local_steps: 8")
    if name not in _ALGORITHMS:
        raise ValueError(f"the strategy is {name}, and must be one of {', '.join(_ALGORITHMS)}.")
    return name, arguments


def make_arguments(kind: type[Algorithm], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of an algorithm among settings, with functions for its optimizers.

    Args:
        kind: The algorithm's class.
        settings: Arguments of its strategy as in YAML: an optimizer is a mapping with ``class_path`` and ``init_args``.

    Raises:
        ValueError: If an optimizer is invalid.
    """
    fields = {field.name for field in dataclasses.fields(kind)} - {"global_steps", "has_momentum"}  # a run finds them
    chosen = {key: value for key, value in settings.items() if key in fields}
    for key, value in chosen.items():
        if key.endswith("optimizer") and value is not None:
            chosen[key] = _optimizer(key, value)
    return chosen


def _optimizer(key: str, value: Any) -> Any:
    if not isinstance(value, Mapping) or "class_path" not in value:
        raise ValueError(f"{key}={value!r} must have a class_path, such as lightning_halos.DelayedNesterov.")
    path = str(value["class_path"])
    module, _, name = path.rpartition(".")
    kind = _OPTIMIZERS.get(name) or (getattr(torch.optim, name, None) if module.startswith("torch.optim") else None)
    if not isinstance(kind, type) or not issubclass(kind, Optimizer) or kind is Optimizer:
        raise ValueError(
            f"{key} has the class_path {path}, and must be lightning_halos.DelayedNesterov or an optimizer of"
            " torch.optim."
        )
    arguments = _init_args(key, value, "lr: 0.7")
    try:
        kind([nn.Parameter(torch.zeros(1, 1))], **arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key}: {path} does not take init_args={dict(arguments)}: {error}") from None
    return partial(kind, **arguments)


def _init_args(owner: str, value: Mapping[str, Any], example: str) -> Mapping[str, Any]:
    arguments = value.get("init_args")
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{owner} has init_args={arguments!r}, and they must be a mapping, such as {{{example}}}.")
    return arguments
