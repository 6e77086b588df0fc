"""Refuses the strategies' names in packages whose Trainers cannot use them, with an error that says what to change.

``pytorch_lightning`` has the same classes as ``lightning.pytorch``, but they are other classes, so a Trainer of one
package takes no callback, strategy or module of the other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, NoReturn

from lightning.fabric.strategies import STRATEGY_REGISTRY

WHAT_TO_DO = (
    "for the Trainer of lightning.pytorch, not of pytorch_lightning, and not for Fabric: write"
    " 'import lightning.pytorch as pl' instead of 'import pytorch_lightning as pl'"
)


_TWIN = "pytorch_lightning.strategies"


def refuse_elsewhere(names: Iterable[str]) -> None:
    """Registers names of strategies with Fabric and with ``pytorch_lightning``, to refuse them there."""
    _refuse_in(STRATEGY_REGISTRY, names)
    if _TWIN in sys.modules:
        _refuse_in(sys.modules[_TWIN].StrategyRegistry, names)
    else:
        sys.meta_path.insert(0, _WhenImported(list(names)))


class _WhenImported(MetaPathFinder):
    """Registers the names when ``pytorch_lightning`` is imported later, as sorted imports do."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TWIN:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _refuse_in(module.StrategyRegistry, self._names)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _refuse_in(registry: Any, names: Iterable[str]) -> None:
    for name in names:
        registry.register(name, _refuse, "Only for the Trainer of lightning.pytorch", override=True)


def _refuse(**_: Any) -> NoReturn:
    raise TypeError(f"The strategies of lightning_halos are {WHAT_TO_DO}.")
