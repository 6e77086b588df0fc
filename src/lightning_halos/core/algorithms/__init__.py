"""The algorithms, one file each, and the table of them. Nothing here knows processes, clocks or Lightning."""

from collections.abc import Callable
from functools import partial

from lightning_halos.core.algorithms.async_local_sgd import AsyncLocalSGD
from lightning_halos.core.algorithms.base import Algorithm, ServerAlgorithm, SynchronousAlgorithm
from lightning_halos.core.algorithms.diloco import Diloco
from lightning_halos.core.algorithms.halos import Halos
from lightning_halos.core.algorithms.sync_sgd import SyncSGD

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "sync_sgd": SyncSGD,
    "diloco": Diloco,
    "diloco_dynamic": partial(Diloco, dynamic_local_steps=True),
    "async_local_sgd": AsyncLocalSGD,
    "halos": Halos,
}
"""What makes each algorithm, by the name that commands know it by."""

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "AsyncLocalSGD",
    "Diloco",
    "Halos",
    "ServerAlgorithm",
    "SyncSGD",
    "SynchronousAlgorithm",
]
