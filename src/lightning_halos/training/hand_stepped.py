"""Keeps the schedulers that a module steps itself at the global step of the run.

A fast worker would come to the end of such a schedule before the run, and a slow worker would not reach it. So a step
in a batch is left out where this worker is ahead of the run, and repeated after a pull where it is behind. Schedulers
that Lightning steps are in ``schedulers``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_halos.training.step_counter import StepCounter
from lightning_halos.training.trainer_adapter import in_attributes


@dataclass
class _Scheduler:
    """A scheduler that the module steps.

    Attributes:
        scheduler: The scheduler.
        kind: Its class, which is replaced during the fit.
        first: Its steps that do not follow the global step: those before the fit, and those between batches.
        calls: How often the module stepped it in batches of this fit.
        last_call: The batch in which it did so last.
        is_placed: Whether the module has stepped it with an argument, which says where it is in its schedule.
        since: The global step, and the worker's steps, from which on it was there.
    """

    scheduler: LRScheduler
    kind: type[LRScheduler]
    first: int
    since: tuple[float, int]
    calls: int = 0
    last_call: int = -1
    is_placed: bool = False


class HandStepped:
    """The schedulers that a module steps itself: those of manual optimization, and those in its attributes.

    A schedule follows the steps of the run as the module makes it follow the worker's own: if it steps a scheduler once
    per two optimizer steps, the scheduler makes a step per two global steps. Steps between batches, or only in the last
    batch of an epoch, are left as they are, because the workers have the same epochs. So is a scheduler whose position
    the module says, with ``step(position)``. A schedule that the module begins during the fit, as for another phase of
    the training, begins at the global step of that moment.

    Args:
        trainer: The Trainer, at the start of training.
        counter: Counts the worker's steps.
        position: Global step at which the run starts.
    """

    def __init__(self, trainer: pl.Trainer, counter: StepCounter, position: int) -> None:
        self._trainer = trainer
        self._counter = counter
        self._earlier_steps = 0
        self._progress = float(position)
        self._first_of_epoch = 0  # the batch in which the epoch began
        self._in_batch = self._is_stepping = False
        self._schedulers: list[_Scheduler] = []
        self._seen: set[int] | None = None
        self._look()

    def begin_batch(self, progress: float) -> None:
        """Starts a batch after which the global step will be about ``progress``."""
        self._look()
        self._in_batch = True
        self._progress = progress

    def end_epoch(self) -> None:
        """Marks that steps from here to the next batch follow the worker's epochs."""
        self._in_batch = False
        self._first_of_epoch = self._counter.batches
        self._seen = None

    def pull(self, position: int) -> None:
        """Repeats the worker's steps up to a new global step."""
        self._look()
        for entry in self._schedulers:
            steps = self._steps_of(entry)
            if steps and entry.calls and not entry.is_placed:
                target = self._target(entry, entry.calls / steps, position)
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before")
                    while entry.scheduler.last_epoch < target:
                        self._step(entry)

    def state_dict(self) -> dict[str, Any]:
        """Returns what :meth:`load_state_dict` needs to go on with the same schedules."""
        counts = [(entry.first, entry.calls, entry.is_placed, entry.since) for entry in self._schedulers]
        return {"steps": self._steps, "counts": counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state of :meth:`state_dict`."""
        self._earlier_steps = state["steps"]
        for entry in self._schedulers:
            entry.since = (self._progress, state["steps"])  # unless it was there before
        for entry, counts in zip(self._schedulers, state["counts"], strict=False):
            entry.first, entry.calls, entry.is_placed, *since = counts
            entry.since = since[0] if since else (state["start"], 0)  # version 0.1 followed none that begins later

    def release(self) -> None:
        """Gives the schedulers their classes back."""
        for entry in self._schedulers:
            entry.scheduler.__class__ = entry.kind

    @property
    def _steps(self) -> int:
        """The worker's steps in the run."""
        return self._earlier_steps + self._counter.steps

    def _steps_of(self, entry: _Scheduler) -> int:
        """Returns the worker's steps to which the calls of a scheduler belong."""
        return self._steps - entry.since[1]

    def _look(self) -> None:
        """Follows the module's present schedulers.

        Those of submodules, and in lists and the like, are looked for when an epoch begins.
        """
        trainer = self._trainer
        seen = {id(config.scheduler) for config in trainer.lr_scheduler_configs}
        seen |= {id(item) for item in vars(trainer.lightning_module).values() if isinstance(item, LRScheduler)}
        if seen == self._seen:
            return
        self._seen = seen
        known = {id(entry.scheduler): entry for entry in self._schedulers}
        found = list(_find(trainer))
        for scheduler in found:
            if id(scheduler) not in known:
                entry = _Scheduler(scheduler, type(scheduler), scheduler.last_epoch, (self._progress, self._steps))
                self._intercept(entry)
                self._schedulers.append(entry)
        present = {id(scheduler) for scheduler in found}
        for entry in [entry for entry in self._schedulers if id(entry.scheduler) not in present]:
            entry.scheduler.__class__ = entry.kind
            self._schedulers.remove(entry)

    def _intercept(self, entry: _Scheduler) -> None:
        """Replaces the class of a scheduler, because its state has all its attributes, as a new ``step`` would be."""

        def step(scheduler: LRScheduler, *args: Any, **kwargs: Any) -> None:
            if not self._is_stepping:
                entry.is_placed |= any(argument is not None for argument in (*args, *kwargs.values()))
            if self._is_stepping or entry.is_placed or self._may_step(entry):
                self._step(entry, *args, **kwargs)

        entry.scheduler.__class__ = type(entry.kind.__name__, (entry.kind,), {"step": step})

    def _step(self, entry: _Scheduler, *args: Any, **kwargs: Any) -> None:
        """Steps a scheduler. One that it consists of, as in ``SequentialLR``, is not asked about."""
        is_outer, self._is_stepping = not self._is_stepping, True
        try:
            entry.kind.step(entry.scheduler, *args, **kwargs)
        finally:
            self._is_stepping = not is_outer

    def _may_step(self, entry: _Scheduler) -> bool:
        batch = self._counter.batches
        ends_epoch = self._trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        is_only_at_end = ends_epoch and entry.last_call < min(self._first_of_epoch, batch - 1)
        if not self._in_batch or is_only_at_end:
            entry.first += 1
            return True
        entry.calls += 1
        entry.last_call = batch
        steps = self._steps_of(entry)
        if not steps:  # in the first batch the rate is not known
            return True
        rate = entry.calls / (steps + self._counter.in_batch)
        return entry.scheduler.last_epoch + 1 <= self._target(entry, rate, self._progress)

    def _target(self, entry: _Scheduler, rate: float, progress: float) -> int:
        """Returns the steps, at a global step, of a scheduler that makes ``rate`` of them per global step."""
        target = entry.first + int(rate * (progress - entry.since[0]) + 1e-6)
        return min(target, getattr(entry.scheduler, "total_steps", target))  # the end of a OneCycleLR


def _find(trainer: pl.Trainer) -> Iterator[LRScheduler]:
    """Yields the schedulers that Lightning does not step: of manual optimization, and in the module's attributes.

    Parts of other schedulers, as in ``SequentialLR``, are left to these.
    """
    module = trainer.lightning_module
    configured: list[Any] = [config.scheduler for config in trainer.lr_scheduler_configs]
    found = [*configured, *(scheduler for owner in module.modules() for scheduler in _schedulers_in(owner))]
    others = {id(part) for part in _parts(found)}
    if module.automatic_optimization:
        others |= {id(scheduler) for scheduler in configured}
    for scheduler in _distinct(found):
        if id(scheduler) not in others and not isinstance(scheduler, ReduceLROnPlateau):
            yield scheduler


def _schedulers_in(owner: object) -> Iterator[LRScheduler]:
    return (item for item in in_attributes(owner) if isinstance(item, LRScheduler))


def _parts(schedulers: Iterable[LRScheduler]) -> list[LRScheduler]:
    """Returns the schedulers that others consist of, at every depth."""
    parts = _distinct(part for scheduler in schedulers for part in _schedulers_in(scheduler))
    known = {id(part) for part in parts}
    for outer in parts:
        for part in _schedulers_in(outer):
            if id(part) not in known:
                known.add(id(part))
                parts.append(part)
    return parts


def _distinct(items: Iterable[LRScheduler]) -> list[LRScheduler]:
    return list({id(item): item for item in items}.values())
