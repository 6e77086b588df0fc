"""Makes learning-rate schedulers follow the global step instead of a worker's own count of steps.

Schedulers are moved between rounds, and never go beyond the end of the run. Under manual optimization the user steps
schedulers, so they are not changed.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import Optimizer

_NEVER = sys.maxsize  # a frequency with which Lightning never steps a scheduler


class SchedulePosition:
    """Keeps a worker's schedulers at the global step.

    At a pull the schedulers are reset to their state at the previous pull, and then stepped to the new global step.
    Inside a round Lightning steps them as usual. No scheduler is stepped beyond ``limit``, where ``OneCycleLR`` would
    raise an error.

    Rank 0 steps a ``ReduceLROnPlateau``; the other workers repeat its steps with the same values.

    Args:
        module: The module, whose ``lr_scheduler_step`` hook does every step.
        configs: Lightning's scheduler configurations.
        optimizers: Their optimizers.
        position: Global step at which the run starts.
        limit: Global steps of the complete run, ``None`` for no limit.
        is_rank_0: Whether this worker steps the plateau schedulers (rank 0).

    Attributes:
        history: All steps of rank 0's plateau schedulers that this worker knows: pairs of the scheduler's index and the
            monitored value.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        configs: Sequence[LRSchedulerConfig],
        optimizers: Sequence[Optimizer],
        position: int,
        limit: int | None,
        is_rank_0: bool,
    ) -> None:
        self._module = module
        self._configs = list(configs) if module.automatic_optimization else []
        self._optimizers = optimizers
        self._limit = limit
        self._is_rank_0 = is_rank_0
        self._frequencies = [config.frequency for config in self._configs]
        self._follows = [config.interval == "step" and not config.reduce_on_plateau for config in self._configs]
        self._counts = [_count(config) for config in self._configs]
        self._plateaus: list[tuple[int, float]] = []
        self.history: list[tuple[int, float]] = []
        # Schedulers in a checkpoint from inside a round are ahead of its global step. They wait until it catches up.
        stepped = zip(self._counts, self._frequencies, self._follows, strict=True)
        self._position = max([position, *(count * frequency for count, frequency, follows in stepped if follows)])
        for config in self._configs:
            if config.reduce_on_plateau and not is_rank_0:
                config.frequency = _NEVER
        self._save()

    def before_batch(self, batches: int) -> None:
        """Keeps Lightning from stepping schedulers beyond the limit.

        Args:
            batches: Batches of this round so far in which an optimizer stepped.
        """
        at_end = self._limit is not None and self._position + batches >= self._limit
        for config, frequency, follows in zip(self._configs, self._frequencies, self._follows, strict=True):
            if follows:
                config.frequency = _NEVER if at_end else frequency

    def hold_plateaus(self, is_due: Callable[[int], bool], batch: int) -> None:
        """Lets Lightning step plateau schedulers with ``interval="step"`` after this batch only if they are due.

        Args:
            is_due: Whether a scheduler with this frequency has to step after this batch.
            batch: Number of this batch in its epoch, from 1.
        """
        for config, frequency in zip(self._configs, self._frequencies, strict=True):
            if config.reduce_on_plateau and config.interval == "step":
                config.frequency = batch if is_due(frequency) else _NEVER

    def plateaus(self) -> list[tuple[int, float]]:
        """Returns the steps of this worker's plateau schedulers since the last call.

        Returns:
            Pairs of the scheduler's index and the monitored value.
        """
        if not self._is_rank_0:
            return []
        stepped: list[tuple[int, float]] = []
        for index, config in enumerate(self._configs):
            if config.reduce_on_plateau and _count(config) > self._counts[index]:
                self._counts[index] = _count(config)
                assert config.monitor is not None
                stepped.append((index, float(self._module.trainer.callback_metrics[config.monitor])))
        self._plateaus += stepped
        self.history += stepped
        return stepped

    def pull(self, position: int, plateaus: Sequence[tuple[int, float]]) -> None:
        """Moves the schedulers to a new global step.

        Args:
            position: The global step.
            plateaus: Steps of rank 0's plateau schedulers since the last pull. Rank 0 ignores them.
        """
        if self._limit is not None:
            position = min(position, self._limit)
        if self._is_rank_0:
            plateaus, self._plateaus = self._plateaus, []
        if any(self._follows):
            epochs = self._restore()
            for config, times in zip(self._configs, epochs, strict=True):
                self._step(config, times)
        if not self._is_rank_0:
            self.history += plateaus
        if any(self._follows) or not self._is_rank_0:
            for index, value in plateaus:
                self._step(self._configs[index], 1, value)
        for config, frequency, follows in zip(self._configs, self._frequencies, self._follows, strict=True):
            if follows:
                self._step(config, position // frequency - self._position // frequency)
        self._position = max(position, self._position)
        self._save()

    def catch_up(self, history: Sequence[tuple[int, float]]) -> None:
        """Repeats the plateau steps that rank 0 made after this worker's last pull.

        Args:
            history: The :attr:`history` of rank 0.
        """
        for index, value in history[len(self.history) :]:
            self._step(self._configs[index], 1, value)

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of the schedulers' state at the last pull, and of their changes since."""
        return copy.deepcopy(
            {
                "position": self._position,
                "counts": self._counts,
                "states": self._states if any(self._follows) else [],
                "groups": self._groups if any(self._follows) else [],
                "plateaus": self._plateaus,
                "history": self.history,
            }
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state of :meth:`state_dict`. Lightning restores the schedulers themselves."""
        state = copy.deepcopy(dict(state))
        self._position, self._counts = state["position"], state["counts"]
        self._states, self._groups = state["states"], state["groups"]
        self._plateaus = [(index, value) for index, value in state["plateaus"]]
        self.history = [(index, value) for index, value in state["history"]]

    def release(self) -> None:
        """Restores the schedulers' frequencies."""
        for config, frequency in zip(self._configs, self._frequencies, strict=True):
            config.frequency = frequency

    def _step(self, config: LRSchedulerConfig, times: int, value: float | None = None) -> None:
        with warnings.catch_warnings():
            # Other workers may have taken steps before this worker's optimizer took its first.
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before `optimizer\.step\(\)`")
            for _ in range(times):
                self._module.lr_scheduler_step(config.scheduler, value)

    def _save(self) -> None:
        if any(self._follows):
            self._states = [copy.deepcopy(config.scheduler.state_dict()) for config in self._configs]
            self._groups = [
                [{k: copy.copy(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
                for optimizer in self._optimizers
            ]
        self._counts = [_count(config) for config in self._configs]

    def _restore(self) -> list[int]:
        """Resets to the last pull. Returns how often each scheduler with ``interval="epoch"`` was stepped since."""
        by_epoch = [
            0 if follows or config.reduce_on_plateau else _count(config) - count
            for config, count, follows in zip(self._configs, self._counts, self._follows, strict=True)
        ]
        for config, state in zip(self._configs, self._states, strict=True):
            config.scheduler.load_state_dict(copy.deepcopy(state))
        for optimizer, groups in zip(self._optimizers, self._groups, strict=True):
            # Groups that were added in this round have no saved state.
            for group, saved in zip(optimizer.param_groups, groups, strict=False):
                group.update({k: copy.copy(v) for k, v in saved.items()})
        return by_epoch


def _count(config: LRSchedulerConfig) -> int:
    count: Any = getattr(config.scheduler, "last_epoch", 0)
    return int(count)
