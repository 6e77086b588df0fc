"""Packages that only language models need.

Rules of this room: imports, when something needs them and not before.
"""

from __future__ import annotations

import importlib
from typing import Any


def language_package(name: str) -> Any:
    """Imports a package of the extra ``lm``.

    Raises:
        ModuleNotFoundError: If it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        raise ModuleNotFoundError(
            f'{error.name} is not installed. Language models need it: pip install "lightning-halos[lm]".',
            name=error.name,
        ) from None
