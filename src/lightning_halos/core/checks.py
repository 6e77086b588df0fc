"""Checks of users' arguments. An error gives the argument's name, its value, and the values that are allowed."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Sequence
from typing import Any

MOST_COUNT = 2**63 - 1
"""The largest whole number that a tensor, or a message, can have."""
MOST_SECONDS = 10 * 365 * 86400
"""The longest time to wait, which all clocks of the system can count."""


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises a ``ValueError`` unless a value is a whole number of at least ``least``, and not beyond all sense."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}.")
    if value > MOST_COUNT:
        raise ValueError(f"{name} must be a whole number of at most {MOST_COUNT}, and has {value.bit_length()} bits.")


def check_counts(name: str, value: Any) -> None:
    """Checks that a value is a whole number of at least 1, or a sequence of these, such as a list or a ``ListConfig``.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, Sequence) and not isinstance(value, str):
        for index, count in enumerate(value):
            check_count(f"{name}[{index}]", count)
    else:
        check_count(name, value)


def check_seed(name: str, value: Any) -> None:
    """Raises a ``ValueError`` unless a value is a seed that all random number generators take."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32:
        raise ValueError(f"{name}={value!r} must be a whole number from 0 to {2**32 - 1}.")


def check_seconds(name: str, value: Any) -> None:
    """Raises a ``ValueError`` unless a value is a positive number of seconds, of at most ten years."""
    if not is_positive(value) or value > MOST_SECONDS:
        raise ValueError(
            f"{name}={value!r} must be a positive number of seconds, of at most {MOST_SECONDS} (ten years)."
        )


def check_switch(name: str, value: Any) -> None:
    """Raises a ``TypeError`` unless a value is a bool; a text such as ``"no"`` would count as ``True``."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be True or False.")


def check_optimizer(name: str, factory: Any) -> None:
    """Checks that a value is ``None`` or a function that makes an optimizer of the parameters that it is given.

    The function is called with a parameter of one element. What it raises is ignored, as it may need others.

    Raises:
        TypeError: If it is another value, or returns one.
        ValueError: If a server cannot use its optimizer.
    """
    if factory is None:
        return
    from torch import nn, zeros  # here, because some commands check their arguments and do not need torch
    from torch.optim import Optimizer

    is_other_class = isinstance(factory, type) and not issubclass(factory, Optimizer)
    if isinstance(factory, Optimizer) or is_other_class or not callable(factory):
        shown = getattr(factory, "__name__", type(factory).__name__)
        raise TypeError(
            f"{name}=<{shown}> must be a function from parameters to an optimizer, such as"
            " `lambda params: DelayedNesterov(params, lr=0.2)`."
        )
    parameters = [nn.Parameter(zeros(1))]
    try:
        optimizer = factory(parameters)
    except Exception:
        return
    check_made(name, optimizer, parameters)


def check_made(name: str, optimizer: Any, parameters: Iterable[Any]) -> None:
    """Checks what a function has made of some parameters for a server.

    Raises:
        TypeError: If it is no optimizer.
        ValueError: If it is one of other parameters, or cannot make a step by itself.
    """
    from torch.optim import Optimizer

    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{name} returns {optimizer!r:.100}. It must return the optimizer that it makes, as"
            " `lambda params: DelayedNesterov(params, lr=0.2)` does."
        )
    kind = type(optimizer)
    if {id(p) for group in optimizer.param_groups for p in group["params"]} != {id(p) for p in parameters}:
        raise ValueError(
            f"{name} returns an optimizer of other parameters than those that it is given, or of some of them, so that"
            f" the model would not train. Pass all of them on: `lambda params: {kind.__name__}(params, ...)`."
        )
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{name} returns the optimizer {kind.__name__}, whose step() needs a closure, which a server does not have."
            " Use another one, such as DelayedNesterov or torch.optim.SGD."
        )


def is_number(value: Any) -> bool:
    """Returns whether a value is an int or a float, and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Returns whether a value is a finite number that fits into a float."""
    return is_number(value) and abs(value) <= sys.float_info.max  # an int may be larger


def is_positive(value: Any) -> bool:
    """Returns whether a value is a positive, finite number."""
    return is_finite(value) and value > 0
