"""Adapts a Trainer to a run in which every worker trains at its own pace.

Lightning counts the steps of this process; the run counts those of all workers. So the global step, the schedule of
validation, the callbacks and the Trainer's limits are changed here, and nowhere else, and all of them are restored.
``compat`` says which versions of Lightning this was tested with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning, Callback, Checkpoint, EarlyStopping, ModelCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_halos.core.schedule import next_count
from lightning_halos.training.compat import (
    WEIGHT_AVERAGING,
    epochs_of_training,
    has_trained_enough,
    is_accumulating,
    is_last_batch,
    period_of_saves,
    restore_link_checkpoint,
    save_as_if_due,
    set_logged_steps,
)
from lightning_halos.training.schedulers import SchedulePosition

_HOOKS = [name for name in vars(Callback) if name.startswith("on_") and not name.endswith("_checkpoint")]
_MOST_AHEAD = 100_000  # global steps that another job's validation may be ahead of what this process knows of the run


class TrainerAdapter:
    """Makes a Trainer follow the run during one fit.

    Args:
        trainer: The Trainer, at the start of training.
        limit: Global steps of the complete run, ``None`` if unknown. Schedulers do not go beyond it.
        data: Global steps at which the data of the run begins and ends, with a step per batch under manual
            optimization. The end may be infinite.
        epoch_batches: Batches per epoch of a worker's fixed shard; ``None`` if the workers do not share data.
        decides: Whether this process validates and saves for the run, and steps plateau schedulers.
        has_entered: Whether the Trainer's counters were set to those of a run that it joins, with new schedulers.

    Attributes:
        trainer: The Trainer.
        schedulers: Its learning-rate schedulers.
        steps_per_batch: Optimizer steps per batch under manual optimization, where there may be several.
        validated: Global step of the last validation that was scheduled, by this process or by one before it.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        limit: int | None,
        data: tuple[int, float],
        epoch_batches: int | None,
        decides: bool,
        has_entered: bool = False,
    ) -> None:
        self.trainer = trainer
        self._decides = decides
        self.steps_per_batch = 1.0
        self._data = data
        self._epochs = epochs_of_training(trainer)
        self._limits: dict[str, Any] = {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}
        self._holds_stop = False
        self._has_finished = False
        self._raised: dict[str, tuple[Any, Any]] = {}  # where a hook has set a limit, and to what
        self._shown = trainer.global_step
        self._shares_data = epoch_batches is not None
        self._epoch_batches = trainer.num_training_batches if epoch_batches is None else epoch_batches
        # With max_epochs alone, all workers train for the same number of epochs; otherwise a fast one has more of them.
        follows_epochs = trainer.max_steps != -1 and not math.isinf(self._epoch_batches)
        self.schedulers = SchedulePosition(
            trainer,
            0 if has_entered else trainer.global_step,
            limit,
            decides,
            math.ceil(self._epoch_batches / trainer.accumulate_grad_batches) if follows_epochs else None,
            trainer.current_epoch if has_entered else 0,
        )
        self._callbacks = callbacks_of(trainer)
        self._is_manual = not trainer.lightning_module.automatic_optimization
        self._min_epochs, self._min_steps = trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps
        self._val_check_batch = trainer.val_check_batch
        self._validates_at_end = False
        self.validated = self._start = trainer.global_step
        self._due_since: int | None = None
        self._shown_before_end = self._shown
        # Validations at the ends of epochs under max_steps: whether the present epoch has had its own, and how many
        # came early, where this worker's data ended. As many are left out at the ends that the run's steps come to.
        self._epoch_is_validated, self._early = False, 0
        self._no_validation = NoValidation()
        self._others_validate = NoValidation()

    def install(self, first_hooks: Callback, loop: Callback) -> None:
        """Adds callbacks before the user's, and after those of them that do not need its pulls.

        On processes that do not decide, callbacks with which others decide stay in the list, but none of their hooks
        does anything.
        """
        others = [callback for callback in self._callbacks if callback not in self.later]
        self.trainer.callbacks = [first_hooks, *others, loop, *self.later]  # type: ignore[attr-defined]
        if not self._decides:
            self._leave_to_others()

    @property
    def later(self) -> list[Callback]:
        """The user's callbacks that come after the worker's loop."""
        averaging = [callback for callback in self._callbacks if isinstance(callback, WEIGHT_AVERAGING)]
        return [*averaging, *(callback for callback in self._callbacks if isinstance(callback, Checkpoint))]

    def follow_validations(self, validated: int | None) -> None:
        """Validates in steps as if the job that decided before were this one.

        Args:
            validated: Global step of that job's last validation; ``None`` if it is not known. A step that cannot be
                right is ignored. Validations that have become due since then follow as one, and none is repeated.
        """
        if validated is not None and 0 <= validated <= min(self.end, self._shown + _MOST_AHEAD):
            self.validated = self._due_since = validated

    def set_deciding(self, decides: bool) -> None:
        """Lets this process decide from now on, or no longer, in the middle of a fit."""
        self._decides = decides
        self.schedulers.set_deciding(decides)
        if decides:
            self._others_validate.undo(self.trainer)
            self._restore_hooks()
        else:
            self._leave_to_others()

    def _leave_to_others(self) -> None:
        self._others_validate.apply(self.trainer)
        for callback in self._callbacks:
            if is_deciding_callback(callback):
                vars(callback).update(dict.fromkeys(_HOOKS, _do_nothing))

    def _restore_hooks(self) -> None:
        for callback in self._callbacks:
            for name in [name for name in _HOOKS if vars(callback).get(name) is _do_nothing]:
                del vars(callback)[name]

    def leave_out_saves(self, reason: str) -> None:
        """Saves no checkpoint from now on, but warns. For a process that can no longer make one with others."""
        saving = [callback for callback in self._callbacks if isinstance(callback, Checkpoint)]
        for callback in saving:
            vars(callback)["on_exception"] = _do_nothing
        vars(self.trainer)["save_checkpoint"] = partial(_warn_instead_of_saving, reason)
        if any(getattr(c, "save_on_exception", not isinstance(c, ModelCheckpoint)) for c in saving):
            _warn_instead_of_saving(reason)

    def leave_shared_data(self) -> None:
        """Follows a shard of the worker's own, in an epoch that starts, instead of the data that all workers share."""
        self._shares_data, self._data = False, (0, math.inf)
        self._epoch_batches = self.trainer.num_training_batches
        self._val_check_batch = self.trainer.val_check_batch

    def restore(self) -> None:
        """Restores everything that was changed in the Trainer."""
        trainer = self.trainer
        trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = self._min_epochs, self._min_steps
        for name, (owner, raised) in self._raised.items():
            setattr(owner, name, raised)
        trainer.val_check_batch = self._val_check_batch
        self.release_validation()
        self._others_validate.undo(trainer)
        self.schedulers.release()
        restore_link_checkpoint(self._callbacks)
        self._restore_hooks()
        vars(trainer).pop("save_checkpoint", None)
        trainer.callbacks = self._callbacks  # type: ignore[attr-defined]

    def hold_validation(self) -> None:
        """Keeps Lightning from the validation data before the first batch of a resumed run.

        If a validation follows the batch that was saved, Lightning counts it as done, for which it begins the
        validation data: that draws a random number. It also does that before the first batch of an epoch.
        """
        if not getattr(self.trainer.fit_loop.epoch_loop.val_loop, "restarted_mid_evaluation", False):
            self._no_validation.apply(self.trainer)

    def release_validation(self) -> None:
        """Ends :meth:`hold_validation`."""
        self._no_validation.undo(self.trainer)

    def hold_stop(self) -> None:
        """Keeps the Trainer from stopping before its next batch ends, unless the run has finished."""
        if not self._has_finished and self.trainer.should_stop:
            self._holds_stop, self.trainer.should_stop = True, False

    def _release_stop(self) -> None:
        self.trainer.should_stop, self._holds_stop = self.trainer.should_stop or self._holds_stop, False

    def wants_to_stop(self, position: int) -> bool:
        """Returns whether the run has to stop at a global step before it ends by itself.

        It was asked to, and the Trainer's minimum of steps and epochs is reached; or a hook has lowered ``max_steps``.
        """
        self._release_stop()
        ordered, most = self._limits["max_steps"], self.trainer.max_steps
        is_lowered = most != -1 and (ordered in (None, -1) or most < ordered)
        return (is_lowered and position >= most) or (self.trainer.should_stop and has_trained_enough(self.trainer))

    @property
    def is_last_batch(self) -> bool:
        """Whether this is the worker's last batch of its last epoch."""
        fit_loop: Any = self.trainer.fit_loop
        is_last_epoch = fit_loop.epoch_progress.current.processed + 1 == self._epochs
        return bool(is_last_epoch and is_last_batch(self.trainer))

    @property
    def is_after_last_epoch(self) -> bool:
        """Whether the worker's last epoch is over."""
        epoch: Any = self.trainer.fit_loop.epoch_progress.current
        return bool(epoch.processed == self._epochs)

    def has_reached_end(self, position: int) -> bool:
        """Whether the Trainer ends by itself here, at a global step."""
        at_max_steps = self.trainer.max_steps != -1 and position >= self.trainer.max_steps
        return at_max_steps or self.is_last_batch or self.is_after_last_epoch

    @property
    def would_have_validated(self) -> bool:
        """Whether there would have been a validation by now, if this worker validated at its own pace."""
        loop, every, interval = self.trainer.fit_loop, self.trainer.check_val_every_n_epoch, self._val_check_batch
        progress: Any = loop.epoch_progress.current
        if every is None:
            return interval is None or loop.total_batch_idx >= interval
        if progress.processed >= every:
            return True
        return progress.processed + 1 == every and (interval is None or loop.batch_idx >= interval)

    @property
    def ends_epoch(self) -> bool:
        """Whether this is the worker's last batch of an epoch."""
        return self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch

    def finish(self, position: int, stopped: bool) -> None:
        """Makes the Trainer end the run at the final global step, also if it was asked to stop."""
        self._has_finished = True
        self._release_stop()
        self._shown_before_end = self._shown
        self._validates_at_end = self.set_global_step(position, is_final=True)
        self.keep_limits()
        # Lightning ends by itself at max_steps and max_epochs, but not if the run was asked to stop.
        self.trainer.should_stop = self.trainer.should_stop or stopped
        self.trainer.fit_loop.min_epochs, self.trainer.fit_loop.epoch_loop.min_steps = 0, None

    def keep_limits(self) -> bool:
        """Ends the Trainer where the run was ordered to end. Returns whether a hook has raised a limit since."""
        loop: Any = self.trainer.fit_loop
        was_raised = False
        for owner, name in ((loop, "max_epochs"), (loop.epoch_loop, "max_steps")):
            limit, now = self._limits[name], getattr(owner, name)
            if limit in (None, -1) or (now not in (None, -1) and now <= limit):
                continue
            was_raised = True
            setattr(owner, name, limit)
            if name not in self._raised:
                rank_zero_warn(
                    f"{name} was raised from {limit} to {now} during the fit. The run ends as it was ordered when it"
                    " started, because its steps are divided among the workers. Call trainer.fit() again to go on."
                )
            self._raised[name] = owner, now
        return was_raised

    def leave_epoch(self) -> None:
        """Ends the Trainer's loop in the first hook of an epoch, as if the epoch had not begun.

        Raises:
            StopIteration: Always. Lightning's loop ends with it.
        """
        for progress in (self.trainer.fit_loop.epoch_progress.total, self.trainer.fit_loop.epoch_progress.current):
            counts: Any = progress
            counts.ready -= 1
        raise StopIteration

    def save_at_end(self) -> None:
        """Saves what fell due while this worker waited for the end, because its next global step was the final one."""
        for callback in self._saving if self._decides else []:
            period = period_of_saves(callback)
            if period > 0 and self._shown // period > self._shown_before_end // period:
                save_as_if_due(callback, self.trainer)

    @property
    def _saving(self) -> list[ModelCheckpoint]:
        return [callback for callback in self._callbacks if isinstance(callback, ModelCheckpoint)]

    @property
    def is_empty_epoch(self) -> bool:
        """Whether this worker had no batch in an epoch that ends, because other workers took all of its data."""
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready == 0

    def end_empty_epoch(self) -> None:
        """Ends an epoch without a batch, for the schedulers as well."""
        loop = self.trainer.fit_loop.epoch_loop
        epoch: Any = self.trainer.fit_loop.epoch_progress.current
        loop.batch_progress.is_last_batch = True
        epoch.processed -= 1  # Lightning steps schedulers before it counts the epoch as processed
        loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        epoch.processed += 1

    def validate_empty_epoch(self) -> None:
        """Validates at the end of an epoch without a batch, if Lightning would after a last batch."""
        self.release_validation()
        trainer, interval, every = self.trainer, self._val_check_batch, self.trainer.check_val_every_n_epoch
        if not (self._decides and self._shares_data and trainer.enable_validation and isinstance(interval, int)):
            return
        at_end = self._epoch_batches % interval == 0 and every is not None and (trainer.current_epoch + 1) % every == 0
        if every and trainer.max_steps == -1:
            is_due = at_end
        else:
            is_due = self._validates_at_end or (at_end and self._ends_epoch_early())
        if is_due:
            self.validated = self._shown
            trainer.validating = True
            trainer.lightning_module.on_validation_model_zero_grad()
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def set_global_step(self, position: int, is_final: bool = False) -> bool:
        """Sets the Trainer's global step to the run's, and schedules what happens at this step.

        It stays below the last step until the run really ends, so that saves and validations at the end happen once.

        Returns:
            Whether this process validates after this batch.
        """
        trainer, loop, before = self.trainer, self.trainer.fit_loop.epoch_loop, self._shown
        is_complete = not is_accumulating(trainer)
        if is_final:
            self._shown = position
        elif is_complete:  # a checkpoint at a global step must not contain half of an accumulation window
            self._shown = max(before, int(min(self._next_shown(position), self.end - 1)))
        if self._is_manual:
            loop.manual_optimization.optim_step_progress.total.completed = self._shown
        else:
            loop.automatic_optimization.optim_progress.optimizer.step.total.completed = self._shown
        if is_complete:
            set_logged_steps(trainer, self._shown - self._lag(stands=self._shown == before and not is_final))
        if not self._decides or (trainer.max_steps == -1 and not self._shares_data):
            return False
        if self._due_since is not None and (is_complete or is_final):
            before = self._due_since
            if self._shown >= before:
                self._due_since = None
        if is_complete and not is_final and self._validates_next(position):
            before, self._due_since = self._shown, before  # what is due already is one with the next
        self.schedulers.hold_plateaus(lambda n: self._is_due(before, n, self._epoch_batches), loop.batch_idx + 1)
        return self._schedule_validation(before, is_final)

    @property
    def end(self) -> float:
        """Global step at which the run ends by itself; an estimate if its data ends under manual optimization."""
        return min(self._end_of_data, math.inf if self.trainer.max_steps == -1 else self.trainer.max_steps)

    @property
    def _end_of_data(self) -> float:
        begin, end = self._data
        return begin + (end - begin) * self.steps_per_batch if self._is_manual else end

    @property
    def _batches_per_step(self) -> float:
        return 1 / self.steps_per_batch if self._is_manual else float(self.trainer.accumulate_grad_batches)

    def _next_shown(self, position: int) -> int:
        """Returns the next global step on the way to a position, without skipping one at which Lightning acts."""
        before = self._shown
        log_every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        saves = map(period_of_saves, self._saving)
        periods = [period for period in (self._validation_period, *saves) if period > 0]
        if log_every <= 1:
            return next_count(before, position, periods)
        periods.append(log_every)
        # Some callbacks log at the start of a batch, before the multiple; the end of that batch belongs to that step.
        if (before + 1) % log_every == 0:
            return before + 1
        return min(next_count(before, position, periods), next_count(before + 1, position + 1, [log_every]) - 1)

    def _lag(self, stands: bool) -> int:
        """Returns how far Lightning's count of logged steps is behind the global step at the end of a batch.

        Lightning logs when this count plus 1 is a multiple of ``log_every_n_steps``, and then adds 1. With a lag of
        1 it logs at multiples of the global step. While the global step stands still, it must not log again.
        """
        log_every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not stands or log_every <= 1:
            return 1
        behind_multiple = self._shown % log_every
        if behind_multiple == 0:
            return 0  # a lag of 1 would log this multiple again at the end of this batch
        # One step before a multiple, a lag of 1 would log it already at the start of the next batch.
        return 2 if behind_multiple == log_every - 1 else 1

    @property
    def _validation_period(self) -> int:
        """Global steps between validations that are counted in steps; 0 if they are not."""
        trainer = self.trainer
        interval, every = self._val_check_batch, trainer.check_val_every_n_epoch
        if not self._decides or not isinstance(interval, int) or every is not None:
            return 0
        return int(interval / self._batches_per_step)

    def _validates_next(self, position: int) -> bool:
        """Whether the next global step, at which Lightning logs, so that it is not skipped, has a validation, too."""
        period, log_every, step = self._validation_period, self.trainer.log_every_n_steps, self._shown + 1  # type: ignore[attr-defined]
        return step <= position and period > 0 and step % period == 0 and log_every > 1 and step % log_every == 0

    def _schedule_validation(self, before: int, is_final: bool) -> bool:
        """Makes Lightning validate after ``val_check_interval`` batches of all workers, instead of this worker's."""
        trainer, loop = self.trainer, self.trainer.fit_loop.epoch_loop
        interval, every = self._val_check_batch, trainer.check_val_every_n_epoch
        if not isinstance(interval, int) or (not self._shares_data and every not in (None, 1)):
            return False
        epoch = self._epoch_batches if every else float("inf")
        is_due = self._is_due(before, interval, epoch, but_its_end=True)
        if every and epoch % interval == 0:
            if trainer.max_steps == -1:
                # An epoch ends where this worker's data of it ends; the last ends after the last step of all workers.
                is_due |= self.ends_epoch
            else:
                is_due |= self._validates_epoch(before, int(epoch), is_final)
        if is_due:
            self.validated = self._shown
        present = (loop.batch_idx if every else loop.total_batch_idx) + 1
        trainer.val_check_batch = present if is_due else present + 1
        return is_due

    def _validates_epoch(self, before: int, epoch: int, is_final: bool) -> bool:
        """Returns whether to validate now for the end of an epoch, under ``max_steps``.

        It is where the steps of the run come to it, or where this worker's data of it ends, whichever is first, because
        callbacks that decide at the end of an epoch, and plateau schedulers, need the metrics. The final model is
        validated if the run ends with an epoch.
        """
        is_due = self._is_due(before, epoch, epoch)
        if is_due and self._early:
            is_due, self._early = is_final, self._early - 1
        is_due |= is_final and self._ends_with_epoch
        self._epoch_is_validated |= is_due
        if self.ends_epoch:
            is_due |= self._ends_epoch_early()
            self._epoch_is_validated = False
        return is_due

    @property
    def _ends_with_epoch(self) -> bool:
        """Whether the run ends at the end of an epoch: with its data, or at a step that is one."""
        return self.end == self._end_of_data or self.end * self._batches_per_step % self._epoch_batches == 0

    def _ends_epoch_early(self) -> bool:
        """Returns whether to validate because this worker's data of an epoch ends before the steps of the run do so.

        At the end of the run only if there are no metrics, or the final model, which comes soon, is not validated.
        """
        reached = int(self._shown * self._batches_per_step)
        ends_run = (reached // self._epoch_batches + 1) * self._epoch_batches >= self.end * self._batches_per_step
        if self._epoch_is_validated or (ends_run and self._ends_with_epoch and self.validated > self._start):
            return False
        self._early += 1
        return True

    def _is_due(self, before: int, interval: int, epoch: float, but_its_end: bool = False) -> bool:
        """Returns whether a multiple of ``interval`` batches of an epoch was passed since a global step."""
        per_step = self._batches_per_step
        first, last = (int(step * per_step + 1e-6) for step in (before, self._shown))
        numbers = (batch % epoch + 1 for batch in range(first, last))
        return any(number % interval == 0 and not (but_its_end and number == epoch) for number in numbers)


def _do_nothing(*_: Any, **__: Any) -> None:
    """Takes the place of a hook."""


def _warn_instead_of_saving(reason: str, *_: Any, **__: Any) -> None:
    rank_zero_warn(f"No checkpoint is saved because of {reason}")


class NoValidation:
    """Keeps a process from validating: all but the one that decides, during a fit."""

    def __init__(self) -> None:
        self._limit: int | float | None = None

    def apply(self, trainer: pl.Trainer) -> None:
        """Sets the Trainer's limit of validation batches to 0."""
        if self._limit is None:
            self._limit, trainer.limit_val_batches = trainer.limit_val_batches, 0

    def undo(self, trainer: pl.Trainer) -> None:
        """Restores the limit, if it was changed."""
        if self._limit is not None:
            trainer.limit_val_batches, self._limit = self._limit, None


def callbacks_of(trainer: pl.Trainer) -> list[Callback]:
    """Returns the Trainer's callbacks."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def enter_run(trainer: pl.Trainer, global_step: int, epoch: int) -> None:
    """Sets a new Trainer's counters to those of a run that it joins, at the start of training."""
    loop: Any = trainer.fit_loop.epoch_loop
    loop.automatic_optimization.optim_progress.optimizer.step.total.completed = global_step
    loop.manual_optimization.optim_step_progress.total.completed = global_step
    set_logged_steps(trainer, global_step)
    for progress in (trainer.fit_loop.epoch_progress.total, trainer.fit_loop.epoch_progress.current):
        counts: Any = progress
        counts.ready = counts.started = counts.processed = counts.completed = epoch


def optimizers_of(trainer: pl.Trainer) -> list[Optimizer]:
    """Returns the Trainer's optimizers, and those that the module and its submodules keep in attributes."""
    held = [item for owner in trainer.lightning_module.modules() for item in in_attributes(owner)]
    return list({id(item): item for item in [*trainer.optimizers, *held] if isinstance(item, Optimizer)}.values())


def in_attributes(owner: object) -> Iterator[Any]:
    """Yields what an object has in its attributes, and in lists, tuples and dicts there."""
    for value in vars(owner).values():
        yield from value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]


def is_deciding_callback(callback: Callback) -> bool:
    """Returns whether a callback works in one process for all workers in a fit: it saves, stops early or averages."""
    return isinstance(callback, (Checkpoint, EarlyStopping, *WEIGHT_AVERAGING))


def unfreezes(callbacks: Sequence[Callback]) -> bool:
    """Returns whether a callback makes parameters trainable during training."""
    return any(isinstance(callback, BaseFinetuning) for callback in callbacks)
