"""The file of settings that several commands read. A setting that no strategy has is an error, not left out."""

from __future__ import annotations

import inspect
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
    if not settings.others:
        return settings
    from lightning_halos import interface  # imports Lightning, so only if need be

    strategy = getattr(interface, settings.strategy)
    known = set(inspect.signature(strategy).parameters) | set(inspect.signature(interface.HalosStrategy).parameters)
    known |= {"accelerator", "parallel_devices", "cluster_environment", "checkpoint_io", "precision_plugin"}
    if unknown := [name for name in settings.others if name not in known]:
        raise ValueError(f"{path}: {settings.strategy} has no argument {', '.join(unknown)}.")
    return settings
