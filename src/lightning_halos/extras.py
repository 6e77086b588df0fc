"""Imports optional packages, which only language models, pictures and searches for settings need.

They are imported when they are used, so that lightning-halos works without them.
"""

from __future__ import annotations

import importlib
from typing import Any


def language_package(name: str) -> Any:
    """Imports a package of the extra ``lm``, or says in a ``ModuleNotFoundError`` how to install it."""
    return _package(name, "Language models need it", "lm")


def picture_package(name: str) -> Any:
    """Imports a package of the extra ``examples``, or says in a ``ModuleNotFoundError`` how to install it."""
    return _package(name, "Pictures need it", "examples")


def tuning_package(name: str) -> Any:
    """Imports a package of the extra ``tune``, or says in a ``ModuleNotFoundError`` how to install it."""
    return _package(name, "A search for settings needs it", "tune")


def _package(name: str, why: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        raise ModuleNotFoundError(
            f'{error.name} is not installed. {why}: pip install "lightning-halos[{extra}]".', name=error.name
        ) from None
