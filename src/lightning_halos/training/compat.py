"""The private names of Lightning that the package uses, each behind a name of its own.

No other file may use private names of Lightning (``tests/test_layers.py``), so that a new version needs changes in one
place. Tested with Lightning 2.5.0 and 2.6.6. The strategy also overrides ``Strategy._configure_launcher``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.strategies.registry import _StrategyRegistry as StrategyRegistry
from lightning.fabric.utilities.data import _auto_add_worker_init_fn
from lightning.fabric.utilities.distributed import _all_gather_ddp_if_available as all_gather
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed as set_num_threads_if_needed
from lightning.fabric.utilities.optimizer import _optimizers_to_device as optimizers_to_device
from lightning.fabric.utilities.seed import _collect_rng_states as collect_random_states
from lightning.fabric.utilities.seed import _set_rng_states as set_random_states
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loops import _EvaluationLoop, _FitLoop
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher, _PrefetchDataFetcher
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher as SubprocessScriptLauncher
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.connectors.logger_connector import result as results
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.tuner.lr_finder import _LRCallback
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.data import _update_dataloader
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Sampler

from lightning_halos.checkpoint.files import is_local, local_path

__all__ = [  # names of Lightning; the functions below need no mention
    "StrategyRegistry",
    "SubprocessScriptLauncher",
    "all_gather",
    "collect_random_states",
    "optimizers_to_device",
    "set_num_threads_if_needed",
    "set_random_states",
]

WEIGHT_AVERAGING: tuple[type[pl.Callback], ...] = (
    (callbacks.WeightAveraging,) if hasattr(callbacks, "WeightAveraging") else ()  # since Lightning 2.6
)
"""The base of the callbacks that average weights, for ``isinstance``."""
AVERAGING_CALLBACKS: tuple[type[pl.Callback], ...] = (StochasticWeightAveraging, *WEIGHT_AVERAGING)
"""All callbacks that keep an average of the weights."""


class MultiProcessingLauncher(_MultiProcessingLauncher):
    """Lightning's launcher, which also returns the complete state of a module that is divided among processes.

    Attributes:
        complete_state: The complete state of the module after a fit, in processes that return it; ``None`` if each
            process has all of it.
    """

    complete_state: dict[str, Any] | None = None

    def _collect_rank_zero_results(self, trainer: pl.Trainer, results: Any) -> Any:
        if (state := self.complete_state) is not None:
            vars(trainer.lightning_module)["state_dict"] = lambda: state
        try:
            return super()._collect_rank_zero_results(trainer, results)
        finally:
            vars(trainer.lightning_module).pop("state_dict", None)


def average_of(callback: pl.Callback) -> AveragedModel:
    """Returns the average of a ``WeightAveraging`` callback during a fit."""
    average: AveragedModel = vars(callback)["_average_model"]
    return average


def has_precision_plugin(trainer: pl.Trainer | None) -> bool:
    """Whether the user has passed a precision plugin, to the Trainer or to its strategy."""
    return trainer is not None and trainer._accelerator_connector._precision_plugin_flag is not None


def plugins_of(strategy: ParallelStrategy) -> list[Any]:
    """Returns the plugins that a strategy was made with."""
    names = ("_precision_plugin", "_checkpoint_io", "cluster_environment")
    return [plugin for name in names if (plugin := vars(strategy).get(name)) is not None]


def set_default_checkpoint_io(strategy: ParallelStrategy, default: CheckpointIO) -> None:
    """Sets what a strategy writes checkpoints with, or what its plugin wraps, if the user has not said it."""
    io = vars(strategy)["_checkpoint_io"]
    if io is None:
        strategy.checkpoint_io = default
    elif isinstance(io, _WrappingCheckpointIO):
        io.checkpoint_io = default


def find_trainer(module: pl.LightningModule | None) -> pl.Trainer | None:
    """Returns the Trainer of a module; ``None`` if it has none, where ``module.trainer`` raises."""
    return None if module is None else module._trainer


def synchronizes_batch_norm(strategy: ParallelStrategy) -> bool:
    """Whether the Trainer was made with ``sync_batchnorm=True``."""
    return strategy._layer_sync is not None


def set_layer_sync(inner: ParallelStrategy, strategy: ParallelStrategy) -> None:
    """Lets the strategy inside a worker convert BatchNorm layers, if the Trainer was made with ``sync_batchnorm``."""
    inner._layer_sync = strategy._layer_sync


def limit_to_group(inner: DDPStrategy | FSDPStrategy, group: ProcessGroup) -> None:
    """Lets a strategy wrap modules for the processes of a group."""
    (inner.kwargs if isinstance(inner, FSDPStrategy) else inner._ddp_kwargs)["process_group"] = group


def parallel_sizes(inner: ModelParallelStrategy) -> tuple[int | str, int | str]:
    """Returns ``data_parallel_size`` and ``tensor_parallel_size`` of a strategy, as the user has set them."""
    return inner._data_parallel_size, inner._tensor_parallel_size


def set_device_mesh(inner: ModelParallelStrategy, module: pl.LightningModule, mesh: DeviceMesh) -> None:
    """Sets the device mesh of a strategy and its module."""
    inner._device_mesh = module._device_mesh = mesh


def save_in_one_file(inner: FSDPStrategy | ModelParallelStrategy) -> None:
    """Lets a strategy collect the complete state of a divided module in its first process."""
    if isinstance(inner, FSDPStrategy):
        inner._state_dict_type = "full"
    else:
        inner._save_distributed_checkpoint = False


def evaluation_loops(trainer: pl.Trainer) -> list[Any]:
    """Returns the loops that use ``inference_mode``."""
    return [trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop]


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


class _OpenFitLoop(_FitLoop):
    """Takes the attribute ``max_batches`` for the usual number of batches in an epoch, which may have more or fewer."""

    @property
    def max_batches(self) -> int:
        usual: int = vars(self)["max_batches"]
        batches = self.epoch_loop.batch_progress
        epoch: Any = self.epoch_progress.current
        if epoch.ready > epoch.started:  # in the hooks at the start of an epoch
            return usual
        if vars(self).get("reloaded_after") == epoch.ready:  # before the next epoch, whose data is there already
            return usual
        # Lightning ends an epoch at this number, so it is not reached before the last batch.
        return max(1, batches.current.ready) if batches.is_last_batch else max(usual, batches.current.ready + 1)

    @max_batches.setter
    def max_batches(self, batches: int | float) -> None:
        vars(self).update(max_batches=batches, reloaded_after=self.epoch_progress.current.ready)


class _Open(_DataFetcher):
    """Recognizes the last batch by the end of the data, although the data has a length."""

    training: Callable[[], AbstractContextManager[None]]
    kept: Any = None  # the loader's iterator, if the loader keeps it from epoch to epoch

    def __iter__(self) -> Any:
        loader = self.combined_loader.flattened[0]
        if self.kept is not None:
            loader._iterator = self.kept
        with self.training():
            super().__iter__()
        if getattr(loader, "persistent_workers", False) and loader.num_workers:
            # Else whoever iterates over the loader would begin with this iterator, and take it away from training.
            self.kept, loader._iterator = loader._iterator, None
        return self

    def reset(self) -> None:
        super().reset()
        self.length, self.done = None, False


class _OpenPrefetchDataFetcher(_Open, _PrefetchDataFetcher): ...


class _OpenDataLoaderIterDataFetcher(_Open, _DataLoaderIterDataFetcher):
    """Unlike the other fetcher, it takes the first batch when the module asks for it."""

    def __iter__(self) -> Any:
        super().__iter__()
        self.iterator = self._training_at_first(self.iterator)
        return self

    def _training_at_first(self, batches: Any) -> Iterator[Any]:
        with self.training():
            batch = next(batches, None)
        while batch is not None:
            yield batch
            batch = next(batches, None)  # `yield from` would begin anew


_OPEN: dict[type, type] = {
    _FitLoop: _OpenFitLoop,
    _PrefetchDataFetcher: _OpenPrefetchDataFetcher,
    _DataLoaderIterDataFetcher: _OpenDataLoaderIterDataFetcher,
}
_CLOSED = {opened: closed for closed, opened in _OPEN.items()}


def open_epochs(trainer: pl.Trainer, training: Callable[[], AbstractContextManager[None]]) -> None:
    """Lets a worker's epochs end with their data, after more or fewer batches than the training data says it has.

    ``trainer.num_training_batches`` stays what it was, but grows while an epoch has more batches, and is the number of
    batches in an epoch from its last batch on.

    Args:
        trainer: The Trainer.
        training: The context in which it makes an iterator over the data of an epoch.
    """
    fetcher: Any = trainer.fit_loop._data_fetcher
    fetcher.training = training
    for part in (trainer.fit_loop, trainer.fit_loop._data_fetcher):
        part.__class__ = _OPEN.get(type(part), type(part))


def close_epochs(trainer: pl.Trainer) -> None:
    """Undoes :func:`open_epochs`."""
    fetcher: Any = trainer.fit_loop._data_fetcher
    if fetcher is not None and vars(fetcher).get("kept") is not None:
        fetcher.combined_loader.flattened[0]._iterator = vars(fetcher).pop("kept")
    for part in (trainer.fit_loop, trainer.fit_loop._data_fetcher):
        part.__class__ = _CLOSED.get(type(part), type(part))


def is_finding_learning_rate(trainer: pl.Trainer) -> bool:
    """Whether this is the short training of ``LearningRateFinder`` or ``Tuner.lr_find``."""
    return any(isinstance(callback, _LRCallback) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def swa_averages(trainer: pl.Trainer) -> list[nn.Module]:
    """Returns the averages of the ``StochasticWeightAveraging`` callbacks during a fit."""
    averaging = [c for c in trainer.callbacks if isinstance(c, StochasticWeightAveraging)]  # type: ignore[attr-defined]
    return [callback._average_model for callback in averaging if callback._average_model is not None]


def epochs_of_training(trainer: pl.Trainer) -> int | None:
    """Returns the epochs in which optimizers step; ``None`` without a limit.

    ``StochasticWeightAveraging`` adds one for the statistics of BatchNorm, when a fit starts.
    """
    if trainer.max_epochs in (None, -1):
        return None
    averaging = [c for c in trainer.callbacks if isinstance(c, StochasticWeightAveraging)]  # type: ignore[attr-defined]
    return trainer.max_epochs - any(callback._model_contains_batch_norm for callback in averaging)


def show_metrics(
    trainer: pl.Trainer,
    metrics: Mapping[str, float],
    logged: Mapping[str, float] | None = None,
    in_bar: Mapping[str, float] | None = None,
) -> None:
    """Puts metrics into ``trainer.callback_metrics``, ``logged_metrics`` and ``progress_bar_metrics``."""
    connector = trainer._logger_connector
    connector._callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
    connector._logged_metrics.update({name: torch.tensor(value) for name, value in (logged or {}).items()})
    connector._progress_bar_metrics.update(in_bar or {})


def replace_metrics(
    trainer: pl.Trainer,
    make: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    make_logged: Callable[[dict[str, Any]], dict[str, Any]],
    make_in_bar: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """Replaces the dicts of :func:`show_metrics` by others that are made from them."""
    connector = trainer._logger_connector
    connector._callback_metrics = make(connector._callback_metrics)
    connector._logged_metrics = make_logged(connector._logged_metrics)
    connector._progress_bar_metrics = make_in_bar(connector._progress_bar_metrics)


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


def save_as_if_due(callback: ModelCheckpoint, trainer: pl.Trainer) -> None:
    """Saves what a callback saves at a multiple of its period, unless it lacks its metric or has saved just now."""
    metrics = callback._monitor_candidates(trainer)
    has_metric = callback.monitor is None or callback.monitor in metrics
    if has_metric and not callback._should_skip_saving_checkpoint(trainer):
        callback._save_topk_checkpoint(trainer, metrics)
        callback._save_last_checkpoint(trainer, metrics)


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


class _AskedLoop(_EvaluationLoop):
    """Makes its data when somebody asks for it, as it is not run."""

    @property
    def _combined_loader(self) -> CombinedLoader | None:
        loader: CombinedLoader | None = self._when_asked("_combined_loader")
        return loader

    @_combined_loader.setter
    def _combined_loader(self, loader: CombinedLoader | None) -> None:
        vars(self)["_combined_loader"] = loader

    @property
    def _max_batches(self) -> list[int | float]:
        batches: list[int | float] = self._when_asked("_max_batches")
        return batches

    @_max_batches.setter
    def _max_batches(self, batches: list[int | float]) -> None:
        vars(self)["_max_batches"] = batches

    def _when_asked(self, name: str) -> Any:
        if (make := vars(self).pop("_make", None)) is not None:  # it asks, too
            try:
                make(self)
            finally:
                vars(self)["_make"] = make
        return vars(self)[name]


def make_validation_data_when_asked(trainer: pl.Trainer, context: Callable[[], AbstractContextManager[None]]) -> None:
    """Lets hooks of a process that does not validate in a fit look at ``trainer.val_dataloaders``.

    Call it before ``trainer.limit_val_batches`` is set to 0.
    """
    limit = trainer.limit_val_batches

    def make(loop: _AskedLoop) -> None:
        stage, present, trainer.limit_val_batches = trainer.state.stage, trainer.limit_val_batches, limit
        try:
            if trainer.enable_validation:
                trainer.state.stage = RunningStage.VALIDATING
                with context():
                    loop.setup_data()
        finally:
            trainer.state.stage, trainer.limit_val_batches = stage, present

    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.__class__, vars(loop)["_make"] = _AskedLoop, make


def end_making_validation_data(trainer: pl.Trainer) -> None:
    """Undoes :func:`make_validation_data_when_asked`."""
    loop: Any = trainer.fit_loop.epoch_loop.val_loop
    if isinstance(loop, _AskedLoop):
        vars(loop).pop("_make")
        loop.__class__ = _EvaluationLoop  # type: ignore[assignment]


def enclose_validation(trainer: pl.Trainer, begin: Callable[[], object], end: Callable[[], object]) -> None:
    """Calls functions before the first and after the last hook of each validation of a fit.

    Those hooks are the module's ``on_validation_model_eval`` and ``on_validation_model_train``; only its
    ``on_validation_model_zero_grad`` is earlier. Strategies have none that come before the user's.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    start, finish = type(loop).on_run_start, type(loop).on_run_end

    def on_run_start() -> None:
        begin()
        start(loop)

    def on_run_end() -> Any:
        outputs = finish(loop)
        end()
        return outputs

    vars(loop).update(on_run_start=on_run_start, on_run_end=on_run_end)


class _FilesElsewhere(_CheckpointConnector):
    """Takes the model in memory after a fit if the best file is to be used, and this job has none."""

    module: pl.LightningModule  # of the last fit

    def _parse_ckpt_path(self, state_fn: TrainerFn, ckpt_path: Any, model_provided: bool, model_connected: bool) -> Any:
        is_default = ckpt_path is None and not model_provided and not self._hpc_resume_path
        is_fitted = state_fn != TrainerFn.FITTING and self.trainer.lightning_module is self.module
        if is_fitted and (is_default or ckpt_path == "best"):
            best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
            is_here = bool(best) and (not is_local(best) or local_path(best).exists())
            if not self.trainer.strategy.broadcast(is_here):  # the processes of a job may have different disks
                if self.trainer.local_rank == 0:  # forked processes do not know yet that they are not rank 0
                    rank_zero_info(
                        f"trainer.{state_fn.value}() takes the model in memory, because this job has no best"
                        " checkpoint: only the job that decides for the run saves checkpoints."
                    )
                return None
        return super()._parse_ckpt_path(
            state_fn, ckpt_path, model_provided=model_provided, model_connected=model_connected
        )


def expect_files_elsewhere(trainer: pl.Trainer) -> None:
    """Lets evaluations after a fit take the model in memory if ``ckpt_path`` means the best file, and there is none.

    Call it at the start of the fit, in the process that calls the Trainer.
    """
    connector: Any = trainer._checkpoint_connector
    connector.__class__, connector.module = _FilesElsewhere, trainer.lightning_module
