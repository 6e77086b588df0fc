"""One dataset for all workers: each trains on leased ranges instead of a fixed shard.

During a fit, a sampler replaces the ``DistributedSampler`` that Lightning put into a user's ``DataLoader``, but no
other sampler. The source of the leases is an argument, so that a test can give any.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Sampler

from lightning_halos.core.cursor import Lease, Spans
from lightning_halos.training.compat import (
    begin_epoch_of_data,
    close_epochs,
    epochs_of_training,
    open_epochs,
    training_loader,
)


class LightningRank(int):
    """The rank that Lightning passes to the samplers it makes, which distinguishes them from users' own samplers."""


class Leases:
    """A worker's leases, in order, grouped by epoch.

    Attributes:
        dropped: Leases that were dropped; the owner clears it.
    """

    def __init__(self, leases: Iterator[Lease]) -> None:
        self.dropped: list[Lease] = []
        self._leases = leases
        self._next: Lease | None = None
        self._complete: int | None = None  # the last epoch whose leases came to an end
        self._epoch: int | None = None
        self._given: deque[Lease] = deque()

    def of_epoch(self, epoch: int) -> Iterator[Lease]:
        """Yields the remaining leases of an epoch. The rest of an epoch that the Trainer has left early is dropped.

        Leases of an earlier epoch that come later are not dropped: they are of a region that has left the run. In the
        first epoch of a fit no lease is dropped, because rounds that were in flight when a checkpoint was saved at the
        end of an epoch are run again in the next one.
        """
        if self._complete is None:
            self._complete = epoch - 1
        if epoch != self._epoch:
            self._epoch = epoch
            self.dropped += self._given
            self._given.clear()
        while True:
            self._next = self._next or next(self._leases, None)
            if self._next is None or self._next.epoch > epoch:
                self._complete = epoch
                return
            lease, self._next = self._next, None
            if lease.epoch == epoch or lease.epoch <= self._complete:
                self._given.append(lease)
                yield lease
            elif self.dropped and self.dropped[-1] is lease:
                raise RuntimeError(
                    "A simulation plans what data each worker trains on, so no hook may leave an epoch early:"
                    " on_train_batch_start must not return -1 with simulate=... Train in real processes instead."
                )
            else:
                self.dropped.append(lease)

    def use(self) -> Lease:
        """Records that the data of the next local step was trained on, and returns it."""
        lease, rest = self._given.popleft().divide(1)
        self._given.extendleft(rest)
        return lease


@dataclass(frozen=True)
class Share:
    """One process's share of the batches of a worker of several processes.

    Attributes:
        lane: Number of the process inside its worker.
        processes: Processes of the worker.
        batch_size: Samples in a batch of one process.
    """

    lane: int
    processes: int
    batch_size: int

    def of(self, indices: Sequence[int]) -> Iterator[int]:
        """Yields every ``processes``-th sample of each of the worker's batches.

        All processes get equally many, because they are in step: as in torch's ``DistributedSampler``, the last batch
        of an epoch is filled up with samples of its own.
        """
        size = self.processes * self.batch_size
        for start in range(0, len(indices), size):
            batch = indices[start : start + size]
            filled = math.ceil(len(batch) / self.processes) * self.processes
            yield from (batch[number % len(batch)] for number in range(self.lane, filled, self.processes))


class SharedSampler(Sampler[int]):
    """Yields the indices of the samples in a worker's leases, epoch after epoch, to the iterator that trains.

    Its length is that of the replaced sampler, although a worker may get more or less data. To all other iterators, as
    of a hook that looks at the training data, it yields what the replaced sampler does.

    Args:
        sampler: The replaced sampler, which determines the shuffling.
        leases: The worker's leases.
        step_samples: Samples per local step.
        samples: Samples of an epoch that are used, which may be fewer than the dataset has.
        share: Which samples of the worker's batches are this process's.
    """

    def __init__(
        self,
        sampler: DistributedSampler[Any],
        leases: Leases,
        step_samples: int,
        samples: int,
        share: Share | None = None,
    ) -> None:
        self._sampler = sampler
        self._leases = leases
        self._step_samples = step_samples
        self._samples = samples
        self._share = share
        self._epoch = 0
        self._trains_next = False
        self._order: tuple[int, Tensor] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch, as in torch's ``DistributedSampler``."""
        self._epoch = epoch
        self._sampler.set_epoch(epoch)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Lets the iterator train that is made in this context."""
        self._trains_next = True
        try:
            yield
        finally:
            self._trains_next = False

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[int]:
        trains, self._trains_next = self._trains_next, False
        return self._leased() if trains else iter(self._sampler)

    def _leased(self) -> Iterator[int]:
        for lease in self._leases.of_epoch(self._epoch):
            first = lease.first * self._step_samples
            last = min(first + lease.steps * self._step_samples, self._samples)
            indices = self._shuffled(lease.epoch)[first:last].tolist() if self._sampler.shuffle else range(first, last)
            yield from indices if self._share is None else self._share.of(indices)

    def _shuffled(self, epoch: int) -> Tensor:
        """Returns the order of an epoch, as a tensor, because a list of numbers would need four times the memory."""
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._sampler.seed + epoch)
            length = len(self._sampler.dataset)  # type: ignore[arg-type]
            self._order = epoch, torch.randperm(length, generator=generator)
        return self._order[1]


class SharedData:
    """The training data of a fit whose workers share it; see :meth:`find`.

    Attributes:
        steps_per_epoch: Data of an epoch, in local steps.
        first: End of the data that earlier fits have used, in local steps from the start of the first epoch. If it does
            not fit into the present epoch, because earlier fits had other data, batches or workers, the present epoch
            starts from its beginning.
        end: Data of all ordered epochs, in local steps; infinite without a number of epochs.
        epochs: The ordered number of epochs, ``None`` without one.
        batches: Batches per epoch of a worker's fixed shard.
        dataset: The dataset at the start of the fit.
        may_change: Whether the data may be other data in a later epoch.
        is_left: Whether the workers no longer share it, but each has its own, because it is no longer like the first.
        identity: Properties that a later fit must share, so that a range of the data means the same samples.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        combined: CombinedLoader,
        loader: DataLoader[Any],
        workers: int,
        lane: int,
        processes: int,
    ) -> None:
        self._trainer = trainer
        batch_sampler: Any = loader.batch_sampler
        self._share = None if processes == 1 else Share(lane, processes, batch_sampler.batch_size)
        size, accumulate = batch_sampler.batch_size * processes, trainer.accumulate_grad_batches
        samples = len(loader.dataset)  # type: ignore[arg-type]
        self.batches = int(trainer.fit_loop.max_batches)
        batches = samples // size if batch_sampler.drop_last else math.ceil(samples / size)
        if batch_sampler.drop_last or self.batches < len(loader):  # the latter with limit_train_batches
            batches = min(batches, self.batches * workers)  # as many as under DDP, which the module may rely on
        self.steps_per_epoch = math.ceil(batches / accumulate)
        begin = trainer.current_epoch * self.steps_per_epoch
        # Under manual optimization, a batch may have any number of steps, so the epoch starts from its beginning.
        is_known = trainer.lightning_module.automatic_optimization
        used = trainer.global_step * workers - begin if is_known else 0
        self.first = begin + (used if 0 <= used <= self.steps_per_epoch else 0)
        self.epochs = epochs_of_training(trainer)
        self.end = math.inf if self.epochs is None else self.epochs * self.steps_per_epoch
        self.dataset = loader.dataset
        sampler: Any = loader.sampler
        self.identity: dict[str, int | None] = {
            "steps_per_epoch": self.steps_per_epoch,
            "step_samples": size * accumulate,
            "samples": samples,
            "seed": sampler.seed if sampler.shuffle else None,
        }
        self.may_change = trainer.reload_dataloaders_every_n_epochs > 0  # type: ignore[attr-defined]
        self.is_left = False
        self._accumulate = accumulate
        self._step_samples = size * accumulate
        self._epoch_samples = min(samples, batches * size)
        self._form = _form(loader)
        self._batches_of_step = 0
        self._used = Spans()
        self._leases = Leases(iter(()))  # none before the start, for a job that comes when the run is over
        self._limits = combined.limits
        self._replaced: list[tuple[Any, DistributedSampler[Any]]] = []

    @classmethod
    def find(cls, trainer: pl.Trainer, workers: int, lane: int = 0, processes: int = 1) -> SharedData | None:
        """Returns the training data if the workers of the run can share it, else ``None``.

        They can share a single loader with a sampler that Lightning made, but no ``IterableDataset`` and no sampler of
        the user's own.

        Args:
            trainer: The Trainer, at the start of training.
            workers: Number of workers of the run.
            lane: Number of this process inside its worker.
            processes: Processes of each worker, which share its batches.
        """
        combined = training_loader(trainer)
        loaders = [] if combined is None else combined.flattened
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        changes_steps = any(isinstance(c, GradientAccumulationScheduler) for c in callbacks)
        overfits: float = trainer.overfit_batches  # type: ignore[attr-defined]
        if combined is None or len(loaders) != 1 or overfits or changes_steps or not _is_shareable(loaders[0]):
            return None
        return cls(trainer, combined, loaders[0], workers, lane, processes)

    def start(self, leases: Iterator[Lease]) -> None:
        """Makes the Trainer train on a worker's leases. Call it before the first epoch starts."""
        self._leases = Leases(leases)
        self.attach()
        fit_loop = self._trainer.fit_loop
        if fit_loop.epoch_loop.restarting and fit_loop.epoch_loop.batch_progress.is_last_batch:
            # The checkpoint is from the last batch of an epoch, so a new epoch starts.
            fit_loop.epoch_loop.restarting = False
        # Lightning believes that a resumed epoch begins with its first batch, unless the data loader has a state.
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
        # Lightning makes a new iterator itself when an epoch starts. `is_resuming` is in Lightning 2.5.3 and later.
        restarts = getattr(fit_loop, "is_resuming", False) or fit_loop.epoch_loop.restarting
        if self._trainer.current_epoch == 0 or restarts:
            begin_epoch_of_data(self._trainer)

    def count_batch(self, ends_epoch: bool) -> None:
        """Counts a batch that was trained on, which may be the last one of the worker's epoch."""
        if self.is_left:
            return
        self._batches_of_step += 1
        if self._batches_of_step == self._accumulate or ends_epoch:
            self._batches_of_step = 0
            self._used.add([self._leases.use().span(self.steps_per_epoch)])

    @property
    def used_steps(self) -> int:
        """Data that was trained on since :meth:`take_used`, in local steps."""
        return self._used.steps

    def take_used(self) -> list[tuple[int, int]]:
        """Returns the ranges of data that were trained on since the last call, or that nobody will train on."""
        used, self._used = self._used, Spans()
        dropped, self._leases.dropped = self._leases.dropped, []
        used.add(lease.span(self.steps_per_epoch) for lease in dropped)
        return list(used)

    def attach(self) -> None:
        """Makes a loader that Lightning has reloaded use the leases. Call it when an epoch starts.

        If it is not like the first one, the leases mean nothing in it: if its dataset has another length, its batches
        have another size, or workers cannot share it. Then each worker trains on what is its own from here on, as under
        DDP.
        """
        self._batches_of_step = 0  # Lightning begins one with each epoch, also if a hook has left the one before
        if self.is_left:
            return
        combined = training_loader(self._trainer)
        assert combined is not None
        loader, is_alone = combined.flattened[0], len(combined.flattened) == 1
        if is_alone and isinstance(getattr(getattr(loader, "batch_sampler", None), "sampler", None), SharedSampler):
            return
        if not is_alone or not _is_shareable(loader) or _form(loader) != self._form:
            self.detach()
            self.is_left = True
            return
        sampler = loader.batch_sampler.sampler
        shared = SharedSampler(sampler, self._leases, self._step_samples, self._epoch_samples, self._share)
        shared.set_epoch(self._trainer.current_epoch)
        self._replaced.append((loader.batch_sampler, sampler))
        loader.batch_sampler.sampler = shared
        combined.limits = None
        open_epochs(self._trainer, shared.training)

    def detach(self) -> None:
        """Restores the loaders and the Trainer's limits."""
        for batch_sampler, sampler in self._replaced:
            batch_sampler.sampler = sampler
        if self._replaced:
            close_epochs(self._trainer)
            combined = training_loader(self._trainer)
            if combined is not None and combined.limits is None:
                combined.limits = self._limits
        self._replaced.clear()


def _form(loader: DataLoader[Any]) -> tuple[int, int, bool]:
    """Returns the properties of a loader on which the meaning of a lease depends."""
    batches: Any = loader.batch_sampler
    return len(loader.dataset), batches.batch_size, batches.drop_last  # type: ignore[arg-type]


def _is_shareable(loader: Any) -> bool:
    return (
        isinstance(loader, DataLoader)
        and type(loader.batch_sampler) is BatchSampler
        and type(loader.sampler) is DistributedSampler
        and isinstance(loader.sampler.rank, LightningRank)
        and len(loader) > 0
    )
