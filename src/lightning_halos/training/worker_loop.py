"""The worker inside Lightning's training loop: it turns batches into rounds.

It is a callback that the strategy installs for a fit. The servers' nodes make the decisions, and
:class:`~lightning_halos.training.trainer_adapter.TrainerAdapter` changes the Trainer; this file does neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lightning_halos.checkpoint.manifest import worker_shard
from lightning_halos.core.algorithms import ServerAlgorithm
from lightning_halos.core.messages import Marker, Pull, Push
from lightning_halos.core.vector import Advance, Fill
from lightning_halos.core.worker_wire import WorkerWire
from lightning_halos.training.agreement import Agreement
from lightning_halos.training.compat import show_metrics
from lightning_halos.training.first_metrics import FirstMetrics
from lightning_halos.training.frozen_watch import FrozenWatch
from lightning_halos.training.growth import GrowthWatch
from lightning_halos.training.hand_stepped import HandStepped
from lightning_halos.training.own_data import OwnData
from lightning_halos.training.preemption import Preemption
from lightning_halos.training.start import Start
from lightning_halos.training.step_counter import StepCounter
from lightning_halos.training.stopwatch import Stopwatch
from lightning_halos.training.trainer_adapter import TrainerAdapter
from lightning_halos.training.worker_state import (
    own_data_state,
    random_state,
    set_random_state,
    to_host,
    worker_state,
)
from lightning_halos.training.worlds import World
from lightning_halos.transport.alarm import EXIT_CODE, describe
from lightning_halos.transport.collectives import Collectives
from lightning_halos.transport.link import wait_all


class WorkerLoop(Callback):
    """Runs one worker's rounds.

    Args:
        start: The state from which the fit starts.
        world: The world that the worker trains in.
        lightning: The Trainer's adapter.
        preemption: Handles SIGTERM.
        first_metrics: Rank 0's first metrics.
        agreement: Asks the other processes of the worker.

    Attributes:
        round: The worker's round.
        finished: Whether the final model is loaded.
        final_model: The final global model, which an average may have replaced in the module.
        stopwatch: Measures how long this worker computes.
        end_evaluation: Puts the worker's own model back into the module, if that has the global model now.
    """

    def __init__(
        self,
        start: Start,
        world: World,
        lightning: TrainerAdapter,
        preemption: Preemption,
        first_metrics: FirstMetrics,
        agreement: Agreement,
    ) -> None:
        state = start.worker_state
        self.round = world.first_round
        self.finished = False
        self.final_model: Tensor | None = None
        self._vector = start.vector
        # The vector that the next push is relative to; `None` while a push is unanswered.
        self._memory = start.memory if state.get("memory") is None else state["memory"]
        self._trains_on = isinstance(start.algorithm, ServerAlgorithm) and start.algorithm.overlap
        self._averages_gradients = start.algorithm.averages_gradients
        self._has_answer = False
        self._wire = WorkerWire(world.wire, start.vector.num_parameters, start.vector.dtype)
        self._wire.load_state_dict(state)
        self._pushed: Tensor | None = state.get("pushed")  # the module's values at the unanswered push
        self._data = start.data
        self._world = world
        self._lightning = lightning
        self._trainer = start.trainer
        self._schedulers = lightning.schedulers
        self._preemption = preemption
        self._first_metrics = first_metrics
        self._agreement = agreement
        self._decides = agreement.of_lane_0(world.decides)  # if the worker's processes have to agree
        self._validates_in_step = True
        self._writer = start.saves.writer
        self._rank, self._lane = start.site.rank, start.site.lane
        self._is_rank_0 = self._rank == 0
        self._is_member = start.membership is not None
        has_rounds_in_flight = world.checkpointed is not None and not world.is_simulated
        self._own_data = OwnData(self._trainer) if self._data is None and has_rounds_in_flight else None
        self._snapshots: dict[str, dict[str, Any]] = {}  # of rank 0's worker: its states when they started, by save
        self._counter = StepCounter(self._trainer, self._has_changed)
        # The steps and the module's values when :meth:`_has_changed` was called last in a round with steps.
        self._seen: tuple[int, Tensor | None] = (0, None)
        self._rejected_before = world.rejected if self._is_rank_0 else 0
        self._norm_at_start = self._norm_of(start.memory)
        self._growth = GrowthWatch(start.site.topology)
        self._frozen_watch = FrozenWatch(start.vector.entries)
        self._hand_stepped = HandStepped(self._trainer, self._counter, start.origin)
        # Of rank 0 in a simulation: at the end of the last batch, which a validation must not change.
        self._random: dict[str, Any] | None = state.get("random") if world.is_simulated and self._is_rank_0 else None
        self._plateaus: Sequence[tuple[int, float]] = []
        self._push = state.get("push")
        if state:
            self._schedulers.load_state_dict(state["schedulers"])
            if "hand_stepped" in state:  # after a fit it is not needed, because all schedules are at the global step
                self._hand_stepped.load_state_dict(state["hand_stepped"])
            self._plateaus = start.plateau_steps[len(self._schedulers.history) :]
        if world.checkpointed is not None:
            world.checkpointed.on_marker(self._save_state)
        if "round" in state:
            self.round.load_state_dict(state["round"])
            if "answer" in state:
                world.client.answer = Pull(**state["answer"])
        else:
            self._move_schedulers(self.round.position, [] if start.entry is None else start.entry.plateau_steps)
        self._schedulers.end_batch()
        self.stopwatch = Stopwatch(self._trainer.strategy.root_device)
        self.end_evaluation: Callable[[], None] = lambda: None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._data is not None and not self.finished:
            self._data.attach()
            if self._data.is_left:
                self._lightning.leave_shared_data()

    def check(self) -> None:
        """Raises an exception that must end this process now: a failure, or a preemption after everything is saved."""
        if not (self._agreement.is_needed and self._preemption.is_known):  # else all of its processes end together
            self._world.alarm.check()
        self._preemption.check()

    @property
    def decides(self) -> bool:
        """Whether this process's worker validates and saves for the run, as all its processes see it."""
        return self._decides if self._agreement.is_needed else self._world.decides

    def _agree(self, stop: bool = False) -> bool:
        """Lets the worker's processes agree on what to do next. Returns whether any of them wants to stop."""
        has_answer = not self.round.is_answered and self._world.client.has_answer(self.round.batches)
        flags = self._agreement.ask([stop, self._world.decides, has_answer, *self._preemption.flags()])
        self._decides = flags[0][1]
        self._has_answer = all(row[2] for row in flags)
        self._preemption.follow([row[3:] for row in flags])
        return any(row[0] for row in flags)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._lightning.release_validation()
        self.check()
        self._preemption.act()
        self._counter.begin_batch()
        if self._own_data is not None:
            self._own_data.begin_batch()
        self._schedulers.before_batch(self.round.since)
        self._hand_stepped.begin_batch(self._next_global_step())
        self._log_time()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        batches = trainer.num_val_batches
        self._validates_in_step = self._agreement.is_same(str(batches)) and math.inf not in batches

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._agreement.is_needed and self._validates_in_step:  # else one process may be at the end already
            self._agree()
        self.check()
        self._preemption.act()
        if self._preemption.leaves and not self.finished:
            self.end_evaluation()
            self.finish(stop=False)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.finished:
            return
        self._vector.end_batch()
        seconds = self.stopwatch.lap()
        if self._data is not None:
            self._data.count_batch(self._lightning.ends_epoch)
        stepped = self._counter.end_batch()
        self._lightning.steps_per_batch = self._counter.per_batch
        self.round.count(stepped, seconds)
        if self._world.is_simulated and self._is_rank_0:
            self._random = random_state()
        if self._agree(self._wants_to_stop(stepped > 0)):
            self.finish(stop=True)
        elif self._lightning.is_last_batch or self._preemption.leaves:
            self.finish(stop=False)
        else:
            if stepped and self._has_answer:
                self._take_answer()
            if not self.round.stopped and (self.round.over or (stepped and self._ends_rounds_early)):
                self._next_round()
            self._follow_run()
        self.stopwatch.restart()

    def _wants_to_stop(self, stepped: bool) -> bool:
        """Whether the run has to stop after this batch. Workers that average gradients meet in batches with a step."""
        wants = self._lightning.wants_to_stop(self.round.position)
        if wants and self._averages_gradients and not stepped:
            self._lightning.hold_stop()
            return False
        return wants

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A simulation that resumes from the batch before this validation skips it, so it must not change random states.
        if self._random is not None:
            set_random_state(self._random)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log_time()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log_time()
        self._hand_stepped.end_epoch()
        if self._data is not None and self.finished:
            self._data.detach()  # there is no more of it to share, if a callback adds an epoch

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._world.alarm.report(describe(exception))

    def finish(self, stop: bool) -> None:
        """Pushes the last round, and loads the final global model. ``stop`` asks for the complete run to stop.

        If the worker's job leaves a run that goes on, the model is that of the moment, and this process ends here.

        Raises:
            SIGTERMException: If the job leaves the run.
        """
        self.round.count(self._counter.look(), 0.0)
        if not self.round.is_answered:
            self._take_answer()
        self._end_round(is_last=True)
        memory = self._memory if self.round.has_steps else None
        push = self.round.push(memory, stop, final=True, data=self._take_used())
        push.leave = self._preemption.leaves
        push.epoch = self._trainer.current_epoch
        self._finish(push, self._wire.filling(push, self._fill))
        if self._preemption.leaves:
            raise SIGTERMException(EXIT_CODE)

    def repeat_push(self) -> None:
        """Resumes the round of a simulation's checkpoint: pushes its result to the servers again."""
        if self._push is None:
            return
        push, self._push = Push(**self._push), None
        if push.final:
            self._finish(push, lambda advance: None)
            return
        if self._trains_on:
            self._pushed = self._vector.read(self._vector.new())
            self._send(push, lambda advance: None)
        else:
            self._exchange(push, lambda advance: None)
        self._follow_run()

    def _finish(self, push: Push, fill: Fill) -> None:
        if self._is_rank_0:  # all processes of its worker do, which changes nothing
            self._first_metrics.end_waits()
        final, progress = self._world.client.finish(push, fill)
        if final.vector is not None:
            self._vector.write(final.vector, progress)
        self._memory = self.final_model = final.vector
        self._world.alarm.disarm()
        self.finished = True
        self._move_schedulers(final.position, [])
        # A job may leave a run that goes on, or the global server may end it early.
        is_early = self._is_member and not self._lightning.has_reached_end(final.position)
        self._lightning.finish(final.position, final.stopped or is_early)

    def release(self) -> None:
        """Ends what :meth:`__init__` began in torch's optimizers and schedulers."""
        self._counter.close()
        self._hand_stepped.release()

    def refuse_fit_without_steps(self, collectives: Collectives) -> None:
        """Refuses a fit in which no worker made a step, when all workers are in step again.

        Raises:
            RuntimeError: On all ranks, if the workers trained on batches, but made no step, or if the servers rejected
                all that they pushed.
        """
        rejected = self._world.rejected - self._rejected_before if self._is_rank_0 else 0
        has_changed = self.final_model is not None and self._norm_of(self.final_model) != self._norm_at_start
        done = [self._counter.batches, self.round.total_steps, rejected, has_changed]
        batches, steps, rejected, changed = collectives.reduce(torch.tensor(done, dtype=torch.float64), "sum").tolist()
        if rejected and not changed:
            raise RuntimeError(
                "The servers rejected all that the workers pushed, because it had NaN or infinite values or was too"
                " large, so the final model is the initial one. Check the loss and the data; clip gradients, or lower"
                " the learning rate."
            )
        if batches and not steps:
            raise RuntimeError(
                f"The workers trained on {batches:g} batches, but no optimizer made a step and no parameter changed, so"
                " the final model is the initial one. Under manual optimization, training_step has to call"
                " optimizer.step(); with automatic optimization, configure_optimizers has to return an optimizer."
            )

    @staticmethod
    def _norm_of(model: Tensor | None) -> float:
        """Returns a number by which to tell whether a model has changed; 0 if this process has none."""
        return 0.0 if model is None else float(torch.linalg.vector_norm(model))

    def own_state(self) -> dict[str, Any]:
        """Returns the part of :meth:`state` that is not in the ``.ckpt`` file, which rank 0 writes at the same time."""
        state = self._position()
        if self._world.is_simulated:
            used = 0 if self._data is None else self._data.used_steps
            state |= {"round": self.round.state_dict(), "used": used, "memory": to_host(self._memory)}
            if (answer := self._world.client.answer) is not None:
                state |= {"pushed": to_host(self._pushed), "answer": to_host(vars(answer))}
        return state

    def state(self) -> dict[str, Any]:
        """Returns a copy of the state from which a later fit of this worker can continue."""
        return {**worker_state(self._trainer), **self._position()}

    def _position(self) -> dict[str, Any]:
        return {
            "schedulers": self._schedulers.state_dict(),
            "hand_stepped": self._hand_stepped.state_dict(),
            "random": self._random if self._random is not None and self._trainer.validating else random_state(),
            "ends_epoch": self._lightning.ends_epoch,
            **self._wire.state_dict(has_shadow=self._world.is_simulated),
        }

    def _set_global_step(self, position: int) -> None:
        if self._lightning.set_global_step(position):
            # Lightning reads a validation's data before on_validation_start, so count the device's work before that.
            self.round.count(0, self.stopwatch.drain())

    def _log_time(self) -> None:
        if self._world.clock is not None:
            self._trainer.lightning_module.log(
                "virtual_seconds", self._world.clock(), rank_zero_only=True, batch_size=1
            )

    def _next_round(self) -> None:
        if not self.round.is_answered:
            self._take_answer()
            if self.round.stopped or not self.round.over:
                return
        self._end_round(is_last=False)
        push = self.round.push(self._memory, data=self._take_used())
        push.epoch = self._trainer.current_epoch
        if self._own_data is not None:
            self._own_data.end_round(push.number)
        if self._trains_on:
            self._send(push, self._wire.filling(push, self._fill_and_keep))
        else:
            self._exchange(push, self._wire.filling(push, self._fill))

    def _end_round(self, is_last: bool) -> None:
        self._refuse_newly_trainable()
        self._seen = (0, None)
        self._frozen_watch.end_round(is_last)
        # Only once per round, because the device is idle afterwards until the host queues new work.
        self.round.count(0, self.stopwatch.drain())

    def _exchange(self, push: Push, fill: Fill) -> None:
        """Pushes a round, and loads the answer."""
        posted = self.stopwatch.now()
        pull, progress = self._world.client.exchange(push, fill)
        if pull.vector is not None:
            self._load(pull.vector, self._wire.arriving(pull, progress))
        self._receive(pull, posted)

    def _send(self, push: Push, fill: Fill) -> None:
        """Pushes a round, and starts the next one."""
        self._world.client.send(push, fill)
        self._memory = None
        self.round.train_on()
        is_here = all(flag for (flag,) in self._agreement.ask([self._world.client.has_answer(0)]))
        if is_here or self.round.over:  # no other step, as it may be one too many
            self._take_answer()

    def _take_answer(self) -> None:
        """Waits for the answer to the unanswered push, and adds the progress since the push to it."""
        self.round.count(0, self.stopwatch.drain())  # else the copies would wait for the device instead of the answer
        begin = self.stopwatch.now()
        pull = self._world.client.take()
        assert pull.vector is not None
        assert self._pushed is not None
        self._memory = pull.vector
        wait_all(self._wire.arriving(pull, [self._memory.numel()]))
        self._vector.add_progress_(self._memory, self._pushed)
        self._receive(pull, begin)

    def _receive(self, pull: Pull, begin: float) -> None:
        if pull.vector is not None:
            self._growth.look(pull.vector[: self._vector.num_parameters])
        self.round.receive(pull, waited=self.stopwatch.now() - begin)
        self._move_schedulers(self.round.position, pull.plateau_steps)
        if not self.decides:
            show_metrics(self._trainer, pull.metrics)

    def _follow_run(self) -> None:
        """Finishes if the run is over. Otherwise sets the global step, once per batch."""
        if self.round.stopped:
            self.finish(stop=False)
        else:
            self._set_global_step(self.round.global_step)

    def _next_global_step(self) -> float:
        """Returns the estimated global step after the next batch."""
        rate = self.round.rate if self.round.number else self._counter.per_batch
        return min(self.round.position + (self.round.since + 1) * rate, self._lightning.end)

    def _has_changed(self) -> bool:
        """Whether the module has changed its parameters without an optimizer.

        If the round has a step, its start says nothing. Then it is since the last call, if there was no step since.
        """
        before = self._memory if self.round.is_answered else self._pushed
        if before is None:
            return False
        now, parameters = self._vector.read(self._vector.new()), slice(self._vector.num_parameters)
        if self.round.has_steps:
            (steps, seen), self._seen = self._seen, (self._counter.steps, now)
            before = now if seen is None or steps != self._counter.steps else seen
        has_changed = not torch.equal(now[parameters], before[parameters])
        return any(flag for (flag,) in self._agreement.ask([has_changed]))

    def _take_used(self) -> list[tuple[int, int]]:
        return [] if self._data is None else self._data.take_used()

    def _move_schedulers(self, position: int, plateaus: Sequence[tuple[int, float]]) -> None:
        missed, self._plateaus = self._plateaus, []
        self._schedulers.pull(position, [*missed, *plateaus])
        self._hand_stepped.pull(position)

    def save_after_round(self, save: str, state: dict[str, Any]) -> None:
        """Writes a state of rank 0's worker for a snapshot that starts, when it knows its last push in the snapshot."""
        self._snapshots[save] = state

    def _save_state(self, marker: Marker, push: Push) -> None:
        """Writes this worker's state for a snapshot whose marker arrived before the answer to the worker's push."""
        state = self._snapshots.pop(marker.save) if self._is_rank_0 else self.state()
        if self._world.is_simulated:
            state |= {"round": self.round.state_dict(), "push": to_host(vars(push))}
            if self._trains_on and not push.final:
                state["model"] = to_host(self._pushed)
        elif self._own_data is not None:
            state |= own_data_state(self._own_data.position_in(marker.pushed))
        assert self._world.checkpointed is not None
        self._writer.shard(marker, worker_shard(self._rank, self._lane), state, self._world.checkpointed.tell)

    def _refuse_newly_trainable(self) -> None:
        if names := self._vector.newly_trainable(self._trainer.lightning_module):
            raise RuntimeError(
                f"Parameters became trainable during training, so they are not sent: {', '.join(names[:5])}. Make them"
                " trainable before trainer.fit() starts, or unfreeze them with a callback that inherits from"
                " lightning.pytorch.callbacks.BaseFinetuning."
            )

    def _fill(self, advance: Advance) -> None:
        assert self._memory is not None
        self._vector.pseudo_gradient_(self._memory, advance)

    def _fill_and_keep(self, advance: Advance) -> None:
        assert self._memory is not None
        self._pushed = self._vector.new() if self._pushed is None else self._pushed
        self._vector.pseudo_gradient_(self._memory, advance, self._pushed)

    def _load(self, model: Tensor, progress: Iterable[int]) -> None:
        self._memory = model
        self._vector.write(self._memory, progress)
        if not self._vector.lossless:
            self._vector.read(self._memory)

    @property
    def _ends_rounds_early(self) -> bool:
        """Whether to end a round early, because a snapshot waits for it. Rounds of a simulation are planned."""
        return self._preemption.is_due and not self._world.is_simulated
