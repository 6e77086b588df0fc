"""Settings of strategies that several commands take. One that no strategy has is an error, and is not left out."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_halos.planning.settings import Settings


def read_known_settings(path: Path) -> Settings:
    """Reads a file of settings, and refuses names that the strategy has no argument for, which may be misspelt.

    Args:
        path: The file, as for :func:`.read_settings`.

    Raises:
        ValueError: If the file is not such a file, or a setting is unknown or invalid.
    """
    from lightning_halos.planning.settings import read_settings

    settings = read_settings(path)
    refuse_unknown(str(path), settings.strategy, settings.names)
    return settings


def refuse_unknown(where: str, strategy: str, names: Collection[str]) -> None:
    """Refuses names that a strategy has no argument for.

    Args:
        where: Where the names are from, for the error.
        strategy: Name of the strategy's class.
        names: The names.

    Raises:
        ValueError: If one of them is unknown.
    """
    if not names:
        return
    from lightning_halos import interface  # imports Lightning, so only if need be

    kinds = getattr(interface, strategy).__mro__  # what one does not take itself, it passes on
    known = {name for kind in kinds if "__init__" in vars(kind) for name in inspect.signature(kind).parameters}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{where}: {strategy} has no argument {', '.join(map(str, unknown))}.")
