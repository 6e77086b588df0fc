"""A callback that comes before the user's in every hook of a fit, and prepares what these may rely on.

What a worker does in a batch is in ``worker_loop``, which comes after the user's callbacks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, RichProgressBar, TQDMProgressBar
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_halos.training.agreement import Agreement
from lightning_halos.training.compat import swa_averages
from lightning_halos.training.first_metrics import FirstMetrics
from lightning_halos.training.site import Site
from lightning_halos.training.trainer_adapter import TrainerAdapter, callbacks_of
from lightning_halos.training.worker_loop import WorkerLoop


class FirstHooks(Callback):
    """Comes before the user's callbacks.

    Args:
        loop: The worker's loop.
        lightning: The Trainer's adapter.
        metrics: Rank 0's first metrics.
        site: This process's place and connections.
        version: Returns the number of updates in the global model. On the first worker.
        publish_plateaus: Sends what this process's plateau schedulers have done since the last call.
        end: Called when all workers have the final model, before any hook sees the end of training.
    """

    def __init__(
        self,
        loop: WorkerLoop,
        lightning: TrainerAdapter,
        metrics: FirstMetrics,
        site: Site,
        version: Callable[[], int],
        publish_plateaus: Callable[[], None],
        end: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._lightning = lightning
        self._metrics = metrics
        self._site = site
        self._version = version
        self._publish_plateaus = publish_plateaus
        self._end = end
        self._validated: int | None = None
        self._before_validation: dict[str, tuple[Any, int]] | None = None
        self._settings_before: dict[str, float] = {}
        self._has_warned = self._has_warned_of_settings = False

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._publish_plateaus()  # each epoch's own, since the next one may have no batch
        if self._loop.finished and self._lightning.keep_limits():
            self._lightning.leave_epoch()  # in which the workers would train alone
        # StochasticWeightAveraging adds an epoch for the statistics of BatchNorm.
        if self._loop.finished and self._lightning.is_after_last_epoch:
            averages = swa_averages(trainer)
            self._site.collectives.broadcast_([parameter for average in averages for parameter in average.parameters()])

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        _show_batches_of_epoch(trainer)
        self._lightning.schedulers.end_batch()  # before other callbacks may set a rate

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._lightning.is_after_last_epoch and not self._loop.finished:
            self._loop.finish(stop=False)
        if self._lightning.is_empty_epoch:
            self._lightning.end_empty_epoch()
            # It may be one of many in a row. The processes of the first worker may know different versions.
            if self._site.rank == 0 and Agreement(self._site).ask([self._version() != self._validated])[0][0]:
                self._lightning.validate_empty_epoch()
            for user in (pl_module, *callbacks_of(trainer)):
                if user is not self and user is not self._loop:
                    _warn_instead_of_raising(user)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated = self._version()
        self._metrics.tell(trainer.callback_metrics)

    def before_validation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes what a validation must not change on rank 0 only, before the first of its hooks."""
        if self._site.size > 1:
            self._before_validation, self._settings_before = _attributes(pl_module), _settings(trainer)

    def after_validation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warns of what a validation has changed on rank 0 only, when the last of its hooks has ended."""
        before, self._before_validation = self._before_validation, None
        if before is None:
            return
        names = [name for name, now in _attributes(pl_module).items() if not _is_same(before.get(name), now)]
        if names and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"A validation has changed attributes of the module, on rank 0 only: {', '.join(names)}. During a fit"
                " rank 0 validates for all workers. To share a number, log it with self.log('name', number), and read"
                " self.trainer.callback_metrics['name'] on all ranks."
            )
        settings = {name: (self._settings_before.get(name, now), now) for name, now in _settings(trainer).items()}
        names = [name for name, (old, now) in settings.items() if now != old and not math.isnan(now)]
        if names and not self._has_warned_of_settings:
            self._has_warned_of_settings = True
            rank_zero_warn(
                f"A validation has changed settings of optimizers, on rank 0 only: {', '.join(names)}. During a fit"
                " rank 0 validates for all workers, and the others keep their settings. Step schedulers, and change"
                " settings, in on_train_epoch_end, which runs on all ranks, with metrics from"
                " self.trainer.callback_metrics."
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if Agreement(self._site).is_needed:
            self._lightning.leave_out_saves(
                "the exception: all processes of the worker would have to make it, but they may be at another place."
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._loop.finished:
            self._loop.finish(stop=self._lightning.wants_to_stop(self._loop.round.position))
        if trainer.is_global_zero:
            self._metrics.tell(trainer.callback_metrics)
        self._lightning.save_at_end()
        self._end()


def _show_batches_of_epoch(trainer: pl.Trainer) -> None:
    """Makes Lightning's progress bar end with the epoch. It must be called before the bar's hook.

    Lightning's bars read the number of batches at the start of an epoch, when nobody knows how many a worker will get.
    """
    bar, batches = trainer.progress_bar_callback, trainer.num_training_batches
    if not isinstance(bar, RichProgressBar | TQDMProgressBar) or not bar.is_enabled or not math.isfinite(batches):
        return
    if isinstance(bar, TQDMProgressBar) or bar.train_progress_bar_id is not None:  # else it is made after this hook
        bar.train_progress_bar.total = batches


def _warn_instead_of_raising(user: Any) -> None:
    """Turns an error of the next ``on_train_epoch_end`` hook, in an epoch without batches, into a warning.

    Under DDP there is no such epoch, so modules average their outputs, and callbacks their metrics, without a check.
    """
    own = vars(user).get("on_train_epoch_end")
    hook = user.on_train_epoch_end

    def guarded(*args: Any) -> None:
        del vars(user)["on_train_epoch_end"]
        if own is not None:
            vars(user)["on_train_epoch_end"] = own
        try:
            hook(*args)
        except Exception as error:  # it is the user's
            warnings.warn(
                f"{type(user).__name__}.on_train_epoch_end raised an error after an epoch in which other workers took"
                f" all of the data. It is ignored: {type(error).__name__}: {error}",
                stacklevel=2,
            )

    vars(user)["on_train_epoch_end"] = guarded


def _attributes(module: pl.LightningModule) -> dict[str, tuple[Any, int]]:
    """Returns a module's own public attributes, with their lengths, if they have any."""
    attributes = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return {n: (v, len(v) if isinstance(v, (list, dict, set)) else 0) for n, v in attributes.items() if n != "training"}


def _settings(trainer: pl.Trainer) -> dict[str, float]:
    """Returns the numbers, such as learning rates, that optimizers have in their groups."""
    return {
        f"{type(optimizer).__name__}.param_groups[{index}]['{name}']": float(value)
        for optimizer in trainer.optimizers
        for index, group in enumerate(optimizer.param_groups)
        for name, value in group.items()
        if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
    }


def _is_same(before: tuple[Any, int] | None, now: tuple[Any, int]) -> bool:
    if before is None or before[1] != now[1]:
        return False
    if isinstance(now[0], (bool, int, float, str)):
        return type(before[0]) is type(now[0]) and bool(before[0] == now[0])
    if isinstance(now[0], (list, dict, set)) and not now[0]:
        return type(before[0]) is type(now[0])
    return before[0] is now[0]
