"""The algorithms, one per file, and their table. They are independent of processes, clocks and Lightning."""

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
"""The constructor of each algorithm, by its name on the command line."""

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
