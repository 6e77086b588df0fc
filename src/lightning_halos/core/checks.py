"""Checks of what users set: a wrong value is refused with its name, the value, and what would be right."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer


def check_count(name: str, value: Any) -> None:
    """Refuses what is not a whole number of at least 1.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")


def check_seconds(name: str, value: Any) -> None:
    """Refuses what is not a positive, finite number.

    Raises:
        ValueError: If it is not.
    """
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} must be a positive number of seconds.")


def check_optimizer(name: str, factory: Any) -> None:
    """Refuses what is neither ``None`` nor a function that makes an optimizer.

    Raises:
        TypeError: If it is something else.
    """
    if factory is not None and (isinstance(factory, Optimizer) or not callable(factory)):
        raise TypeError(
            f"{name}=<{type(factory).__name__}> must be a function from parameters to an optimizer, such as"
            " `lambda params: DelayedNesterov(params, lr=0.2)`."
        )


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float, and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
