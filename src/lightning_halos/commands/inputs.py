"""What several commands read, and the checks of it that ``argparse`` cannot make. A mistake is a ``ValueError``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_halos.planning.settings import Settings
    from lightning_halos.simulation.cluster import SimulatedCluster


def given_path(text: str) -> Path:
    """Returns the path that an option names. A shell does not expand ``~`` in ``--output=~/runs``."""
    return Path(os.path.expanduser(text))


def given_count(text: str) -> int:
    """Returns the whole number in an option, which may have an exponent, as in ``4e9``."""
    with suppress(ValueError):
        return int(text)
    with suppress(ValueError, OverflowError):
        if (number := float(text)).is_integer():
            return int(number)
    raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, such as 4000000000 or 4e9")


def check_folder(option: str, folder: Path) -> None:
    """Refuses a folder that cannot be made or written to, before the work whose results it is for.

    Raises:
        ValueError: If it is a file or inside of one, or it is not allowed to write there.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{option} {folder}: {there} is a file. Name a folder to write to.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {folder}: {there} cannot be written to. Name another folder.")


def check_keys(path: Path, party: str) -> None:
    """Refuses a file of keys that cannot be used.

    Args:
        path: The file.
        party: The subcommand of ``lightning-halos keys`` that makes such a file.

    Raises:
        ValueError: If it cannot be read, or has no keys.
    """
    from lightning_halos.transport.certificates import read_keys

    try:
        read_keys(path)
    except OSError as error:
        raise ValueError(
            f"--keys {path} cannot be read: {error.strerror or error}. It has to be a file that `lightning-halos keys"
            f" {party}` has made."
        ) from None


def refuse(arguments: argparse.Namespace, why: str, *names: str) -> None:
    """Refuses options that would have no effect.

    Raises:
        ValueError: If one of them is given.
    """
    given = [name for name in names if getattr(arguments, name) is not None and getattr(arguments, name) is not False]
    if given:
        raise ValueError(f"{why}: leave {', '.join('--' + name.replace('_', '-') for name in given)} out.")


def read_cluster(path: Path) -> SimulatedCluster:
    """Reads a cluster's description; see :meth:`.SimulatedCluster.from_yaml`."""
    from lightning_halos.simulation.cluster import SimulatedCluster

    try:
        return SimulatedCluster.from_yaml(path)
    except TypeError as error:
        raise ValueError(str(error)) from None


def read_known_settings(path: Path) -> Settings:
    """Reads a file of settings, and refuses names that the strategy has no argument for, which may be misspelt.

    Args:
        path: The file, as for :func:`.read_settings`.

    Raises:
        ValueError: If the file is not such a file, or a setting is unknown or invalid.
    """
    from lightning_halos.planning.settings import read_settings

    settings = read_settings(path)
    refuse_unknown(str(path), settings.strategy, sorted(map(str, settings.arguments)))
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
    from lightning_halos.planning.settings import arguments_of, unknown_arguments

    kind = getattr(interface, strategy)
    known = arguments_of(kind)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{where}: {unknown_arguments(kind, unknown)}")
