"""The private names of Lightning that the package uses, each behind a name of its own.

No other file may use private names of Lightning (``tests/test_layers.py``), so that a new version needs changes in one
place. Tested with Lightning 2.5.0 and 2.6.6. The strategy also overrides ``Strategy._configure_launcher``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.strategies.registry import _StrategyRegistry as StrategyRegistry
from lightning.fabric.utilities.data import _auto_add_worker_init_fn
from lightning.fabric.utilities.optimizer import _optimizers_to_device as optimizers_to_device
from lightning.fabric.utilities.seed import _collect_rng_states as collect_random_states
from lightning.fabric.utilities.seed import _set_rng_states as set_random_states
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher as MultiProcessingLauncher
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher as SubprocessScriptLauncher
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.trainer.connectors.logger_connector import result as results
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.data import _update_dataloader
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Sampler

__all__ = [  # names of Lightning; the functions below need no mention
    "MultiProcessingLauncher",
    "StrategyRegistry",
    "SubprocessScriptLauncher",
    "collect_random_states",
    "optimizers_to_device",
    "set_random_states",
]

WEIGHT_AVERAGING: tuple[type[pl.Callback], ...] = (
    (callbacks.WeightAveraging,) if hasattr(callbacks, "WeightAveraging") else ()  # since Lightning 2.6
)
"""The base of the callbacks that average weights, for ``isinstance``."""


def average_of(callback: pl.Callback) -> AveragedModel:
    """Returns the average of a ``WeightAveraging`` callback during a fit."""
    average: AveragedModel = vars(callback)["_average_model"]
    return average


def find_trainer(module: pl.LightningModule | None) -> pl.Trainer | None:
    """Returns the Trainer of a module; ``None`` if it has none, where ``module.trainer`` raises."""
    return None if module is None else module._trainer


def synchronizes_batch_norm(strategy: ParallelStrategy) -> bool:
    """Whether the Trainer was made with ``sync_batchnorm=True``."""
    return strategy._layer_sync is not None


def seed_dataloader_workers(loader: DataLoader[Any], rank: int) -> None:
    """Gives the loader's workers seeds of their own after ``seed_everything(workers=True)``, as Lightning does."""
    _auto_add_worker_init_fn(loader, rank)


def has_trained_enough(trainer: pl.Trainer) -> bool:
    """Whether ``min_steps`` and ``min_epochs`` allow training to stop."""
    return trainer.fit_loop._can_stop_early


def is_accumulating(trainer: pl.Trainer) -> bool:
    """Whether the present batch leaves the optimizer's step to a later one."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def is_last_batch(trainer: pl.Trainer) -> bool:
    """Whether the present batch is the last one of this worker's epoch."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def set_logged_steps(trainer: pl.Trainer, steps: int) -> None:
    """Sets the steps by which Lightning decides whether to log."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = steps


def training_loader(trainer: pl.Trainer) -> CombinedLoader | None:
    """Returns the training data; ``None`` before it is set up."""
    return trainer.fit_loop._combined_loader


def begin_epoch_of_data(trainer: pl.Trainer) -> None:
    """Makes a new iterator over the training data."""
    assert trainer.fit_loop._data_fetcher is not None
    iter(trainer.fit_loop._data_fetcher)


def show_metrics(trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
    """Puts metrics into ``trainer.callback_metrics``."""
    tensors = {name: torch.tensor(value) for name, value in metrics.items()}
    trainer._logger_connector._callback_metrics.update(tensors)


def set_received_sigterm(trainer: pl.Trainer, received: bool) -> None:
    """Sets ``trainer.received_sigterm``: if it is true, the Trainer ends at the next batch."""
    trainer._signal_connector.received_sigterm = received


def replace_link_checkpoint(callback: ModelCheckpoint, link: Callable[[Path, Path], None]) -> None:
    """Replaces how ``save_last="link"`` links its last file, the second argument, to a checkpoint."""
    vars(callback)["_link_checkpoint"] = lambda _, path, last: link(Path(path), Path(last))


def restore_link_checkpoint(callbacks: Iterable[pl.Callback]) -> None:
    """Undoes :func:`replace_link_checkpoint`."""
    for callback in callbacks:
        vars(callback).pop("_link_checkpoint", None)


def wrap_dump_checkpoint(trainer: pl.Trainer, wrap: Callable[[Callable[[], dict[str, Any]]], dict[str, Any]]) -> None:
    """Replaces how the Trainer makes the contents of a checkpoint: ``wrap`` gets a function that makes them."""
    connector = trainer._checkpoint_connector
    dump = connector.dump_checkpoint
    vars(connector)["dump_checkpoint"] = lambda *args, **kwargs: wrap(lambda: dump(*args, **kwargs))


def restore_dump_checkpoint(trainer: pl.Trainer) -> None:
    """Undoes :func:`wrap_dump_checkpoint`."""
    vars(trainer._checkpoint_connector).pop("dump_checkpoint", None)


def period_of_saves(callback: ModelCheckpoint) -> int:
    """Returns the global steps between two saves of a callback; 0 if it does not count them."""
    return callback._every_n_train_steps


def keep_sigterm_local(trainer: pl.Trainer) -> None:
    """Keeps Lightning from broadcasting in every batch whether SIGTERM was received, and in its signal handler.

    Call it before Lightning registers its signal handlers.
    """
    connector = trainer._signal_connector

    def notify(number: int, frame: Any) -> None:
        if not connector.received_sigterm and (launcher := trainer.strategy.launcher) is not None:
            launcher.kill(number)
        connector.received_sigterm = True

    vars(connector)["_sigterm_notifier_fn"] = notify
    vars(trainer.fit_loop.epoch_loop)["_broadcast_sigterm_tensor"] = lambda: None


_is_distributed = results._distributed_is_initialized


def advise_sync_dist_only_if(condition: Callable[[], bool]) -> None:
    """Lets Lightning recommend ``self.log(..., sync_dist=True)`` only where it has an effect."""
    results._distributed_is_initialized = lambda: _is_distributed() and condition()


def with_sampler(loader: DataLoader[Any], sampler: Sampler[Any]) -> DataLoader[Any]:
    """Returns a loader with another sampler, for validation."""
    return _update_dataloader(loader, sampler, RunningStage.VALIDATING)


def run_validation_in(trainer: pl.Trainer, context: Callable[[], AbstractContextManager[None]]) -> None:
    """Makes the validation of a fit run in a context, and the making of its data, which may come before."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    for name in ("setup_data", "run"):
        vars(loop)[name] = partial(_run_in, context, MethodType(getattr(type(loop), name), loop))


def _run_in(context: Callable[[], AbstractContextManager[None]], method: Callable[[], Any]) -> Any:
    with context():
        return method()
