"""The strategy inside a worker of several processes: which kinds there are, and how a user names one.

It is Lightning's own. How it is composed with the worker's rounds is elsewhere.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, StrategyRegistry

from lightning_halos.core.placement import WorkerSize
from lightning_halos.training.compat import plugins_of

InnerStrategy = DDPStrategy | FSDPStrategy | ModelParallelStrategy

_FSDP2 = "fsdp2"  # Lightning has no name for its ModelParallelStrategy


def make_inner(worker: WorkerSize, inner: InnerStrategy | str | None) -> InnerStrategy | None:
    """Returns the strategy inside each worker; ``None`` if workers have one process.

    Args:
        worker: The argument ``worker``.
        inner: The argument ``inner``. Default: ``DDPStrategy()``.

    Raises:
        TypeError: If it is another kind of strategy.
        ValueError: If its name is unknown, it has plugins of its own, or workers have one process.
    """
    if worker == 1:
        if inner is not None:
            raise ValueError(
                f"inner={_shown(inner)} needs workers of several processes: pass worker=2, or more, or worker='node'."
            )
        return None
    if inner is None:
        return DDPStrategy()
    if isinstance(inner, str):
        known = [name for name in StrategyRegistry.available_strategies() if name.startswith(("ddp", "fsdp"))]
        if inner not in (_FSDP2, *known):
            raise ValueError(f"inner={inner!r} must be a strategy of Lightning, or one of {sorted([_FSDP2, *known])}.")
        inner = ModelParallelStrategy() if inner == _FSDP2 else StrategyRegistry.get(inner)
    if not isinstance(inner, InnerStrategy):
        raise TypeError(
            f"inner={_shown(inner)} must be Lightning's DDPStrategy, FSDPStrategy or ModelParallelStrategy, or a name"
            " such as 'ddp', 'fsdp' or 'fsdp2'."
        )
    if plugins := plugins_of(inner):
        raise ValueError(
            f"inner={_shown(inner)} has a <{type(plugins[0]).__name__}>, which the strategy around it would replace: it"
            " gives the Trainer's plugins to the one inside. Pass it to Trainer(plugins=...), and make a new inner="
            " strategy for each strategy around it."
        )
    return inner


def backend_for(device: torch.device) -> str:
    """Returns the backends of the process group inside a worker: that of its device, and one for host memory."""
    backend = dist.Backend.default_device_backend_map.get(device.type, "gloo")
    return backend if backend == "gloo" else f"cpu:gloo,{device.type}:{backend}"


def _shown(inner: object) -> str:
    return repr(inner) if isinstance(inner, str) else f"<{type(inner).__name__}>"
