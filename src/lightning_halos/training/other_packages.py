"""Refuses the strategies' names in packages whose Trainers cannot use them, with an error that says what to change.

``pytorch_lightning`` has the same classes as ``lightning.pytorch``, but they are other classes, so a Trainer of one
package takes no callback, strategy or module of the other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from lightning.fabric.strategies import STRATEGY_REGISTRY

WHAT_TO_DO = (
    "for the Trainer of lightning.pytorch, not of pytorch_lightning, and not for Fabric: write"
    " 'import lightning.pytorch as pl' instead of 'import pytorch_lightning as pl'"
)


def refuse_elsewhere(names: Iterable[str]) -> None:
    """Registers names of strategies with Fabric, and with ``pytorch_lightning`` if it is imported, to refuse them.

    If it is imported later, its Trainer does not know these names, and says so.
    """
    registries: list[Any] = [STRATEGY_REGISTRY]
    if "pytorch_lightning.strategies" in sys.modules:
        registries.append(sys.modules["pytorch_lightning.strategies"].StrategyRegistry)
    for registry in registries:
        for name in names:
            registry.register(name, _refuse, "Only for the Trainer of lightning.pytorch", override=True)


def _refuse(**_: Any) -> NoReturn:
    raise TypeError(f"The strategies of lightning_halos are {WHAT_TO_DO}.")
