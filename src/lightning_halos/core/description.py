"""What a run is: the comparison of members' descriptions, and what the global server derives from one.

Nothing here changes during a run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from functools import partial
from typing import Any, get_args

import torch

from lightning_halos.core.algorithms.defaults import Defaults
from lightning_halos.core.algorithms.halos import Halos
from lightning_halos.core.checks import is_number
from lightning_halos.core.cursor import DataCursor, Spans
from lightning_halos.core.delayed_nesterov import DelayedNesterov, OptimizerFactory
from lightning_halos.core.messages import RunDescription

_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_LARGEST = {  # what a run may have at most; far above what makes sense, and far below what a computation cannot take
    "local_steps": 10**6,
    "steps_per_epoch": 2**53,
    "max_epochs": 2**31,
    "max_steps": 2**40,
    "global_steps": 2**40,
    "lr": 1000.0,
    "momentum": 1.0,
    "delay": 100_000,
    "activation": 1.0,
}
_MOST_ELEMENTS = 2**40
_MOST_TENSORS = 2**20  # parameters, and averaged buffers
_MOST_DIMENSIONS = 64  # of a tensor, as in torch
_MOST_STEPS = 2**53  # local steps of all epochs together
_MOST_SETTINGS = 1000
_LARGEST_SETTING = 10**18
_MOST_STEPS_PER_BATCH = 2**16  # several optimizers may step in a batch, each of them often
_SHOWN = 5  # differences in a refusal
_MOST_CHARACTERS = 500  # of each of them
_TENSORS = ("names", "shapes", "buffers")
_DERIVED = ("elements", "parameters")  # of the model's identity; they follow from the tensors
_NAMES = {  # for users
    "epochs": "max_epochs",
    "samples": "the number of samples",
    "wire": "the wire format between regions",
    "step_samples": "the samples of a step",
}
MOST_WORKERS = 100_000
"""Largest number of workers of a member."""


def check(description: RunDescription) -> None:
    """Raises a ``ValueError`` that names the value if a run cannot have this description.

    The first member that joins says what the run is, so that nothing else has compared its numbers with anything.
    """
    if description.dtype not in _DTYPES:
        raise ValueError(f"dtype {description.dtype!r}: must be one of {', '.join(_DTYPES)}")
    _check_tensors(description)
    _check_settings(description)
    if (description.data is None) != (description.steps_per_epoch == 0):
        raise ValueError(f"training data {description.data!r} with {description.steps_per_epoch} local steps")
    _check_number("steps_per_epoch", description.steps_per_epoch)
    _check_number("max_epochs", description.epochs)
    _check_number("max_steps", description.max_steps)
    if (steps := description.steps_per_epoch * (description.epochs or 1)) > _MOST_STEPS:
        raise ValueError(f"{steps} local steps in {description.epochs} epochs: must be at most {_MOST_STEPS}")
    _check_optimizer(description)


def _check_number(name: str, value: Any, least: int = 0) -> None:
    """Raises an error unless a value is ``None`` or within its limits."""
    if value is not None and not (is_number(value) and least <= value <= _LARGEST[name]):
        raise ValueError(f"{name} {value!r}: must be a number from {least} to {_LARGEST[name]}")


def _check_tensors(description: RunDescription) -> None:
    if len(description.names) != len(description.shapes) or not description.shapes:
        raise ValueError(f"{len(description.shapes)} parameters with {len(description.names)} names")
    shapes = [*description.shapes, *(shape for _, shape in description.buffers)]
    if len(shapes) > _MOST_TENSORS:
        raise ValueError(f"{len(shapes)} parameters and buffers: must be at most {_MOST_TENSORS}")
    elements: float = 0
    for shape in shapes:
        # Checked one after the other, because the product of many large numbers takes long.
        size = math.prod(shape) if len(shape) <= _MOST_DIMENSIONS else math.inf
        elements += size if min(shape, default=0) >= 0 else math.inf
        if elements > _MOST_ELEMENTS:
            raise ValueError(
                f"a tensor of shape {shape[:_MOST_DIMENSIONS]}: a model has at most {_MOST_ELEMENTS} elements"
            )
    buffers = sum(math.prod(shape) for _, shape in description.buffers)
    if not 0 <= description.teachers <= buffers:
        raise ValueError(f"{description.teachers} elements of teachers: must be from 0 to the {buffers} of the buffers")


def _check_settings(description: RunDescription) -> None:
    settings = description.settings
    if len(settings) > _MOST_SETTINGS:
        raise ValueError(f"{len(settings)} settings: must be at most {_MOST_SETTINGS}")
    steps, momentum = settings.get("local_steps"), settings.get("has_momentum")
    if not isinstance(steps, int):
        raise ValueError(f"local_steps {steps!r}: must be an integer")
    _check_number("local_steps", steps, 1)
    if not isinstance(momentum, bool):
        raise ValueError(f"has_momentum {momentum!r}: must be True or False")
    if (defaults := settings.get("defaults", "published")) not in get_args(Defaults):
        raise ValueError(f"defaults {defaults!r}: must be one of {', '.join(get_args(Defaults))}")
    length = settings.get("global_steps")
    if not (length is None or isinstance(length, int)):
        raise ValueError(f"global_steps {length!r}: must be an integer")
    _check_number("global_steps", length, 1)
    for name, value in settings.items():
        if isinstance(value, int | float) and not abs(value) <= _LARGEST_SETTING:
            raise ValueError(f"{name} {value!r}: must be a number from -{_LARGEST_SETTING} to {_LARGEST_SETTING}")


def _check_optimizer(description: RunDescription) -> None:
    for name, value in (description.global_optimizer or {}).items():
        if name not in ("lr", "momentum", "delay", "activation"):
            raise ValueError(f"global_optimizer: {name!r} is no argument of DelayedNesterov")
        if name == "delay" and not float(value).is_integer():
            raise ValueError(f"global_optimizer: delay {value!r}: must be an integer")
        try:
            _check_number(name, value)
        except ValueError as error:
            raise ValueError(f"global_optimizer: {error}") from None
    try:
        global_optimizer(description, 1)([torch.nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"global_optimizer: {error}") from None


def form(description: RunDescription) -> tuple[int, torch.dtype]:
    """Returns the number of elements and the dtype of the model's vector."""
    shapes = [*description.shapes, *(shape for _, shape in description.buffers)]
    return sum(map(math.prod, shapes)), _DTYPES[description.dtype]


def most_steps(description: RunDescription) -> int:
    """Returns the largest number of local steps that a round may have."""
    return int(description.settings["local_steps"] or 1) * _MOST_STEPS_PER_BATCH


def global_rates(description: RunDescription, members: int) -> dict[str, Any]:
    """Returns the arguments of the global server's :class:`DelayedNesterov` for a number of members.

    Those that the description has stay as they are. The default ones follow the number of members: see
    :meth:`~lightning_halos.core.algorithms.halos.Halos.make_global_optimizer`. A description without ``global_steps``
    is of a run that began with the published ones.
    """
    if description.global_optimizer is not None:
        return {**description.global_optimizer, "delay": int(description.global_optimizer.get("delay", 1))}
    settings: dict[str, Any] = dict(description.settings)
    names = ("local_steps", "has_momentum", "defaults", "global_steps")
    halos = Halos(**{name: settings[name] for name in names if name in settings})
    factory = halos.make_global_optimizer(members)
    assert isinstance(factory, partial)
    return dict(factory.keywords)


def global_optimizer(description: RunDescription, members: int) -> OptimizerFactory:
    """Returns the function that makes the global server's optimizer."""
    return partial(DelayedNesterov, **global_rates(description, members))


def cursor(description: RunDescription, taken: Spans) -> DataCursor | None:
    """Returns a cursor over the training data, without ranges that are taken; ``None`` if it is not shared."""
    if description.data is None:
        return None
    return DataCursor(description.steps_per_epoch, description.epochs, taken)


def reason_against(ours: RunDescription, theirs: RunDescription) -> str:
    """Returns the reason why a member does not fit the run, with each difference; empty if it fits."""
    mine, other = _values(ours), _values(theirs)
    found = [
        f"{name} is {mine.get(name, 'missing')} in the run, and {other.get(name, 'missing')} in this job"
        for name in {**mine, **other}
        if mine.get(name) != other.get(name)
    ]
    if not found and ours != theirs:
        found.append("the model's parameters have another order")
    if not found:
        return ""
    more = "" if len(found) <= _SHOWN else f", and {len(found) - _SHOWN} more"
    shown = "; ".join(difference[:_MOST_CHARACTERS] for difference in found[:_SHOWN])
    return (
        f"This job does not fit the run: {shown}{more}. All jobs of a run need the same module, data, max_steps,"
        " max_epochs and settings; another run needs a server with another --directory."
    )


def _values(description: RunDescription) -> dict[str, str]:
    """Returns what members must agree on, as text, by names that a user knows."""
    found: dict[str, str] = {}
    for field in dataclasses.fields(RunDescription):
        if field.name not in _TENSORS:
            parts = _parts(field.name, getattr(description, field.name))
            found |= {_NAMES.get(name, name): repr(part) for name, part in parts.items() if name not in _DERIVED}
    parameters = zip(description.names, description.shapes, strict=False)
    for kind, tensors in (("parameter", parameters), ("buffer", description.buffers)):
        found |= {f"{kind} {name}": f"of shape {tuple(shape)}" for name, shape in tensors}
    return found


def _parts(name: str, value: Any) -> dict[str, Any]:
    """Returns the parts of a value by their names, also if it is JSON, as those of the model and the data are."""
    parts = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            parts = json.loads(value)
    is_plain = isinstance(parts, dict) and not any(isinstance(part, dict | list) for part in parts.values())
    return parts if is_plain else {name: value}
