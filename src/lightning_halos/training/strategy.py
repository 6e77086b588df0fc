"""The Lightning strategy: it launches processes, connects them, and passes Lightning's hooks on to the present fit.

Objects that exist only during training are in ``fit``, and the work in a batch is in ``worker_loop``.
"""

from __future__ import annotations

import inspect
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.strategies import ParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_halos.checkpoint.files import AtomicCheckpointIO, is_local, local_path
from lightning_halos.checkpoint.resume import available
from lightning_halos.core.algorithms import Algorithm, ServerAlgorithm, SynchronousAlgorithm
from lightning_halos.core.checks import check_seconds
from lightning_halos.core.worker import WorkerRound
from lightning_halos.extras import tuning_package
from lightning_halos.planning.settings import unknown_arguments
from lightning_halos.simulation.cluster import SimulatedCluster
from lightning_halos.simulation.history import Event
from lightning_halos.training.compat import (
    StrategyRegistry,
    enclose_validation,
    end_making_validation_data,
    find_trainer,
    is_accumulating,
    is_finding_learning_rate,
    make_validation_data_when_asked,
    optimizers_to_device,
    run_validation_in,
    set_default_checkpoint_io,
    synchronizes_batch_norm,
)
from lightning_halos.training.composed_strategy import ComposedStrategy
from lightning_halos.training.connected_strategy import StartMethod
from lightning_halos.training.default_group import (
    environment_alone,
    refuse_sharing,
    set_batch_norm_local,
    tell_rank_to_workers,
    use_all_samples,
    without_telling_rank,
)
from lightning_halos.training.fit import Fit
from lightning_halos.training.gradients import average_gradients
from lightning_halos.training.inner import InnerStrategy
from lightning_halos.training.membership import without_progress
from lightning_halos.training.other_packages import WHAT_TO_DO
from lightning_halos.training.preemption import let_data_workers_end, outlive_sigterm
from lightning_halos.training.same_model import check_initialized, copy_from_module, names_in_state
from lightning_halos.training.server_settings import find_server
from lightning_halos.training.shards import Shards
from lightning_halos.training.start import Start
from lightning_halos.training.trainer_adapter import NoValidation
from lightning_halos.training.worker_state import go_on_in_epoch
from lightning_halos.training.worlds import SimulatedWorld, World, make_world
from lightning_halos.transport.alarm import EXIT_CODE

if TYPE_CHECKING:
    from lightning_halos.tuning.report import Tuned

_GOODBYE = 2.0  # seconds to wait for the peers' goodbyes after an exception


class AlgorithmStrategy(ComposedStrategy):
    """Trains any LightningModule with an algorithm in which workers run local steps and exchange models.

    Each device has a process, and one or more processes are a worker. :class:`~lightning_halos.HalosStrategy` and the
    other strategies are subclasses that make their own algorithm.

    Args:
        algorithm: The algorithm.
        regions: As in :class:`~lightning_halos.HalosStrategy`, and so are all other arguments.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is invalid; when the Trainer is made, if the regions do not match its workers.
    """

    _names: tuple[tuple[str, StartMethod], ...] = ()  # in Lightning's registry, each with its `start_method`

    def __init__(
        self,
        algorithm: Algorithm,
        regions: int | Sequence[Sequence[int]] | None = None,
        start_method: StartMethod = "popen",
        timeout: float = 1800,
        grace_time: float = 20,
        simulate: SimulatedCluster | str | Path | None = None,
        server: str | None = None,
        keys: str | Path | None = None,
        streams: int = 4,
        worker: int | Literal["node"] = 1,
        inner: InnerStrategy | str | None = None,
        **kwargs: Any,
    ) -> None:
        passed_on = inspect.signature(ParallelStrategy).parameters
        if unknown := [name for name in kwargs if name not in passed_on]:
            raise TypeError(unknown_arguments(type(self), unknown))
        its_server = find_server(server, keys, streams)
        super().__init__(algorithm, regions, start_method, timeout, simulate, its_server, worker, inner, **kwargs)
        check_seconds("grace_time", grace_time)
        self._grace_time = float(grace_time)
        self._shards: Shards | None = None
        self._fit: Fit | None = None
        self.algorithm_of_run: Algorithm | None = None  # of the present or last fit, with the length of the run
        self._no_validation = NoValidation()
        self._evaluates = False
        self._history: list[Event] = []
        self._virtual_seconds = 0.0

    @classmethod
    def register_strategies(cls, strategy_registry: StrategyRegistry) -> None:
        """Registers the strategy under its names."""
        for name, start_method in cls._names:
            strategy_registry.register(
                name, cls, description=f"{cls.__name__} with `start_method` '{start_method}'", start_method=start_method
            )

    @classmethod
    def tune(
        cls,
        cluster: SimulatedCluster | str | Path,
        make: Callable[[], Any],
        *,
        hours: float,
        steps: int = 600,
        virtual_hours: float | None = None,
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        target: float | None = None,
        start: dict[str, Any] | None = None,
        fixed: dict[str, Any] | None = None,
        trainer: Mapping[str, Any] | None = None,
        jobs: int | None = None,
        trials: int | None = None,
        folder: str | Path = "tuning",
        seed: int = 0,
        progress: bool = True,
        command: str = "",
    ) -> Tuned:
        """Searches settings for a cluster by training in simulations of it; see ``docs/tuning.md``.

        It needs the extra ``tune``. The same call goes on with the search in its folder.

        Args:
            cluster: The cluster, or the path of its YAML file.
            make: Returns a new module and its data: ``(module, datamodule)``, or ``(module, train_loader,
                val_loader)``. It is called in each trial.
            hours: Hours to search, of wall-clock time.
            steps: Global steps of the settings to start from. Each trial gets the virtual time that they need.
            virtual_hours: The virtual time of each trial, instead.
            monitor: The metric to optimize, which the module logs in validation.
            mode: ``"min"`` or ``"max"``: whether lower or higher values are better.
            target: A value of the metric: search the shortest virtual time to it. Default: search the best value after
                the virtual time.
            start: Settings to start from, as arguments of the strategy in the form of LightningCLI. Default: the
                strategy's defaults.
            fixed: Arguments of the strategy that are not varied, in this form.
            trainer: Further arguments of the trials' Trainers, such as ``{"gradient_clip_val": 1.0}``.
            jobs: Trials side by side. Default: one per core that this process may use.
            trials: The most trials to train now. Default: no limit.
            folder: Folder for ``best.yaml``, ``table.txt`` and ``study.db``.
            seed: Of the module and the data in each trial, and of the search.
            progress: Whether to show a progress bar and a line for each trial.
            command: A command to write into ``best.yaml``.

        Returns:
            The best settings: ``HalosStrategy(**tuned.arguments)`` trains with them. After Ctrl-C, those found so far.

        Raises:
            ModuleNotFoundError: Without optuna.
            TypeError: If an argument has the wrong type, or ``make`` returns something else.
            ValueError: If an argument is invalid, the module logs no such metric, all trials fail, or the folder has
                another search.
        """
        if "fork" not in multiprocessing.get_all_start_methods():
            raise ValueError("A search forks its trials' processes, which this system cannot.")
        tuning_package("optuna")
        from lightning_halos.tuning.tune import tune

        return tune(
            cls,
            cluster,
            make,
            hours=hours,
            steps=steps,
            virtual_hours=virtual_hours,
            monitor=monitor,
            mode=mode,
            target=target,
            start=start,
            fixed=fixed,
            trainer=trainer,
            jobs=jobs,
            trials=trials,
            folder=folder,
            seed=seed,
            progress=progress,
            command=command,
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {WHAT_TO_DO}>"  # other Trainers show it when they refuse the strategy

    @property
    def servers(self) -> World | None:
        """The world with the global model and the servers' counters; only on rank 0 and during a fit."""
        fit = self._fit
        return fit.world if fit is not None and not fit.is_over and fit.world.has_global_model else None

    @property
    def decides(self) -> bool:
        """Whether this process validates and saves for the run during a fit; otherwise whether it has rank 0.

        In a worker of several processes all of them do, in step, but only rank 0 writes files.
        """
        fit = self._fit
        return self.is_global_zero if fit is None or fit.is_over else fit.loop.decides

    @property
    def round(self) -> WorkerRound | None:
        """This worker's round; only during a fit."""
        return None if self._fit is None or self._fit.is_over else self._fit.loop.round

    @property
    def history(self) -> list[Event]:
        """All events of a simulation's present or last fit, by virtual time; during a fit only on rank 0."""
        return self._history if self._simulation is None else self._simulation.history

    @property
    def virtual_seconds(self) -> float:
        """A simulation's virtual time: the end of rank 0's present round; after the fit, the end of the fit."""
        return self._virtual_seconds if self._simulation is None else self._simulation.virtual_seconds

    @property
    def model_seconds(self) -> float:
        """The virtual time at which a simulation's global model, as validation reads it, was there.

        Servers are read at the end of rank 0's present round. Under a synchronous algorithm nothing has happened since
        the last round of all workers, which must not be blamed for the next one.
        """
        if isinstance(self.algorithm, SynchronousAlgorithm):
            return self.history[-1].time / 1e3 if self.history else 0.0
        return self.virtual_seconds

    @property
    def _simulation(self) -> SimulatedWorld | None:
        fit = self._fit
        return fit.world if fit is not None and isinstance(fit.world, SimulatedWorld) else None

    def store_history(self, history: list[Event], virtual_seconds: float) -> None:
        """Stores the history of a simulation that has ended."""
        self._history, self._virtual_seconds = history, virtual_seconds

    # ------------------------------------------------------------------ setup

    def _configure_launcher(self) -> None:
        set_default_checkpoint_io(self, AtomicCheckpointIO())  # the Trainer has passed on its plugins before
        super()._configure_launcher()

    def setup_environment(self) -> None:
        super().setup_environment()
        if self._shards is None:
            run = f"{self.algorithm.title}{'' if self.cluster is None else ' in a simulated cluster'}"
            self._shards = Shards(self.site, run, has_server_shards=self.cluster is None)

    def setup(self, trainer: pl.Trainer) -> None:
        assert self.model is not None
        check_initialized(self.model)
        if self.inner is None:
            self._setup_one_process(trainer)
        else:
            self.setup_inner(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            self.synchronize_module()
            return
        refuse_sharing(self.model, self.optimizers, self.site.worker_processes)
        set_batch_norm_local(self.model, True, self.site.inner_group)
        if self.site.rank == 0:
            run_validation_in(trainer, partial(environment_alone, self.site))
            enclose_validation(trainer, self._begin_validation, self._end_validation)
        else:
            make_validation_data_when_asked(trainer, partial(environment_alone, self.site))
            self._no_validation.apply(trainer)

    def _setup_one_process(self, trainer: pl.Trainer) -> None:
        """Does what Lightning's strategy for one device does."""
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        if synchronizes_batch_norm(self):
            rank_zero_warn(
                "sync_batchnorm=True has no effect with the halos strategy: the statistics of BatchNorm are averaged"
                " with the model."
            )
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        is_fit = trainer.state.fn == TrainerFn.FITTING
        if is_fit:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if is_fit:
            optimizers_to_device(self.optimizers, self.root_device)

    # ------------------------------------------------------------------ training

    def process_dataloader(self, dataloader: object) -> object:
        """Lets DataLoader workers survive SIGTERM, as their training process does, and know its rank."""
        if isinstance(dataloader, DataLoader):
            if self.only_rank_zero_works:
                dataloader = use_all_samples(dataloader, self.site)
            without_telling_rank(dataloader)
            outlive_sigterm(dataloader, self.global_rank, self._grace_time)
            tell_rank_to_workers(dataloader)
        return dataloader

    def on_train_start(self) -> None:
        self.synchronize_module()
        if is_finding_learning_rate(self.trainer):
            return  # each worker trains alone: one that exchanges models would see losses that its rate has not made
        assert self._shards is not None
        shards, trainer = self._shards, self.trainer
        resume = shards.start_fit()
        start = Start(self.site, self.algorithm, trainer, resume, shards.saves, self.membership)
        world = make_world(start, self.cluster)
        self._fit = Fit(start, world, self._grace_time)
        self.algorithm_of_run = start.algorithm
        if self.is_global_zero and world.checkpointed is not None:
            shards.link_when_complete(trainer.checkpoint_callbacks)
            shards.hold_loggers(trainer.loggers)
        self._fit.begin(self._end_training)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.wrap_unfrozen()  # here, because the module's hook of this name has run
        if self._fit is None:
            return
        self._fit.start.vector.begin_batch()
        self._fit.follow_decisions()
        assert self._shards is not None
        self._shards.tell_loggers()
        self._fit.publish_plateaus()

    def post_backward(self, closure_loss: Tensor) -> None:
        """Averages the gradients over all workers before they are clipped and used, if the algorithm requires it."""
        super().post_backward(closure_loss)
        if not self.algorithm.averages_gradients or not self.trains_at_own_pace or is_accumulating(self.trainer):
            return
        assert self.lightning_module is not None
        average_gradients(self.lightning_module, self._mean)

    def _mean(self, tensor: Tensor) -> Tensor:
        """Returns the mean of a tensor over all workers."""
        # The processes of a worker have the same gradients already, or each of them has its part. Each sends all that
        # it has, on one machine: the algorithm is only simulated, and the described links take the time of a slice.
        site = self.site
        if site.placement.is_even:
            return site.lane_collectives.sum_(tensor) / site.size
        return site.collectives.sum_(tensor) / site.processes

    def _begin_validation(self) -> None:
        """Puts the global model into the module, before hooks may put an average of it in instead."""
        if self._fit is not None:
            self._fit.begin_validation()

    def _end_validation(self) -> None:
        """Puts the worker's model back into the module, after hooks have undone what they did with the global model."""
        if self._fit is not None:
            self._fit.end_validation()

    @contextmanager
    def global_model(self) -> Iterator[None]:
        """Puts the present global model into the module for a ``with`` block, as validation does.

        It is for callbacks of rank 0 during a fit, in a region job only while :attr:`decides`. The other workers go on
        training, and the time does not count in this worker's speed. During validation and after the fit the module
        already has the global model. On other ranks nothing happens.
        """
        before, self._evaluates = self._evaluates, self.decides
        try:
            with nullcontext() if self._fit is None else self._fit.global_model():
                yield
        finally:
            self._evaluates = before

    def check(self) -> None:
        """Ends this process if the run has failed, or has saved a checkpoint after SIGTERM.

        Callbacks that take long during a fit should call it repeatedly. Every batch calls it, too.

        Raises:
            RuntimeError: If the run has failed.
            SystemExit: After SIGTERM.
        """
        if self._fit is not None:
            self._fit.check()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the state of the *global* model on rank 0 during a fit, and of the module otherwise."""
        with self._not_computing():
            fit, module = self._fit, self.lightning_module
            assert module is not None
            if fit is None or not fit.has_two_models or fit.worker_model is not None:
                return super().lightning_module_state_dict()
            if self.inner is not None:  # no process has all parts
                with fit.global_model():
                    state = super().lightning_module_state_dict()
                    copy_from_module(module, state)
                    return state
            state = super().lightning_module_state_dict()
            parts = fit.global_parts(module)
            names = names_in_state(module, state)
            if names is not None:
                state.update({key: parts[name] for key, name in names.items() if name in parts})
                return state
            # The module makes other tensors from its own, so it has to do this with the global model.
            with fit.global_model():
                state = super().lightning_module_state_dict()
                copy_from_module(module, state)
                return state

    def _not_computing(self) -> AbstractContextManager[None]:
        """Excludes the time of a ``with`` block from this worker's speed."""
        fit = self._fit
        return nullcontext() if fit is None or fit.is_over else fit.loop.stopwatch.paused()

    @property
    def only_rank_zero_works(self) -> bool:
        return self._evaluates or super().only_rank_zero_works

    @property
    def trains_at_own_pace(self) -> bool:
        return self._fit is not None and self._fit.is_training

    @property
    def _saves_servers(self) -> bool:
        """Whether the algorithm has servers whose state belongs in checkpoints."""
        if self.membership is not None:
            return False  # the run is in the global server's directory
        if self.cluster is not None:
            return not self.algorithm.averages_gradients
        return isinstance(self.algorithm, ServerAlgorithm)

    @property
    def _saves_shards(self) -> bool:
        """Whether checkpoints have shards now: not without servers, and not after the run has failed."""
        if not self._saves_servers:
            return False
        if self._fit is not None and not self._fit.is_over:
            return not self._fit.world.alarm.has_failed
        return self._shards is not None and self._shards.ended is not None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Writes a checkpoint; see ``docs/checkpoints.md``. During a fit only rank 0 does, and no worker waits.

        Raises:
            OSError: If it cannot be written after the fit. During a fit this is a warning.
        """
        if is_local(filepath):
            filepath = local_path(filepath)
        fit, shards, saves_shards = self._fit, self._shards, self._saves_shards
        if fit is not None and fit.is_training and not fit.loop.finished and not self.decides:
            return  # its module has a worker's model
        is_preempted = fit is not None and fit.preemption.saved is not None
        if is_preempted and self._saves_servers and not saves_shards:
            return  # a checkpoint of an interrupted run would have no shards, but be newer than the one that has
        if fit is not None and fit.is_training and not saves_shards:
            fit.raise_failure()
        has_shards = saves_shards and "optimizer_states" in checkpoint and not storage_options and is_local(filepath)
        io = self.checkpoint_io
        if isinstance(io, AsyncCheckpointIO) and io.checkpoint_io is not None:
            io = io.checkpoint_io  # a save with shards has to know when its file is there
        write = io.save_checkpoint
        with self._not_computing():
            if shards is None or not has_shards:
                super().save_checkpoint(checkpoint, filepath, storage_options)
            elif fit is None or not fit.is_training:
                shards.save_together(self.trainer, checkpoint, Path(filepath), write)
            elif fit.has_two_models:
                if self.is_global_zero:
                    shards.save_while_training(fit, checkpoint, Path(filepath), write)
                else:
                    shards.follow_snapshot(fit)
            elif self.is_global_zero:
                shards.save_at_end(fit, checkpoint, Path(filepath), write)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        if is_local(filepath):
            filepath = local_path(filepath)
        if self.is_global_zero and self._shards is not None:
            self._shards.remove(filepath, partial(self.checkpoint_io.remove_checkpoint, filepath))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint. For a fit, this worker's own state replaces rank 0's.

        Raises:
            CheckpointError: If it is incomplete or damaged.
        """
        if is_local(checkpoint_path):
            checkpoint_path = available(local_path(checkpoint_path))
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        is_fit = self.trainer.state.fn == TrainerFn.FITTING
        if is_fit and self.membership is not None:
            self.clear_optimizers()
            return without_progress(checkpoint)
        if is_fit and self.trainer.max_steps != -1 and "loops" in checkpoint:
            go_on_in_epoch(checkpoint)
        if not is_fit or not self._saves_servers or self._shards is None:
            return checkpoint
        joins, max_epochs = self.lightning_restore_optimizer, self.trainer.max_epochs
        checkpoint = self._shards.load(Path(checkpoint_path), checkpoint, max_epochs, joins)
        if not joins and (resume := self._shards.resume) is not None:
            self.load_optimizers(resume.optimizers, is_new=self.site.rank >= resume.manifest.workers)
        return checkpoint

    def _end_training(self) -> None:
        """Lets hooks at the end of training use the final model, and rank 0's decisions and checkpoints."""
        assert self._fit is not None
        with self._fit.preemption.ends_like_others():
            self._fit.share_final_model()
            self._fit.share_decisions()
            self._complete_checkpoints()

    def _complete_checkpoints(self) -> None:
        if self._saves_shards:
            assert self._shards is not None
            assert self._fit is not None
            self._shards.end_fit(self._fit)
            self._shards.tell_loggers()

    def on_train_end(self) -> None:
        if self._fit is None:
            return
        with self._fit.preemption.ends_like_others():
            self._fit.stop()
            self._complete_checkpoints()
        self._fit.preemption.remove_old_checkpoint()
        self._end_fit(self.timeout)

    def _end_fit(self, timeout: float) -> None:
        if self._simulation is not None:
            self.store_history(self._simulation.history, self._simulation.virtual_seconds)
        if self._fit is not None:
            self._fit.close(timeout)

    # ------------------------------------------------------------------ the end

    def on_exception(self, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException) and exception.code is None:
            exception.code = EXIT_CODE  # Lightning's own exit code would look like success to a launcher
        super().on_exception(exception)
        if self._fit is not None:
            self._fit.restore()

    def teardown(self) -> None:
        if (trainer := find_trainer(self.lightning_module)) is not None:
            self._no_validation.undo(trainer)
            end_making_validation_data(trainer)
            state = trainer.state
            if self._fit is None and state.fn == TrainerFn.FITTING and state.status == TrainerStatus.RUNNING:
                self.synchronize_module()  # a fit without a batch has ended before it started
        if self._fit is not None:
            self._fit.restore()
        if self.model is not None:
            set_batch_norm_local(self.model, False)
        if self._shards is not None:
            self._shards.release_loggers()
        let_data_workers_end()
        self._end_fit(_GOODBYE)
        if self.membership is not None:
            self.membership.close(_GOODBYE)
            self.membership = None
        self._fit = None
        super().teardown()

    def check_interrupted(self) -> None:
        trainer = find_trainer(self.lightning_module)
        if trainer is not None and trainer.received_sigterm:
            raise SIGTERMException(EXIT_CODE)
        if self._fit is not None:
            self._fit.check_waiting()


# Lightning refuses modules of torch.compile unless the strategy is of a kind that it knows. Like this one, a strategy
# for one device wraps the module in nothing.
SingleDeviceStrategy.register(AlgorithmStrategy)
