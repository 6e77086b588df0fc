"""The state from which a fit starts, and the ordered work: the arithmetic of resuming. It starts nothing itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_halos.checkpoint.errors import CheckpointError
from lightning_halos.checkpoint.resume import Resume
from lightning_halos.checkpoint.saves import Saves
from lightning_halos.core import run_length
from lightning_halos.core.algorithms import Algorithm, ServerAlgorithm
from lightning_halos.core.algorithms.defaults import ASSUMED_STEPS
from lightning_halos.core.cursor import Spans
from lightning_halos.core.schedule import StepBudget, global_step
from lightning_halos.core.sharding import WorkerProcesses
from lightning_halos.core.vector import ModelVector
from lightning_halos.training.growth import without_momentum_for_lbfgs
from lightning_halos.training.membership import Entry, Membership, describe_run
from lightning_halos.training.own_data import steps_left
from lightning_halos.training.read_shards import read_slices
from lightning_halos.training.same_data import can_share
from lightning_halos.training.shared_data import SharedData
from lightning_halos.training.site import Site
from lightning_halos.training.trainer_adapter import callbacks_of, enter_run, optimizers_of, unfreezes
from lightning_halos.transport.worker_processes import GroupedProcesses

_teachers: WeakKeyDictionary[nn.Module, Sequence[str]] = WeakKeyDictionary()
"""The teachers of modules that were trained in this process."""


class Start:
    """The state from which a fit starts. Making it compares the workers' modules, so all workers must do so together.

    Args:
        site: This process's place and connections.
        algorithm: The algorithm.
        trainer: The Trainer, at the start of training.
        resume: The state to resume from; ``None`` for a new run.
        saves: The record of saves.
        membership: The job's membership in a run of several jobs; ``None`` if this job is the complete run.

    Attributes:
        entry: What the global server told the job when it joined the run; ``None`` if this job is the complete run.
        vector: Converts between the module and its vector.
        memory: A vector with the module's present values; ``None`` if no models are exchanged.
        data: The training data, if the workers share it.

    Raises:
        CheckpointError: If the checkpoint belongs to another model.
        RuntimeError: If the modules of the workers have different numbers of elements.
    """

    def __init__(
        self,
        site: Site,
        algorithm: Algorithm,
        trainer: pl.Trainer,
        resume: Resume | None,
        saves: Saves,
        membership: Membership | None = None,
    ) -> None:
        self.site = site
        self.algorithm = without_momentum_for_lbfgs(algorithm, trainer)
        self.trainer = trainer
        self.resume = resume
        self.saves = saves
        self.membership = membership
        module, unfrozen_later = trainer.lightning_module, unfreezes(callbacks_of(trainer))
        idle = set() if unfrozen_later else idle_parameters(module, optimizers_of(trainer))
        self.vector = ModelVector(
            module,
            all_parameters=unfrozen_later,
            idle=idle,
            processes=_processes(site, trainer),
            teachers=self._known_teachers(),
        )
        if membership is None:
            _teachers[module] = self.vector.teachers
        _check(site, self.vector, resume)
        if resume is not None:
            read_slices(site, resume, self.vector.layout, self.vector.shapes)
        self.entry: Entry | None = None
        self.memory: Tensor | None = None
        if not algorithm.averages_gradients:
            self.memory = self.vector.read(self.vector.new())
        self.data: SharedData | None = None
        if algorithm.shares_data and site.placement.is_even:  # larger workers would use more samples per local step
            self.data = SharedData.find(trainer, self.workers, site.lane, len(site.worker_processes))
        if not can_share(site.collectives, None if self.data is None else self.data.dataset):
            self.data = None
        self._left = self._left_of_own_data()
        self.algorithm = self._with_length(self.algorithm)
        if membership is not None:
            assert isinstance(self.algorithm, ServerAlgorithm)
            assert self.memory is not None
            description = describe_run(trainer, self.algorithm, self.vector, self.data)
            self.entry = membership.join(description, self.vector, self.memory)
            max_steps = None if trainer.max_steps == -1 else trainer.max_steps
            enter_run(trainer, global_step(self.entry.total, self.workers, max_steps), self.entry.epoch)

    def _with_length(self, algorithm: Algorithm) -> Algorithm:
        """Returns the algorithm with the length of the run, by which its defaults go, and tells the user about both.

        A run that is resumed keeps the length that it began with: otherwise the servers' optimizers would change on the
        way. All processes have rank 0's, because the numbers of their batches may differ.
        """
        length = self.limit
        if self.membership is not None:  # what all jobs of the run know
            ends = [] if self.trainer.max_steps == -1 else [self.trainer.max_steps]
            if self.data is not None and self.data.end != math.inf:
                ends.append(int(self.data.end) // self.workers)
            length = min(ends, default=None)
        length = self.site.collectives.broadcast_object(length)
        began, reason = length, ""
        if not self.trainer.lightning_module.automatic_optimization and length != self.trainer.max_steps:
            reason = "with one step per batch, as Lightning counts them before a run under manual optimization"
        if self.resume is not None:
            began = self.resume.manifest.global_steps
            reason = "with which this run began" if began != length else ""
        elif began is None:
            began, reason = ASSUMED_STEPS, "the length of this run is unknown"
        algorithm = dataclasses.replace(algorithm, global_steps=None if began is None else max(1, began))
        groups, joins = self.site.topology.groups, self.membership is not None
        if text := run_length.summary(algorithm, groups, joins, reason):
            rank_zero_info(text)
        if not joins and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            for warning in run_length.shortcomings(algorithm, groups, length) if length else ():
                rank_zero_warn(warning)
        return algorithm

    def _left_of_own_data(self) -> float:
        """Returns the global steps that are left in data of the workers' own; infinite if that is unknown."""
        left = math.inf if self.data is not None or self.membership is not None else steps_left(self.trainer)
        own = left if self.site.lane == 0 else 0.0  # a worker counts once, whatever the number of its processes
        total = self.site.collectives.reduce(torch.tensor(own, dtype=torch.float64), "sum")
        return float(total) / self.workers

    def put_in(self, memory: Tensor) -> None:
        """Puts a vector's model into the module, as all processes of this worker must do together."""
        self.vector.write(memory)
        if not self.vector.lossless:
            self.vector.read(memory)

    def _known_teachers(self) -> Sequence[str] | None:
        """Returns the teachers that an earlier fit has found by their values, which have changed; ``None`` if none has.

        A job that joins a run finds none by their values, because it may come with a checkpoint's.
        """
        if self.membership is not None:
            return []
        return _teachers.get(self.trainer.lightning_module) if self.resume is None else self.resume.manifest.teachers

    @property
    def worker_state(self) -> Mapping[str, Any]:
        """This worker's state to resume from; empty for a new worker."""
        return {} if self.resume is None else self.resume.worker

    @property
    def workers(self) -> int:
        """Number of workers by which local steps are divided to count global steps."""
        return self.site.size if self.membership is None else self.membership.workers

    @property
    def plateau_steps(self) -> Sequence[tuple[int, float]]:
        """All steps of plateau schedulers in the run until now."""
        if self.entry is not None:
            return self.entry.plateau_steps
        return [] if self.resume is None else self.resume.manifest.plateau_steps

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics that were published last."""
        if self.entry is not None:
            return self.entry.metrics
        return {} if self.resume is None else self.resume.manifest.metrics

    @property
    def origin(self) -> int:
        """Global step at which the module's own schedules began, as far as no checkpoint has their state."""
        return self.budget.position if self.entry is None else 0

    @property
    def budget(self) -> StepBudget:
        """A new step budget."""
        trainer, size = self.trainer, self.workers
        max_steps = trainer.max_steps if trainer.max_steps != -1 else None
        total = trainer.global_step * size if self.entry is None else self.entry.total
        if self.resume is not None:
            # With another number of workers the global step is kept, because schedules follow it.
            was = self.resume.manifest
            total = was.total if was.workers == size else was.total // was.workers * size
        return StepBudget(size, max_steps, total)

    @property
    def goes_on_in_data(self) -> bool:
        """Whether the position in the training data is known from a checkpoint."""
        return self.data is not None and self.resume is not None and self.resume.manifest.data == self.data.identity

    @property
    def limit(self) -> int | None:
        """Global steps of the complete run by Lightning's estimate, ``None`` if unknown."""
        steps = self.trainer.estimated_stepping_batches
        return None if steps in (math.inf, -1) else int(steps)  # -1: some epochs of data without a length

    @property
    def extent_of_data(self) -> tuple[int, float]:
        """Global steps at which the data begins and ends, if every batch makes a step.

        It is the data that is left for this fit, or that of the complete run where only the steps of the run say how
        much of it was used. Without a known end it is infinite.
        """
        if self.data is None:
            return self.budget.position, self.budget.position + self._left
        total, used = self.budget.total, self.data.first
        if self.entry is not None:
            return 0, self.data.end / self.workers
        if self.goes_on_in_data:
            assert self.resume is not None
            world, done = self.resume.manifest.world, self.resume.manifest.done
            if world is not None:
                return 0, (self.data.end - world["offset"]) / self.workers
            used = Spans(done).steps
        return self.budget.position, (total + self.data.end - used) / self.workers

    def done(self) -> Spans:
        """Returns the data that was trained on before."""
        if self.data is None:
            return Spans()
        if self.resume is not None and self.goes_on_in_data:
            return Spans(self.resume.manifest.done)
        if self.resume is not None and self.resume.manifest.data is not None:
            rank_zero_warn(
                f"The checkpoint was saved with other training data ({self.resume.manifest.data}, now"
                f" {self.data.identity}), so it is unknown which samples of this epoch were used."
            )
        return Spans([(0, self.data.first)] if self.data.first else [])


def idle_parameters(module: nn.Module, optimizers: Sequence[Optimizer]) -> set[int]:
    """Returns the ``id`` of trainable parameters that no optimizer has; none if no optimizer is known."""
    optimized = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return {id(p) for p in module.parameters() if p.requires_grad and id(p) not in optimized} if optimizers else set()


def _processes(site: Site, trainer: pl.Trainer) -> WorkerProcesses | None:
    """Returns how this process talks with the others of its worker about the model; ``None`` if there are none."""
    if len(site.worker_processes) == 1:
        return None
    model = trainer.strategy.model
    if isinstance(model, DistributedDataParallel):  # it divides nothing, and another one may replace it
        model = model.module
    assert site.inner_group is not None
    assert model is not None
    return GroupedProcesses(site.inner_group, site.lanes, model)


def _check(site: Site, vector: ModelVector, resume: Resume | None) -> None:
    """Refuses a checkpoint of another model, and workers with modules of different sizes."""
    if resume is not None and resume.manifest.model != vector.identity:
        raise CheckpointError(
            f"The checkpoint belongs to another model: its vector has {resume.manifest.model}, but this model's has"
            f" {vector.identity}. Train the same module with the same parameters frozen, or remove the folder of its"
            " shards to resume from its .ckpt file alone."
        )
    elements = site.collectives.gather_texts(str(vector.layout.elements))
    if others := [process for process, count in enumerate(elements) if count != elements[site.process]]:
        raise RuntimeError(
            f"The vector of the module of {site.here} has {vector.layout.elements} elements, that of"
            f" {site.describe(others[0])} has {elements[others[0]]}. All workers must train the same module"
            " with the same parameters frozen."
        )
