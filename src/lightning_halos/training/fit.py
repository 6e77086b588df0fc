"""One fit of one process: all objects that exist only during training, made together at its start.

The strategy keeps the objects that outlive a fit. The work in a batch is in ``worker_loop``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, Checkpoint, StochasticWeightAveraging
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_halos.core.algorithms import ServerAlgorithm
from lightning_halos.core.messages import Marker
from lightning_halos.training.agreement import Agreement
from lightning_halos.training.callback_states import put_states, states_as_text
from lightning_halos.training.common_stop import CommonStop
from lightning_halos.training.compat import (
    AVERAGING_CALLBACKS,
    WEIGHT_AVERAGING,
    average_of,
    replace_metrics,
    restore_dump_checkpoint,
    show_metrics,
    wrap_dump_checkpoint,
)
from lightning_halos.training.first_hooks import FirstHooks
from lightning_halos.training.first_metrics import FirstMetrics, MetricsOfRank0, ShownMetrics, numbers
from lightning_halos.training.preemption import Departure, Preemption
from lightning_halos.training.same_model import FinalModel, broadcast_module, copy_from_module, log_rules
from lightning_halos.training.start import Start
from lightning_halos.training.trainer_adapter import TrainerAdapter, callbacks_of, is_deciding_callback
from lightning_halos.training.weight_averaging import GlobalAverage, GlobalStochasticAverage, GlobalTensors
from lightning_halos.training.worker_loop import WorkerLoop
from lightning_halos.training.worker_state import set_random_state
from lightning_halos.training.worlds import World
from lightning_halos.transport.link import MIN_PATIENCE
from lightning_halos.transport.packing import is_plain


class Fit:
    """One fit.

    Args:
        start: The state from which the fit starts.
        world: The world that the worker trains in.
        grace_time: Seconds after SIGTERM that saving a checkpoint may take.

    Attributes:
        lightning: The Trainer's adapter.
        worker_model: This worker's own model, while the module has the global model.
        is_training: Whether each worker trains on its own: from the end of :meth:`begin` until :meth:`stop`.
        is_over: Whether the world is closed.
    """

    def __init__(self, start: Start, world: World, grace_time: float) -> None:
        trainer, data = start.trainer, start.data
        self.start = start
        self.world = world
        self.worker_model: Tensor | None = None
        self._averages: list[GlobalAverage | GlobalStochasticAverage] = []
        self._first_hooks: FirstHooks | None = None
        self._final_model: FinalModel | None = None
        self._first_metrics = FirstMetrics(
            start.site.store_of_a_fit(), self.check, max(start.site.timeout, MIN_PATIENCE), start.site.process == 0
        )
        self._told_callbacks = ""
        self._told_validation = 0  # global step of the last validation that other jobs have heard of
        self._looked_in = 0  # number of the round in which the callbacks' states were compared last
        self._global_tensors_of: tuple[tuple[int, int], GlobalTensors] | None = None
        self.is_training = self.is_over = self._is_restored = False
        site, agreement = start.site, Agreement(start.site)
        self._of_lane_0 = agreement.of_lane_0
        self._decides = agreement.of_lane_0(world.decides)
        saves = start.saves if site.process == 0 else None
        self.preemption = Preemption(trainer, world.alarm, grace_time, saves, site.rank == 0, agreement.is_needed)
        if start.membership is not None:
            self.preemption = Departure(trainer, world.alarm, grace_time, agreement.is_needed)
        batches = None if data is None else data.batches
        has_entered = start.entry is not None
        self.lightning = TrainerAdapter(trainer, start.limit, start.extent_of_data, batches, self._decides, has_entered)
        in_batches = start.algorithm.averages_gradients
        self._common_stop = CommonStop(self.lightning, agreement, self.preemption, in_batches)
        if start.membership is not None:
            self.lightning.schedulers.set_deciding(self._decides)  # it may change
        self.loop = WorkerLoop(start, world, self.lightning, self.preemption, self._first_metrics, agreement)
        self.loop.end_evaluation = self._end_evaluation
        show_metrics(trainer, start.metrics)

    @property
    def trainer(self) -> pl.Trainer:
        return self.start.trainer

    def begin(self, end: Callable[[], None]) -> None:
        """Starts training, when all workers are ready.

        Args:
            end: Called when all workers have the final model, before any hook sees the end of training.
        """
        self._first_hooks = FirstHooks(
            self.loop,
            self.lightning,
            self._first_metrics,
            self.start.site,
            lambda: self.world.version,
            self.publish_plateaus,
            end,
        )
        self.lightning.install(self._first_hooks, self.loop)
        if not self._decides:
            self._take_metrics_of_rank_0()
        elif not self.trainer.enable_validation:
            self._first_metrics.tell({})
        if self.start.site.rank == 0:
            averaging = [callback for callback in callbacks_of(self.trainer) if isinstance(callback, WEIGHT_AVERAGING)]
            wrap_dump_checkpoint(self.trainer, self._dump_checkpoint)
            self._averages = [GlobalAverage(c, self.trainer.global_step, self._global_tensors) for c in averaging]
            stochastic = [c for c in callbacks_of(self.trainer) if isinstance(c, StochasticWeightAveraging)]
            self._averages += [GlobalStochasticAverage(callback, self._global_tensors) for callback in stochastic]
        if self._decides:
            self._go_on_deciding()
        if self.world.is_simulated and self.start.resume is not None:
            self.lightning.hold_validation()
        if self.start.memory is not None:
            log_rules(self.start.vector.entries)
        self.start.site.collectives.barrier()
        self._common_stop.install()
        self.is_training = True
        if self.start.entry is not None and self.start.entry.is_over:
            self.loop.finish(stop=False)
            self.trainer.should_stop = True
            return
        self.loop.repeat_push()
        # Starting an epoch's data draws a random number. If the state is from the end of an epoch, restore it before.
        state, data = self.start.worker_state, self.start.data
        if state.get("ends_epoch"):
            set_random_state(state["random"])
        if data is not None:
            leases = self.loop.stopwatch.excluding(self.world.leases)
            data.start(leases)
        if "random" in state and not state.get("ends_epoch"):
            set_random_state(state["random"])
        self.loop.stopwatch.restart()

    def share_final_model(self) -> None:
        """Completes the final model on all workers, which are in step, before hooks see the end of training."""
        start, module = self.start, self.trainer.lightning_module
        shards = start.vector.shards
        of_lane = start.site.lane_collectives if shards else None
        self._final_model = FinalModel(start.site.collectives, module, start.vector.entries, shards, of_lane)
        self._final_model.adopt_own(start.vector.frozen_names(module))

    def stop(self) -> None:
        """Restores the Trainer, and shares rank 0's model and decisions, when all workers are in step again."""
        self.is_training = False
        self.restore()
        self.loop.refuse_fit_without_steps(self.start.site.collectives)
        start = self.start
        may_differ = any(isinstance(callback, AVERAGING_CALLBACKS) for callback in callbacks_of(self.trainer))
        assert self._final_model is not None
        self._final_model.adopt(may_differ)
        for callback in callbacks_of(self.trainer):
            if isinstance(callback, WEIGHT_AVERAGING):  # trainer.validate() puts its average into the module
                broadcast_module(start.site.collectives, average_of(callback))
        self.share_decisions()

    def restore(self) -> None:
        """Restores every attribute of the Trainer that was changed for training. Later calls do nothing."""
        if self._is_restored:
            return
        self._is_restored = True
        self.loop.release()
        self._common_stop.restore()
        self.lightning.restore()
        restore_dump_checkpoint(self.trainer)
        replace_metrics(self.trainer, dict, dict, dict)
        for average in self._averages:
            average.restore()
        if self.start.data is not None:
            self.start.data.detach()

    def close(self, timeout: float) -> None:
        """Closes the world, and waits at most ``timeout`` seconds for the peers' goodbyes."""
        self.is_training = False
        self.preemption.release()
        self.worker_model = None
        if not self.is_over:
            self.is_over = True
            self.world.close(timeout)

    def check(self) -> None:
        """Raises an exception that must end this process now; see the strategy's method."""
        if not self.is_over:
            self.loop.check()

    def check_waiting(self) -> None:
        """Does the same as :meth:`check` while the main thread waits for other processes."""
        if self.is_training and not self.world.is_simulated:
            self.preemption.check()
        else:  # a simulation saves at the end of rank 0's round, not while rank 0 waits
            self.preemption.end_if_late()

    def raise_failure(self) -> None:
        """Raises the reason of a failed run, unless the Trainer is already handling it."""
        if not self.is_over and self.trainer.state.status != TrainerStatus.INTERRUPTED:
            self.world.alarm.check(wait=True)

    # ------------------------------------------------------------------ the global model

    @property
    def has_two_models(self) -> bool:
        """Whether this process decides, and trains, so that the worker's model and the global model differ."""
        return self.is_training and self.loop.decides and not self.loop.finished

    @contextmanager
    def global_model(self) -> Iterator[None]:
        """Puts the global model into the module for a ``with`` block; see the strategy's method."""
        if not self.has_two_models or self.worker_model is not None:
            yield
            return
        self.put_global_model_in()
        try:
            yield
        finally:
            self.put_worker_model_back()

    def put_global_model_in(self) -> None:
        """Puts the global model into the module. Time until the worker's model is back does not count as computing."""
        self.loop.stopwatch.pause()
        vector = self.start.vector
        self.worker_model = vector.read(vector.new())
        vector.write(self._read_global_model())

    def put_worker_model_back(self) -> None:
        """Puts the worker's model back into the module."""
        assert self.worker_model is not None
        self.start.vector.write(self.worker_model)
        self.worker_model = None
        self.loop.stopwatch.resume()

    def _end_evaluation(self) -> None:
        if self.worker_model is not None:
            self.put_worker_model_back()

    def global_parts(self, module: nn.Module) -> dict[str, Tensor]:
        """Returns those of the global model's parameters and buffers that are sent, by name."""
        return self.start.vector.named_parts(module, self._read_global_model())

    def _dump_checkpoint(self, dump: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Makes the contents of a checkpoint. Hooks that add to them, or write other files, see the global model."""
        module, base = self.trainer.lightning_module, Callback.on_save_checkpoint
        callbacks = [c for c in callbacks_of(self.trainer) if not isinstance(c, (Checkpoint, *WEIGHT_AVERAGING))]
        overriding = [c for c in callbacks if type(c).on_save_checkpoint is not base]
        if not overriding and not is_overridden("on_save_checkpoint", module):
            return dump()
        with self.global_model():
            contents = dump()
            copy_from_module(module, contents)
            return contents

    def _global_tensors(self, module: nn.Module) -> nn.Module | GlobalTensors:
        """Returns the global model in the form of a module's tensors. It is read once per version and round."""
        if not self.has_two_models or self.start.algorithm.averages_gradients:
            return module
        if len(self.start.site.worker_processes) > 1:  # none of them has all parts, and they must agree on the moment
            with self.global_model():
                own = module.parameters(), module.buffers()
                return GlobalTensors(*([tensor.detach().to("cpu", copy=True) for tensor in kind] for kind in own))
        with self.loop.stopwatch.paused():
            version = self._of_lane_0(self.world.version)
            moment = version, self.loop.round.number  # a simulation has one model for all of a round
            if self._global_tensors_of is None or self._global_tensors_of[0] != moment:
                self._global_tensors_of = moment, self._read_global_tensors(module)
            return self._global_tensors_of[1]

    def _read_global_tensors(self, module: nn.Module) -> GlobalTensors:
        if not self.start.vector.is_alone:  # the others have parts of it, and complete the module together
            with self.global_model():
                parameters = [parameter.detach().clone() for parameter in module.parameters()]
                return GlobalTensors(parameters, [buffer.clone() for buffer in module.buffers()])
        parts = self.global_parts(module)
        parameters = [parts.get(name, parameter) for name, parameter in module.named_parameters()]
        return GlobalTensors(parameters, [parts.get(name, buffer) for name, buffer in module.named_buffers()])

    def told_snapshot(self, marker: Marker | None) -> Marker | None:
        """Returns lane 0's marker of a snapshot, in all processes of rank 0's worker."""
        save, folder = self._of_lane_0(("", "") if marker is None else (marker.save, marker.folder))
        return Marker(save, folder) if save else None

    def begin_validation(self) -> None:
        """Begins a validation, before the first of its hooks."""
        if self._first_hooks is not None:
            self._first_hooks.before_validation(self.trainer, self.trainer.lightning_module)
        if self.has_two_models:
            self.loop.stopwatch.restart()  # the time since the last batch was spent on starting the validation
            self.put_global_model_in()

    def end_validation(self) -> None:
        """Ends a validation, after the last of its hooks."""
        if self.worker_model is not None:
            self.put_worker_model_back()
            self.publish([])
        if self._first_hooks is not None:
            self._first_hooks.after_validation(self.trainer, self.trainer.lightning_module)

    def publish(self, plateaus: Sequence[tuple[int, float]]) -> None:
        """Sends this process's metrics, and the steps of its plateau schedulers, to all workers."""
        if self.start.membership is not None:
            self._told_validation = self.lightning.validated
            self._told_callbacks = states_as_text(callbacks_of(self.trainer), self._told_validation)
        self.world.publish(plateaus, numbers(self.trainer.callback_metrics), self._told_callbacks)

    def publish_plateaus(self) -> None:
        """Sends what this process's plateau schedulers have done since the last call, if it decides."""
        if self.loop.decides and (stepped := self.lightning.schedulers.plateaus()):
            self.publish(stepped)

    def follow_decisions(self) -> None:
        """Decides from this batch on, or no longer, if that has changed; and publishes what its callbacks remember."""
        if self.start.membership is None or self.start.site.rank > 0 or self.loop.finished:
            return
        if self.loop.decides == self._decides:
            has_validated = self.lightning.validated != self._told_validation
            if self._decides and (has_validated or self.loop.round.number != self._looked_in):
                self._looked_in = self.loop.round.number  # not in every batch, because callbacks copy their states
                if states_as_text(callbacks_of(self.trainer), self.lightning.validated) != self._told_callbacks:
                    self.publish([])
            return
        self._decides = self.loop.decides
        self.lightning.set_deciding(self._decides)
        if self._decides:
            replace_metrics(self.trainer, dict, dict, dict)
            self._go_on_deciding()
            rank_zero_info("This job validates and saves checkpoints for the run from now on.")
        else:
            self._take_metrics_of_rank_0()
            rank_zero_info("Another job validates and saves checkpoints for the run from now on.")

    def _go_on_deciding(self) -> None:
        text = self._of_lane_0(self.world.callbacks)
        self.lightning.follow_validations(put_states(callbacks_of(self.trainer), text))

    def _read_global_model(self) -> Tensor:
        vector = self.start.vector
        if self.start.algorithm.averages_gradients:  # then the module already has the global model
            return vector.read(vector.new())
        model = vector.new()
        self.world.read(model)
        return model

    def _take_metrics_of_rank_0(self) -> None:
        def value(name: str) -> Tensor:
            return self.trainer.callback_metrics[name]

        replace_metrics(
            self.trainer,
            lambda present: MetricsOfRank0(present, self._wait_for_metrics),
            lambda present: ShownMetrics(present, value),
            lambda present: ShownMetrics(present, lambda name: value(name).item()),
        )

    def _wait_for_metrics(self) -> dict[str, float] | None:
        """Returns rank 0's first metrics, if there would be some under DDP by now; see :class:`MetricsOfRank0`."""
        if not self.lightning.would_have_validated:
            return {}
        may_wait = not self.world.is_simulated and isinstance(self.start.algorithm, ServerAlgorithm)
        may_wait = may_wait and self.start.membership is None  # the process that decides may be in another job
        with self.loop.stopwatch.paused():
            try:
                return self._first_metrics.wait(may_wait, self.loop.finished)
            except dist.DistError:  # rank 0, whose process has the store, has ended
                self.raise_failure()
                raise

    def share_decisions(self) -> None:
        """Shares rank 0's decisions, so that trainer.test(ckpt_path="best") means the same file on all ranks."""
        collectives, schedulers, rank = self.start.site.collectives, self.lightning.schedulers, self.start.site.process
        schedulers.plateaus()
        schedulers.catch_up(collectives.broadcast_object(schedulers.history))
        shown = (self.trainer.callback_metrics, self.trainer.logged_metrics, self.trainer.progress_bar_metrics)
        show_metrics(self.trainer, *collectives.broadcast_object([numbers(metrics) for metrics in shown]))
        deciding = {c.state_key: c for c in callbacks_of(self.trainer) if is_deciding_callback(c)}
        states: dict[str, Any] = {}
        if rank == 0:
            states = {key: callback.state_dict() for key, callback in deciding.items()}
            for key in [key for key, state in states.items() if not is_plain(state)]:
                rank_zero_warn(
                    f"The state of the callback {key} stays on rank 0: it cannot be sent without pickling it."
                )
                del states[key]
        states = collectives.broadcast_object(states)
        if rank > 0:
            for key in states.keys() & deciding.keys():
                deciding[key].load_state_dict(states[key])
