"""Makes learning-rate schedulers follow the global step instead of a worker's own count of steps.

Schedulers are moved between rounds, and never go beyond the end of the run. Those that the user steps, under manual
optimization, are in ``hand_stepped``.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import LRSchedulerConfig
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

_NEVER = sys.maxsize  # a frequency with which Lightning never steps a scheduler


@dataclass
class _Scheduler:
    """A scheduler during a fit.

    Attributes:
        config: Lightning's configuration of it. Its frequency is changed during the fit.
        frequency: The user's frequency.
        period: Global steps between two of its steps; ``None`` if it follows no global step: plateau schedulers, and
            those that follow the worker's epochs.
        count: Its steps at the last pull.
        state: Its state at the last pull.
    """

    config: LRSchedulerConfig
    frequency: int
    period: int | None
    count: int
    state: dict[str, Any]

    @property
    def steps(self) -> int:
        """Its steps so far."""
        return int(getattr(self.config.scheduler, "last_epoch", 0))


class SchedulePosition:
    """Keeps a worker's schedulers at the global step.

    At a pull the schedulers are reset to their state at the previous pull, and then stepped to the new global step.
    Inside a round Lightning steps those with ``interval="step"`` as usual, but not beyond ``limit``, where
    ``OneCycleLR`` would raise an error.

    The worker that decides (rank 0, in a region job while its job decides) steps a ``ReduceLROnPlateau``; the other
    workers repeat its steps with the same values.

    What a hook sets between two batches, as ``BackboneFinetuning`` does with a learning rate, stays after a pull.
    Schedulers that a hook sets up anew with ``strategy.setup_optimizers`` begin at the global step of that moment.

    Args:
        trainer: The Trainer, with Lightning's scheduler configurations and their optimizers. Its module's hook
            ``lr_scheduler_step`` does every step.
        position: Global step at which the run starts.
        limit: Global steps of the complete run, ``None`` for no limit.
        decides: Whether this worker steps the plateau schedulers.
        epoch_steps: Global steps per epoch, which schedulers with ``interval="epoch"`` follow. ``None`` if they follow
            the worker's own epochs, because every worker trains for the same number of epochs.
        epochs: Epochs of the run that were over before this worker took part.

    Attributes:
        history: All steps of the deciding worker's plateau schedulers that this worker knows: pairs of the scheduler's
            index and the monitored value.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        position: int,
        limit: int | None,
        decides: bool,
        epoch_steps: int | None = None,
        epochs: int = 0,
    ) -> None:
        self._trainer = trainer
        self._module = trainer.lightning_module
        self._limit = limit
        self._decides = decides
        self._epoch_steps = epoch_steps
        # Own steps that will come with a pull, too; `None` if it does not change who decides.
        self._echoes: list[tuple[int, float]] | None = None
        # What the schedulers change in the optimizers' groups, as far as it was seen; the rest belongs to the user.
        self._changed_by_schedulers = {"lr"}
        self._groups: list[list[dict[str, Any]]] = []
        self._after_batch: tuple[list[int], list[list[dict[str, Any]]]] | None = None
        self._adopt()
        self._plateaus: list[tuple[int, float]] = []
        self.history: list[tuple[int, float]] = []
        # Schedulers in a checkpoint from inside a round are ahead of its global step. They wait until it catches up.
        self._position = max([position, *(s.steps * s.period for s in self._schedulers if s.period)])
        for scheduler in self._schedulers:
            if epochs and scheduler.config.interval == "epoch" and not scheduler.config.reduce_on_plateau:
                self._step(scheduler, 0 if scheduler.period else epochs // scheduler.frequency)
        self._save()

    def before_batch(self, batches: int) -> None:
        """Keeps Lightning from stepping schedulers beyond the limit, given the batches with a step in this round."""
        self._follow_hooks()
        at_end = self._limit is not None and self._position + batches >= self._limit
        for scheduler in self._schedulers:
            if scheduler.period and scheduler.config.interval == "step":
                scheduler.config.frequency = _NEVER if at_end else scheduler.frequency

    def end_batch(self) -> None:
        """Remembers what the schedulers have set, so that a change by a hook before the next batch can be seen."""
        if self._follows:  # values on a device are not compared, because the host would wait for it
            groups = [
                [{name: value for name, value in group.items() if not _is_on_device(value)} for group in groups]
                for groups in self._scheduled()
            ]
            self._after_batch = [scheduler.steps for scheduler in self._schedulers], groups

    def set_deciding(self, decides: bool) -> None:
        """Lets this worker step the plateau schedulers, or no longer, in a run in which that may change."""
        self._decides = decides
        self._echoes = self._echoes or []
        for scheduler in self._schedulers:
            if scheduler.config.reduce_on_plateau:
                scheduler.config.frequency = scheduler.frequency if decides else _NEVER

    def hold_plateaus(self, is_due: Callable[[int], bool], batch: int) -> None:
        """Lets Lightning step plateau schedulers with ``interval="step"`` after this batch only if they are due.

        Args:
            is_due: Whether a scheduler with this frequency has to step after this batch.
            batch: Number of this batch in its epoch, from 1.
        """
        for scheduler in self._schedulers:
            if scheduler.config.reduce_on_plateau and scheduler.config.interval == "step":
                scheduler.config.frequency = batch if is_due(scheduler.frequency) else _NEVER

    def plateaus(self) -> list[tuple[int, float]]:
        """Returns the steps of this worker's plateau schedulers since the last call: indices and monitored values."""
        stepped: list[tuple[int, float]] = []
        for index, scheduler in enumerate(self._schedulers if self._decides else []):
            if scheduler.config.reduce_on_plateau and scheduler.steps > scheduler.count:
                scheduler.count = scheduler.steps
                assert scheduler.config.monitor is not None
                stepped.append((index, float(self._module.trainer.callback_metrics[scheduler.config.monitor])))
        self._plateaus += stepped
        self.history += stepped
        if self._echoes is not None:
            self._echoes += stepped
        return stepped

    def pull(self, position: int, plateaus: Sequence[tuple[int, float]]) -> None:
        """Moves the schedulers to a new global step.

        Args:
            position: The global step.
            plateaus: Steps of the deciding worker's plateau schedulers since the last pull. That worker ignores them.
                Those of a scheduler that this worker does not have, as from a job with another script, are left out.
        """
        self._follow_hooks()
        if self._limit is not None:
            position = min(position, self._limit)
        own, self._plateaus = self._plateaus, []
        others = self._of_others(plateaus)
        self.history += others
        if self._follows:
            self._restore()
        for index, value in [*(own if self._follows else []), *others]:
            if index < len(self._schedulers) and self._schedulers[index].config.reduce_on_plateau:
                self._step(self._schedulers[index], 1, value)
            else:
                rank_zero_warn(
                    f"Another job has a plateau scheduler with index {index}, and this one has not. Its steps are left"
                    " out. Start all jobs with the same script."
                )
        for scheduler in self._schedulers:
            if scheduler.period:
                self._step(scheduler, position // scheduler.period - self._position // scheduler.period)
        self._position = max(position, self._position)
        self._save()
        self.end_batch()

    def _of_others(self, plateaus: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
        """Returns those steps that another worker has made."""
        if self._echoes is None:
            return [] if self._decides else list(plateaus)
        others = []
        for index, value in plateaus:
            if (index, value) in self._echoes:
                self._echoes.remove((index, value))
            else:
                others.append((index, value))
        return others

    def catch_up(self, history: Sequence[tuple[int, float]]) -> None:
        """Repeats the plateau steps that rank 0 made after this worker's last pull, given rank 0's :attr:`history`."""
        self.pull(self._position, history[len(self.history) :])

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of the schedulers' state at the last pull, and of their changes since."""
        return copy.deepcopy(
            {
                "position": self._position,
                "counts": [scheduler.count for scheduler in self._schedulers],
                "states": [scheduler.state for scheduler in self._schedulers],
                "groups": self._groups,
                "plateaus": self._plateaus,
                "history": self.history,
            }
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state of :meth:`state_dict`. Lightning restores the schedulers themselves."""
        state = copy.deepcopy(dict(state))
        if len(state["counts"]) != len(self._schedulers) or len(state["groups"]) not in (0, len(self._optimizers)):
            rank_zero_warn(
                f"The checkpoint has the positions of {len(state['counts'])} learning-rate scheduler(s), but the module"
                f" now makes {len(self._schedulers)}, or another number of optimizers. They go on from where Lightning"
                " has restored them."
            )
            return
        self._position = state["position"]
        for scheduler, count in zip(self._schedulers, state["counts"], strict=True):
            scheduler.count = count
        if self._follows and state["groups"]:  # without them, no scheduler followed the global step before
            self._groups = state["groups"]
            for scheduler, own in zip(self._schedulers, state["states"], strict=True):
                scheduler.state = own
            self._changed_by_schedulers.update(*(group.keys() for groups in self._groups for group in groups))
        self._plateaus = [(index, value) for index, value in state["plateaus"]]
        self.history = [(index, value) for index, value in state["history"]]

    def release(self) -> None:
        """Restores the schedulers' frequencies."""
        for scheduler in self._schedulers:
            scheduler.config.frequency = scheduler.frequency

    def _adopt(self) -> None:
        """Follows the schedulers that the Trainer has now."""
        self._configs, self._optimizers = self._trainer.lr_scheduler_configs, self._trainer.optimizers
        self._schedulers: list[_Scheduler] = []
        for config in self._configs if self._module.automatic_optimization else []:
            unit = None if config.reduce_on_plateau else 1 if config.interval == "step" else self._epoch_steps
            period = None if unit is None else unit * config.frequency
            self._schedulers.append(_Scheduler(config, config.frequency, period, 0, {}))
            if (config.reduce_on_plateau and not self._decides) or (period and config.interval == "epoch"):
                config.frequency = _NEVER
        self._follows = any(scheduler.period for scheduler in self._schedulers)

    def _follow_hooks(self) -> None:
        """Follows what hooks have changed since the last batch: schedulers, and what these have set."""
        after, self._after_batch = self._after_batch, None
        if self._configs is not self._trainer.lr_scheduler_configs:
            self.release()
            self._adopt()
            self._plateaus = []
            present = self._trainer.global_step
            self._position = max(self._position, present if self._limit is None else min(present, self._limit))
            self._save()
            return
        self._leave_replaced()
        if after is None or after[0] != [scheduler.steps for scheduler in self._schedulers]:
            return  # a scheduler that follows this worker's epochs may have made the changes
        for kept, before, now in zip(self._groups, after[1], self._scheduled(), strict=True):
            for saved, was, group in zip(kept, before, now, strict=False):
                saved |= {name: group[name] for name in was.keys() & group.keys() if _differ(was[name], group[name])}

    def _leave_replaced(self) -> None:
        """Leaves alone what a callback has replaced by a scheduler of its own, as StochasticWeightAveraging does."""
        for scheduler in self._schedulers:
            if not any(config is scheduler.config for config in self._configs):
                scheduler.period = None
        self._follows = any(scheduler.period for scheduler in self._schedulers)

    def _step(self, scheduler: _Scheduler, times: int, value: float | None = None) -> None:
        before = [copy.deepcopy(group) for group in self._settings()] if times > 0 else []
        with warnings.catch_warnings():
            # Other workers may have taken steps before this worker's optimizer took its first.
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before `optimizer\.step\(\)`")
            for _ in range(times):
                self._module.lr_scheduler_step(scheduler.config.scheduler, value)
        for was, group in zip(before, self._settings(), strict=False):
            self._changed_by_schedulers |= {
                name for name in was.keys() & group.keys() if _differ(was[name], group[name])
            }

    def _settings(self) -> Iterator[dict[str, Any]]:
        """Yields the settings of all groups of all optimizers."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                yield {name: value for name, value in group.items() if name != "params"}

    def _save(self) -> None:
        for scheduler in self._schedulers:
            scheduler.count = scheduler.steps
            if self._follows:
                scheduler.state = copy.deepcopy(scheduler.config.scheduler.state_dict())
        if self._follows:
            self._groups = self._scheduled()

    def _scheduled(self) -> list[list[dict[str, Any]]]:
        """Returns a copy of what schedulers have set, in all groups of all optimizers."""
        names = self._changed_by_schedulers
        return [
            [{name: _copy(group[name]) for name in names & group.keys()} for group in optimizer.param_groups]
            for optimizer in self._optimizers
        ]

    def _restore(self) -> None:
        """Resets to the last pull, except for the steps of schedulers that follow the worker's own epochs."""
        epochs = [
            0 if scheduler.period or scheduler.config.reduce_on_plateau else scheduler.steps - scheduler.count
            for scheduler in self._schedulers
        ]
        for scheduler in self._schedulers:
            scheduler.config.scheduler.load_state_dict(copy.deepcopy(scheduler.state))
        for optimizer, groups in zip(self._optimizers, self._groups, strict=True):
            # Groups that were added in this round have no saved state.
            for group, saved in zip(optimizer.param_groups, groups, strict=False):
                group.update(copy.deepcopy(saved))
        for scheduler, times in zip(self._schedulers, epochs, strict=True):
            self._step(scheduler, times)


def _differ(one: Any, other: Any) -> bool:
    """Returns whether two settings of a group differ; not tensors or arrays of several numbers, which none changes."""
    try:
        return bool(one != other)
    except (RuntimeError, ValueError):
        return False


def _is_on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


def _copy(value: Any) -> Any:
    return value if isinstance(value, float | int) else copy.deepcopy(value)
