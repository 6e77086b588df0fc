"""The user's function that makes the module and its data: how it is found, and what it may return."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl

Make = Callable[[], Any]

_RETURNS = (
    "a LightningModule and its data: (module, datamodule), or (module, train_loader, val_loader). Each call has to make"
    " new ones"
)


class Made(NamedTuple):
    """What the user's function made."""

    module: pl.LightningModule
    data: dict[str, Any]  # arguments of `Trainer.fit`


def import_make(path: str) -> Make:
    """Imports a function from ``"module:function"``, also from the present folder.

    Raises:
        ValueError: If there is no such function.
    """
    name, _, attribute = path.partition(":")
    if not name or not attribute:
        raise ValueError(f"--module {path} must be module:function, such as my_project:make.")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # a package that the user's module needs
        raise ValueError(
            f"--module {path}: there is no module {error.name} in {here} or among the installed packages."
        ) from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"--module {path}: {name} has no {attribute}.")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"--module {path} must be a function that returns {_RETURNS}.")
    make: Make = found
    return make


def describe_value(value: Any) -> str:
    """Returns a value as a text that is the same in another process: without memory addresses."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def name_of(make: Make) -> str:
    """Returns the name of a user's function, which identifies it when a search goes on."""
    if isinstance(make, partial):
        arguments = [describe_value(value) for value in make.args]
        arguments += [f"{name}={describe_value(value)}" for name, value in make.keywords.items()]
        return f"{name_of(make.func)}({', '.join(arguments)})"
    name = getattr(make, "__qualname__", None) or type(make).__qualname__
    return f"{getattr(make, '__module__', '')}:{name}"


def call(make: Make) -> Made:
    """Calls the user's function and checks what it returns.

    Raises:
        TypeError: If that is something else than a module and its data.
    """
    made = make()
    if not isinstance(made, (tuple, list)) or len(made) not in (2, 3):
        what = f"{len(made)} values" if isinstance(made, (tuple, list)) else f"<{type(made).__name__}>"
        raise TypeError(f"{name_of(make)} returns {what}, and must return {_RETURNS}.")
    module, *data = made
    if not isinstance(module, pl.LightningModule):
        raise TypeError(
            f"{name_of(make)} returns <{type(module).__name__}> as its first value, and must return {_RETURNS}."
        )
    if len(data) == 1:
        if not isinstance(data[0], pl.LightningDataModule):
            raise TypeError(
                f"{name_of(make)} returns <{type(data[0]).__name__}> as its second value, and must return {_RETURNS}."
            )
        return Made(module, {"datamodule": data[0]})
    return Made(module, {"train_dataloaders": data[0], "val_dataloaders": data[1]})
