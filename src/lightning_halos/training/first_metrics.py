"""Rank 0's first validation metrics of a fit, for modules of other ranks that read them before a pull has brought them.

Later metrics come with the pulls. The other files of the package do not read metrics here.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Store

_FIRST, _ENDING = "first", "ending"


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics that are single numbers. Others, such as a confusion matrix, stay in their process."""
    return {name: float(value) for name, value in metrics.items() if torch.as_tensor(value).numel() == 1}


class FirstMetrics:
    """Passes rank 0's first metrics on through the store of all processes.

    Args:
        store: A store of one fit.
        check: Called many times a second while waiting; may raise.
        timeout: Limit for a wait, in seconds.
        is_rank_0: Whether this process may tell the others: of the worker that validates, only one does.
    """

    def __init__(self, store: Store, check: Callable[[], None], timeout: float, is_rank_0: bool = True) -> None:
        self._store = store
        self._check = check
        self._timeout = timeout
        self._is_told = not is_rank_0

    def tell(self, metrics: Mapping[str, Any]) -> None:
        """Tells the other ranks the metrics, if they are the first. On rank 0."""
        if not self._is_told:
            self._is_told = True
            self._store.set(_FIRST, json.dumps(numbers(metrics)))

    def end_waits(self) -> None:
        """Ends the waits of workers that have not finished, because the end of the run waits for them. On rank 0."""
        if not self._is_told:
            self._store.set(_ENDING, "")

    def wait(self, may_wait: bool, is_finished: bool) -> dict[str, float] | None:
        """Returns rank 0's first metrics, when they are there; ``None`` if they do not come while this may wait.

        Args:
            may_wait: Whether rank 0 does not wait for this worker while it trains.
            is_finished: Whether the run's end does not wait for this worker.
        """
        deadline = time.monotonic() + self._timeout
        while not self._store.check([_FIRST]):
            self._check()
            is_ending = self._store.check([_ENDING])
            if (not is_finished and (is_ending or not may_wait)) or time.monotonic() > deadline:
                return None
            time.sleep(0.02)
        metrics: dict[str, float] = json.loads(self._store.get(_FIRST))
        return metrics


class MetricsOfRank0(dict[str, Tensor]):
    """``trainer.callback_metrics`` on other ranks during a fit. A missing one may be among rank 0's first metrics.

    Args:
        present: Metrics that are there already.
        wait: Returns rank 0's first metrics, perhaps after a wait; ``None`` if they do not come; nothing if there are
            none, as under DDP.
    """

    def __init__(self, present: Mapping[str, Tensor], wait: Callable[[], Mapping[str, float] | None]) -> None:
        super().__init__(present)
        self._wait = wait
        self._has_come = False

    def __missing__(self, name: str) -> Tensor:
        metrics = {} if self._has_come else self._wait()
        if metrics is not None:
            for key, value in metrics.items():
                self._has_come = True
                self.setdefault(key, torch.tensor(value))
            if name not in self:
                raise KeyError(name)
            return self[name]
        warnings.warn(
            f"trainer.callback_metrics[{name!r}] is NaN on this rank: rank 0, which validates for all, has not done so"
            " yet, and this worker cannot wait for it.",
            stacklevel=2,
        )
        return torch.tensor(torch.nan)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)  # for copies


class ShownMetrics(dict[str, Any]):
    """``trainer.logged_metrics`` or ``progress_bar_metrics`` on other ranks during a fit.

    A missing one may be among rank 0's metrics, which come to ``trainer.callback_metrics``.

    Args:
        present: Metrics that are there already.
        look_up: Returns a metric of ``trainer.callback_metrics``.
    """

    def __init__(self, present: Mapping[str, Any], look_up: Callable[[str], Any]) -> None:
        super().__init__(present)
        self._look_up = look_up

    def __missing__(self, name: str) -> Any:
        return self._look_up(name)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)  # for copies
