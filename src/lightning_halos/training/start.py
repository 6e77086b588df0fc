"""What a fit starts from, and what is ordered: the arithmetic of resuming. It starts nothing itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_halos.checkpoint.errors import CheckpointError
from lightning_halos.checkpoint.resume import Resume
from lightning_halos.checkpoint.saves import Saves
from lightning_halos.core.algorithms import Algorithm
from lightning_halos.core.cursor import Spans
from lightning_halos.core.schedule import StepBudget
from lightning_halos.core.vector import ModelVector
from lightning_halos.training.shared_data import SharedData
from lightning_halos.training.site import Site
from lightning_halos.training.trainer_adapter import callbacks_of, unfreezes


@dataclass(frozen=True)
class Start:
    """What a fit starts from.

    Attributes:
        site: This process among the others.
        algorithm: The algorithm.
        trainer: The Trainer, at the start of training.
        vector: What travels of the module.
        memory: A vector's memory with the module's present values; ``None`` if no models are exchanged.
        data: The training data, if the workers share it.
        resume: What to go on from; ``None`` if the run is new.
        saves: The saves under way.
    """

    site: Site
    algorithm: Algorithm
    trainer: pl.Trainer
    vector: ModelVector
    memory: Tensor | None
    data: SharedData | None
    resume: Resume | None
    saves: Saves

    @property
    def worker_state(self) -> Mapping[str, Any]:
        """State of this worker to go on from; empty if it is new."""
        return {} if self.resume is None else self.resume.worker

    @property
    def budget(self) -> StepBudget:
        """The step budget, in a new object."""
        trainer, size = self.trainer, self.site.size
        max_steps = trainer.max_steps if trainer.max_steps != -1 else None
        total = trainer.global_step * size
        if self.resume is not None:
            # With other workers the global step stays, since schedules follow it.
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
        return None if steps == float("inf") else int(steps)

    @property
    def end(self) -> float:
        """Global steps at which the run ends by itself; infinite if only somebody can end it."""
        ends = [math.inf if self.trainer.max_steps == -1 else float(self.trainer.max_steps)]
        if self.data is not None:
            total, used = self.budget.total, self.data.first
            if self.goes_on_in_data:
                assert self.resume is not None
                world, done = self.resume.manifest.world, self.resume.manifest.done
                used = sum(stop - start for start, stop in done) if world is None else total + world["offset"]
            ends.append((total + self.data.end - used) / self.site.size)
        return min(ends)

    def done(self) -> Spans:
        """Returns the data that was trained on before."""
        if self.data is None:
            return Spans()
        if self.resume is not None and self.goes_on_in_data:
            return Spans(self.resume.manifest.done)
        if self.resume is not None and self.resume.manifest.data is not None:
            rank_zero_warn(
                f"The checkpoint was saved with other training data ({self.resume.manifest.data}, now"
                f" {self.data.identity}): which samples of this epoch were used is not known."
            )
        return Spans([(0, self.data.first)] if self.data.first else [])

    @classmethod
    def find(cls, site: Site, algorithm: Algorithm, trainer: pl.Trainer, resume: Resume | None, saves: Saves) -> Start:
        """Finds out what a fit starts from. To be called by all workers together.

        Args:
            site: This process among the others.
            algorithm: The algorithm.
            trainer: The Trainer, at the start of training.
            resume: What to go on from; ``None`` if the run is new.
            saves: The saves under way.

        Raises:
            CheckpointError: If the checkpoint is of another model.
            RuntimeError: If another worker's module has another number of elements.
        """
        vector = ModelVector(trainer.lightning_module, all_parameters=unfreezes(callbacks_of(trainer)))
        _check(site, vector, resume)
        memory = None if algorithm.averages_gradients else vector.read(vector.new())
        data = SharedData.find(trainer) if algorithm.shares_data else None
        return cls(site, algorithm, trainer, vector, memory, data, resume, saves)


def _check(site: Site, vector: ModelVector, resume: Resume | None) -> None:
    """Refuses a checkpoint of another model, and workers whose modules differ in size."""
    if resume is not None and resume.manifest.model != vector.identity:
        raise CheckpointError(
            f"The checkpoint is of another model: {resume.manifest.model} travelled of it, and of this one"
            f" {vector.identity}. Train the same module with the same parameters frozen, or remove the folder of"
            " its shards to go on from its .ckpt file alone."
        )
    elements = site.collectives.gather_texts(str(vector.num_elements))
    if others := [rank for rank, count in enumerate(elements) if count != elements[site.rank]]:
        raise RuntimeError(
            f"The module of {site.here} has {vector.num_elements} elements that travel, that of"
            f" {site.topology.describe(others[0])} has {elements[others[0]]}. All workers must train the same module"
            " with the same parameters frozen."
        )
