"""Checks of users' arguments. An error gives the argument's name, its value, and the values that are allowed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
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
    """Raises a ``TypeError`` unless a value is ``None`` or a function that makes an optimizer."""
    from torch.optim import Optimizer  # here, because some commands check their arguments and do not need torch

    if factory is not None and (isinstance(factory, Optimizer) or not callable(factory)):
        raise TypeError(
            f"{name}=<{type(factory).__name__}> must be a function from parameters to an optimizer, such as"
            " `lambda params: DelayedNesterov(params, lr=0.2)`."
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
