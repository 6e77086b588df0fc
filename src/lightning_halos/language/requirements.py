"""Says what to install when a package of the extra ``lm`` is missing.

Rules of this room: it imports what it is asked for, nothing else.
"""

from __future__ import annotations

from importlib import import_module


def require(*packages: str) -> None:
    """Imports packages of the extra ``lm``.

    Raises:
        ModuleNotFoundError: If one of them is not installed; says what to do.
    """
    for package in packages:
        try:
            import_module(package)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{error.name} is needed for this and not installed. Install it with:"
                ' pip install "lightning-halos[lm]"',
                name=error.name,
            ) from error
