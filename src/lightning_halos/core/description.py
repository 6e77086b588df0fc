"""What a run is: the comparison of members' descriptions, and what the global server derives from one.

Nothing here changes during a run.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import torch

from lightning_halos.core.algorithms.halos import default_global_optimizer, default_single_optimizer
from lightning_halos.core.cursor import DataCursor, Spans
from lightning_halos.core.messages import RunDescription
from lightning_halos.core.optim import DelayedNesterov
from lightning_halos.core.servers import OptimizerFactory

_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_MOST_STEPS_PER_BATCH = 64  # several optimizers may step in a batch
_SHOWN = 5  # differences in a refusal
_MOST_CHARACTERS = 500  # of each of them
MOST_WORKERS = 100_000
"""Largest number of workers of a member."""


def check(description: RunDescription) -> None:
    """Raises a ``ValueError`` if a run cannot have this description."""
    steps = description.settings.get("local_steps")
    momentum = description.settings.get("has_momentum")
    if description.dtype not in _DTYPES:
        raise ValueError(f"dtype {description.dtype!r}: must be one of {', '.join(_DTYPES)}")
    if len(description.names) != len(description.shapes) or not description.shapes:
        raise ValueError(f"{len(description.shapes)} parameters with {len(description.names)} names")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1 or not isinstance(momentum, bool):
        raise ValueError(f"local_steps {steps!r}, has_momentum {momentum!r}: must be a positive number, and a bool")
    if (description.data is None) != (description.steps_per_epoch == 0):
        raise ValueError(f"training data {description.data!r} with {description.steps_per_epoch} local steps")
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
    :func:`~lightning_halos.core.algorithms.halos.default_global_optimizer`, and :func:`default_single_optimizer`
    without momentum.
    """
    if description.global_optimizer is not None:
        return {**description.global_optimizer, "delay": int(description.global_optimizer.get("delay", 1))}
    default = default_global_optimizer if description.settings["has_momentum"] else default_single_optimizer
    factory = default(members)
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


def differences(ours: RunDescription, theirs: RunDescription) -> str:
    """Returns text that names each difference between the run's description and a member's; empty if there is none."""
    found = []
    for field in dataclasses.fields(RunDescription):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if mine == other or field.name in ("names", "shapes", "buffers"):
            continue
        if isinstance(mine, dict) and isinstance(other, dict):
            names = [name for name in sorted({*mine, *other}) if mine.get(name) != other.get(name)]
            found += [f"{name} is {mine.get(name)!r} in the run, and {other.get(name)!r} here" for name in names]
        else:
            found.append(f"{field.name} is {mine!r} in the run, and {other!r} here")
    mine, other = _tensors(ours), _tensors(theirs)
    for name in [name for name in {**mine, **other} if mine.get(name) != other.get(name)]:
        found.append(f"{name} is {mine.get(name, 'missing')} in the run, and {other.get(name, 'missing')} here")
    if not found and ours != theirs:
        found.append("the model's parameters have another order")
    more = "" if len(found) <= _SHOWN else f", and {len(found) - _SHOWN} more"
    return "; ".join(difference[:_MOST_CHARACTERS] for difference in found[:_SHOWN]) + more


def _tensors(description: RunDescription) -> dict[str, str]:
    parameters = {
        name: f"a parameter of shape {tuple(shape)}"
        for name, shape in zip(description.names, description.shapes, strict=False)
    }
    return {**parameters, **{name: f"a buffer of shape {tuple(shape)}" for name, shape in description.buffers}}
