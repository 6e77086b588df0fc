"""Checks of options that depend on each other, which ``argparse`` cannot make."""

from __future__ import annotations

import argparse


def refuse(arguments: argparse.Namespace, why: str, *names: str) -> None:
    """Refuses options that would have no effect.

    Raises:
        ValueError: If one of them is given.
    """
    given = [name for name in names if getattr(arguments, name) is not None and getattr(arguments, name) is not False]
    if given:
        raise ValueError(f"{why}: leave {', '.join('--' + name.replace('_', '-') for name in given)} out.")
