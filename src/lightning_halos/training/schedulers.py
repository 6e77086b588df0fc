"""Learning-rate schedulers follow the global step, not a worker's own count.

Rules of this room: it moves Lightning's schedulers between rounds and holds them back inside one. Schedulers under
manual optimization are the user's and are not touched.
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

_NEVER = sys.maxsize  # as the frequency of a scheduler: Lightning does not step it


class SchedulePosition:
    """Keeps a worker's schedulers at the global step.

    At a pull the schedulers go back to where they were at the pull before, and forward to the new global step; inside
    the round Lightning steps them as always. No scheduler goes beyond ``limit``, where ``OneCycleLR`` would raise.

    A ``ReduceLROnPlateau`` is stepped by rank 0; the other workers repeat its steps with the same values.

    Args:
        module: The module, whose ``lr_scheduler_step`` hook does every step.
        configs: Lightning's scheduler configurations.
        optimizers: Their optimizers.
        position: Global step at which the run starts.
        limit: Global steps of the whole run, ``None`` for no limit.
        decides: Whether this worker steps the plateau schedulers (rank 0).

    Attributes:
        history: All that the plateau schedulers of rank 0 were stepped with, as far as this worker knows: pairs of the
            scheduler's index and the monitored value.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        configs: Sequence[LRSchedulerConfig],
        optimizers: Sequence[Optimizer],
        position: int,
        limit: int | None,
        decides: bool,
    ) -> None:
        self._module = module
        self._configs = list(configs) if module.automatic_optimization else []
        self._optimizers = optimizers
        self._limit = limit
        self._decides = decides
        self._frequencies = [config.frequency for config in self._configs]
        self._follows = [config.interval == "step" and not config.reduce_on_plateau for config in self._configs]
        self._counts = [_count(config) for config in self._configs]
        self._plateaus: list[tuple[int, float]] = []
        self.history: list[tuple[int, float]] = []
        # A checkpoint from inside a round has schedulers that are ahead of its global step: they wait for it.
        stepped = zip(self._counts, self._frequencies, self._follows, strict=True)
        self._position = max([position, *(count * frequency for count, frequency, follows in stepped if follows)])
        for config in self._configs:
            if config.reduce_on_plateau and not decides:
                config.frequency = _NEVER
        self._save()

    def before_batch(self, batches: int) -> None:
        """Holds schedulers back that would go beyond the limit.

        Args:
            batches: Batches of this round so far in which an optimizer stepped.
        """
        at_end = self._limit is not None and self._position + batches >= self._limit
        for config, frequency, follows in zip(self._configs, self._frequencies, self._follows, strict=True):
            if follows:
                config.frequency = _NEVER if at_end else frequency

    def hold_plateaus(self, is_due: Callable[[int], bool], batch: int) -> None:
        """Lets the plateau schedulers by steps act after this batch only if they are due.

        Args:
            is_due: Says it of a scheduler's frequency.
            batch: Number of this batch in its epoch, from 1.
        """
        for config, frequency in zip(self._configs, self._frequencies, strict=True):
            if config.reduce_on_plateau and config.interval == "step":
                config.frequency = batch if is_due(frequency) else _NEVER

    def plateaus(self) -> list[tuple[int, float]]:
        """Returns what the plateau schedulers of this worker were stepped with since the last call.

        Returns:
            Pairs of the scheduler's index and the monitored value.
        """
        if not self._decides:
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
            plateaus: What rank 0 stepped its plateau schedulers with since the last pull; of no effect there.
        """
        if self._limit is not None:
            position = min(position, self._limit)
        if self._decides:
            plateaus, self._plateaus = self._plateaus, []
        if any(self._follows):
            epochs = self._restore()
            for config, times in zip(self._configs, epochs, strict=True):
                self._step(config, times)
        if not self._decides:
            self.history += plateaus
        if any(self._follows) or not self._decides:
            for index, value in plateaus:
                self._step(self._configs[index], 1, value)
        for config, frequency, follows in zip(self._configs, self._frequencies, self._follows, strict=True):
            if follows:
                self._step(config, position // frequency - self._position // frequency)
        self._position = max(position, self._position)
        self._save()

    def catch_up(self, history: Sequence[tuple[int, float]]) -> None:
        """Repeats what rank 0 did after this worker's last pull.

        Args:
            history: The :attr:`history` of rank 0.
        """
        for index, value in history[len(self.history) :]:
            self._step(self._configs[index], 1, value)

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of where the schedulers were at the last pull, and of what happened to them since."""
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
        """Goes on from a state of :meth:`state_dict`. The schedulers themselves are restored by others."""
        state = copy.deepcopy(dict(state))
        self._position, self._counts = state["position"], state["counts"]
        self._states, self._groups = state["states"], state["groups"]
        self._plateaus = [(index, value) for index, value in state["plateaus"]]
        self.history = [(index, value) for index, value in state["history"]]

    def release(self) -> None:
        """Lets Lightning step the schedulers again as it was told."""
        for config, frequency in zip(self._configs, self._frequencies, strict=True):
            config.frequency = frequency

    def _step(self, config: LRSchedulerConfig, times: int, value: float | None = None) -> None:
        with warnings.catch_warnings():
            # Other workers may have taken steps before the first one of this worker's optimizer.
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
        """Goes back to the last pull. Returns how often each scheduler by epochs was stepped since."""
        by_epoch = [
            0 if follows or config.reduce_on_plateau else _count(config) - count
            for config, count, follows in zip(self._configs, self._counts, self._follows, strict=True)
        ]
        for config, state in zip(self._configs, self._states, strict=True):
            config.scheduler.load_state_dict(copy.deepcopy(state))
        for optimizer, groups in zip(self._optimizers, self._groups, strict=True):
            # Groups that were added in this round have nothing to go back to.
            for group, saved in zip(optimizer.param_groups, groups, strict=False):
                group.update({k: copy.copy(v) for k, v in saved.items()})
        return by_epoch


def _count(config: LRSchedulerConfig) -> int:
    count: Any = getattr(config.scheduler, "last_epoch", 0)
    return int(count)
