"""The worker inside Lightning's training loop: it turns batches into rounds.

It is a callback that :class:`~lightning_halos.HalosStrategy` installs for a fit. What the servers decide is not decided
here, and every attribute of the Trainer that is changed here is given back, so that a Trainer can be used again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BaseFinetuning, Callback, Checkpoint, EarlyStopping, ModelCheckpoint
from torch import Tensor

from lightning_halos.core.messages import Marker, Push
from lightning_halos.core.schedule import next_count
from lightning_halos.core.vector import ModelVector, Reach
from lightning_halos.core.worker import WorkerRound
from lightning_halos.training.preemption import Preemption
from lightning_halos.training.schedulers import SchedulePosition
from lightning_halos.training.shared_data import SharedData
from lightning_halos.training.stopwatch import Stopwatch
from lightning_halos.training.worker_state import random_state, set_random_state, to_host, worker_state
from lightning_halos.transport.alarm import Alarm, describe
from lightning_halos.transport.client import WorkerClient
from lightning_halos.transport.link import Filled
from lightning_halos.transport.lockstep import LockstepClient

Keep = Callable[[Marker, dict[str, Any]], None]
"""Writes a worker's shard: which save, and the state."""


class WorkerLoop(Callback):
    """Runs one worker's rounds.

    Args:
        trainer: The Trainer, at the start of training.
        vector: What travels of the module.
        memory: A vector's memory, holding the module's present values: what the first round starts from. ``None`` if
            no models are exchanged.
        worker_round: The worker's round.
        client: The worker's end of the link to its local server.
        alarm: Where failures go.
        limit: Global steps of the whole run, ``None`` if unknown.
        data: The training data, if the workers share it.
        clock: Of a simulation, tells the virtual time in seconds, on rank 0.
        keep: Writes this worker's shard of a save.
        state: What to go on from; see :meth:`state`.
        plateaus: All that rank 0's plateau schedulers were stepped with until that was kept.
        preemption: What is done about SIGTERM.
        end: Global steps at which the run ends by itself; may be infinite.
        repeats: Whether shards keep the round too, so that it can be taken up again exactly where it was: in
            simulations, where the servers wait for it.

    Attributes:
        stopwatch: Measures how long this worker computes.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        vector: ModelVector,
        memory: Tensor | None,
        worker_round: WorkerRound,
        client: WorkerClient | LockstepClient,
        alarm: Alarm,
        limit: int | None,
        data: SharedData | None,
        clock: Callable[[], float] | None,
        keep: Keep,
        state: Mapping[str, Any],
        plateaus: Sequence[tuple[int, float]],
        preemption: Preemption,
        end: float,
        repeats: bool,
    ) -> None:
        self.round = worker_round
        self.finished = False
        self.vector = vector
        self._memory = memory
        self._client = client
        self._alarm = alarm
        self._trainer = trainer
        self._module = trainer.lightning_module
        self._decides = trainer.is_global_zero
        self._shown = trainer.global_step
        self._end = end
        self._steps_before = 0
        self._data = data
        self._clock = clock
        self._epoch_batches = trainer.num_training_batches if data is None else data.batches
        self._min_epochs, self._min_steps = trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps
        self._val_check_batch = trainer.val_check_batch
        self.schedulers = SchedulePosition(
            self._module,
            trainer.lr_scheduler_configs,
            trainer.optimizers,
            trainer.global_step,
            limit,
            self._decides,
        )
        self._keep = keep
        self._preemption = preemption
        self._repeats = repeats
        self._random: dict[str, Any] | None = None
        self._plateaus: Sequence[tuple[int, float]] = []
        self._push = state.get("push")
        if state:
            self.schedulers.load_state_dict(state["schedulers"])
            self._plateaus = plateaus[len(self.schedulers.history) :]
        if isinstance(client, WorkerClient):
            client.keep = self._keep_state
        if "round" in state:
            self.round.load_state_dict(state["round"])
        else:
            self._pull(worker_round.position, [])
        self.stopwatch = Stopwatch(trainer.strategy.root_device)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._data is not None:
            self._data.attach()

    def check(self) -> None:
        """Raises what must end this process now: a failure, or SIGTERM when all is saved."""
        self._alarm.check()
        self._preemption.check()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.check()
        self._steps_before = trainer.global_step
        self.schedulers.before_batch(self.round.batches)
        self._log_time()

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.check()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        seconds = self.stopwatch.lap()
        if self._data is not None:
            self._data.count_batch(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)
        stepped = trainer.global_step - self._steps_before
        self.round.compute(stepped, seconds)
        if self._repeats and self._decides:
            self._random = random_state()
        if self._wants_to_stop():
            self.finish(stop=True)
        elif self._is_last_batch():
            self.finish(stop=False)
        elif self.round.over or (stepped and self._ends_rounds_early):
            self._next_round()
        else:
            self._show(self.round.global_step)
        self.stopwatch.restart()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # When a simulation resumes from the batch before it, Lightning leaves this validation out: it must not matter.
        if self._random is not None:
            set_random_state(self._random)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log_time()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log_time()
        loop = trainer.fit_loop.epoch_loop
        epoch: Any = trainer.fit_loop.epoch_progress.current
        if loop.batch_progress.current.ready == 0:
            # The others took all data of this epoch, but it is over for this worker's schedules, too. Lightning steps
            # them while the epoch does not count as processed yet.
            loop.batch_progress.is_last_batch = True
            epoch.processed -= 1
            loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)
            epoch.processed += 1

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.finished:
            self.finish(stop=self._wants_to_stop())

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._alarm.raised(describe(exception))

    def finish(self, stop: bool) -> None:
        """Gives the last round away, waits for the final global model, and loads it.

        Args:
            stop: Ask for the whole run to stop.
        """
        self._end_round()
        memory = self._memory if self.round.has_steps else None
        self._finish(self.round.push(memory, stop, final=True, data=self._take_used()), self._fill)

    def take_up(self) -> None:
        """Takes up the round where a simulation's checkpoint has it: its result goes to the servers once more."""
        if self._push is None:
            return
        push, self._push = Push(**self._push), None
        if push.final:
            self._finish(push, _filled)
        else:
            self._exchange(push, _filled)

    def _finish(self, push: Push, fill: Callable[[Reach], object]) -> None:
        final, filled = self._client.finish(push, fill)
        if final.vector is not None:
            self.vector.write(final.vector, filled)
        self._alarm.off()
        self.finished = True
        trainer = self._trainer
        self._pull(final.position, [])
        self._show(final.position, is_final=True)
        # Lightning ends by itself at max_steps and max_epochs; otherwise somebody asked for the end.
        trainer.should_stop = trainer.should_stop or final.stopped
        trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = 0, None

    @property
    def data_identity(self) -> dict[str, int | None] | None:
        """What identifies the shared training data; ``None`` if the workers do not share any."""
        return None if self._data is None else self._data.identity

    def own_state(self) -> dict[str, Any]:
        """Of :meth:`state`, what is not in the ``.ckpt`` file that rank 0 writes at the same time."""
        state = self._position()
        if self._repeats:
            used = 0 if self._data is None else self._data.used_steps
            state |= {"round": self.round.state_dict(), "used": used, "memory": to_host(self._memory)}
        return state

    def state(self) -> dict[str, Any]:
        """Returns a copy of what a later fit of this worker goes on from."""
        return {**worker_state(self._trainer), **self._position()}

    def _position(self) -> dict[str, Any]:
        return {
            "schedulers": self.schedulers.state_dict(),
            "random": random_state(),
            "ends_epoch": self._trainer.fit_loop.epoch_loop.batch_progress.is_last_batch,
        }

    def show_metrics(self, metrics: dict[str, float]) -> None:
        """Puts the metrics of rank 0 into ``trainer.callback_metrics``."""
        tensors = {name: torch.tensor(value) for name, value in metrics.items()}
        self._trainer._logger_connector._callback_metrics.update(tensors)

    def restore(self) -> None:
        """Gives back what was changed of the Trainer."""
        trainer = self._trainer
        trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = self._min_epochs, self._min_steps
        trainer.val_check_batch = self._val_check_batch
        self.schedulers.release()
        if self._data is not None:
            self._data.detach()

    def _log_time(self) -> None:
        if self._clock is not None:
            self._module.log("virtual_seconds", self._clock(), rank_zero_only=True)

    def _next_round(self) -> None:
        self._end_round()
        self._exchange(self.round.push(self._memory, data=self._take_used()), self._fill)

    def _end_round(self) -> None:
        self._refuse_newly_trainable()
        # Once per round: in every batch the host would wait for the device, and the device then for the host.
        self.round.compute(0, self.stopwatch.drain())

    def _exchange(self, push: Push, fill: Callable[[Reach], object]) -> None:
        posted = self.stopwatch.now()
        pull, filled = self._client.exchange(push, fill)
        if pull.vector is not None:
            self._load(pull.vector, filled)
        self.round.receive(pull, waited=self.stopwatch.now() - posted)
        self._pull(pull.position, pull.plateaus)
        if not self._decides:
            self.show_metrics(pull.metrics)
        if self.round.stopped:
            self.finish(stop=False)
        else:
            self._show(pull.position)

    def _take_used(self) -> list[tuple[int, int]]:
        return [] if self._data is None else self._data.take_used()

    def _pull(self, position: int, plateaus: Sequence[tuple[int, float]]) -> None:
        missed, self._plateaus = self._plateaus, []
        self.schedulers.pull(position, [*missed, *plateaus])

    def _keep_state(self, marker: Marker, push: Push) -> None:
        """Keeps the state for a save whose marker came before the answer to this worker's push."""
        if self._decides:  # kept its state when it began the save
            return
        state = self.state()
        if self._repeats:
            state |= {"round": self.round.state_dict(), "push": to_host(vars(push))}
        self._keep(marker, state)

    def _refuse_newly_trainable(self) -> None:
        if names := self.vector.newly_trainable(self._module):
            raise RuntimeError(
                f"Parameters became trainable while training, so they do not travel: {', '.join(names[:5])}. Make them"
                " trainable before trainer.fit() starts, or unfreeze them with a callback that derives from"
                " lightning.pytorch.callbacks.BaseFinetuning."
            )

    def _fill(self, reach: Reach) -> None:
        assert self._memory is not None
        self.vector.pseudo_gradient_(self._memory, reach)

    def _load(self, model: Tensor, filled: Filled) -> None:
        self._memory = model
        self.vector.write(self._memory, filled)
        if not self.vector.lossless:
            self.vector.read(self._memory)

    @property
    def _ends_rounds_early(self) -> bool:
        """Whether a round ends before it is over, because a save waits for it; a simulation's rounds are planned."""
        return self._preemption.is_due and not self._repeats

    def _wants_to_stop(self) -> bool:
        return self._trainer.should_stop and self._trainer.fit_loop._can_stop_early

    def _is_last_batch(self) -> bool:
        fit_loop: Any = self._trainer.fit_loop
        is_last_epoch = fit_loop.epoch_progress.current.processed + 1 == fit_loop.max_epochs
        return bool(is_last_epoch and fit_loop.epoch_loop._num_ready_batches_reached())

    def _show(self, position: int, is_final: bool = False) -> None:
        """Makes the Trainer's global step the run's.

        Only the end of the run is its last step: Lightning's own end, and what saves or validates then, come with it.
        """
        trainer, loop = self._trainer, self._trainer.fit_loop.epoch_loop
        before = self._shown
        if is_final:
            self._shown = position
        elif not loop._should_accumulate():  # what saves at a global step must find no half-finished step
            self._shown = max(before, int(min(self._next_shown(position), self._end - 1)))
        if self._module.automatic_optimization:
            loop.automatic_optimization.optim_progress.optimizer.step.total.completed = self._shown
        else:
            loop.manual_optimization.optim_step_progress.total.completed = self._shown
        if not loop._should_accumulate():
            loop._batches_that_stepped = self._shown - self._lag(stands=self._shown == before and not is_final)
        if self._decides and (trainer.max_steps != -1 or self._data is not None):
            self._schedule_validation(before)
            self.schedulers.hold_plateaus(lambda n: self._is_due(before, n, self._epoch_batches), loop.batch_idx + 1)

    def _next_shown(self, position: int) -> int:
        """Moves the global step towards a position, without jumping over one at which Lightning does something."""
        trainer, before = self._trainer, self._shown
        log_every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        saving = [c._every_n_train_steps for c in callbacks if isinstance(c, ModelCheckpoint)]
        periods = [period for period in (self._validation_period, *saving) if period > 0]
        if log_every <= 1:
            return next_count(before, position, periods)
        periods.append(log_every)
        # Some log at the start of a batch, before the multiple; the end of that batch belongs to the same step.
        if (before + 1) % log_every == 0:
            return before + 1
        return min(next_count(before, position, periods), next_count(before + 1, position + 1, [log_every]) - 1)

    @property
    def _validation_period(self) -> int:
        """Global steps between validations that are counted in steps; 0 if they are not."""
        trainer = self._trainer
        interval, every = trainer.val_check_interval, trainer.check_val_every_n_epoch
        if not self._decides or not isinstance(interval, int) or every is not None:
            return 0
        return interval // trainer.accumulate_grad_batches

    def _lag(self, stands: bool) -> int:
        """How far Lightning's own count for logging is behind at the end of a batch: usually 1.

        A global step that stands still must not make Lightning log again, at the end of this batch or the start of the
        next.
        """
        log_every: int = self._trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not stands or log_every <= 1:
            return 1
        behind_multiple = self._shown % log_every
        if behind_multiple == 0:
            return 0
        return 2 if behind_multiple == log_every - 1 else 1

    def _schedule_validation(self, before: int) -> None:
        """Validates after ``val_check_interval`` batches of all workers, not of this one."""
        trainer, loop = self._trainer, self._trainer.fit_loop.epoch_loop
        interval, every = self._val_check_batch, trainer.check_val_every_n_epoch
        if not isinstance(interval, int) or (self._data is None and every not in (None, 1)):
            return
        epoch = self._epoch_batches if every else float("inf")
        if every and trainer.max_steps == -1:
            # The end of an epoch is where this worker's data of it ends: in the last epoch, after the last step of all.
            ends = loop.batch_progress.is_last_batch and epoch % interval == 0
            is_due = ends or self._is_due(before, interval, epoch, but_its_end=True)
        else:
            is_due = self._is_due(before, interval, epoch)
        present = (loop.batch_idx if every else loop.total_batch_idx) + 1
        trainer.val_check_batch = present if is_due else present + 1
        if is_due:  # its data is read before on_validation_start is called, and the device must not work unseen then
            self.round.compute(0, self.stopwatch.drain())

    def _is_due(self, before: int, interval: int, epoch: float, but_its_end: bool = False) -> bool:
        """Whether what happens every so many batches of an epoch is due since a global step."""
        accumulate = self._trainer.accumulate_grad_batches
        numbers = (batch % epoch + 1 for batch in range(before * accumulate, self._shown * accumulate))
        return any(number % interval == 0 and not (but_its_end and number == epoch) for number in numbers)


def _filled(reach: Reach) -> None:
    """For a push whose vector is complete already."""


def without_deciding(callbacks: list[Callback]) -> list[Callback]:
    """The callbacks less those with which rank 0 decides for all: saving and early stopping."""
    return [callback for callback in callbacks if not isinstance(callback, (Checkpoint, EarlyStopping))]


def unfreezes(callbacks: list[Callback]) -> bool:
    """Whether a callback makes parameters trainable while training."""
    return any(isinstance(callback, BaseFinetuning) for callback in callbacks)
