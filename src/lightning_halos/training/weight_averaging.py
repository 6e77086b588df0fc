"""Makes Lightning's callbacks that average weights take the global model, and not a worker's own, on rank 0 only.

``WeightAveraging`` updates its average after each global step that it chooses, as under DDP, and validations and
checkpoints use it. ``StochasticWeightAveraging`` updates its average when rank 0 begins an epoch. After the fit all
workers have the average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from torch import Tensor, nn

from lightning_halos.training.compat import average_of


class GlobalTensors(NamedTuple):
    """The global model, as an average reads it from a module."""

    all_parameters: list[Tensor]
    all_buffers: list[Tensor]

    def parameters(self) -> Iterable[Tensor]:
        """Returns the parameters in the module's order."""
        return self.all_parameters

    def buffers(self) -> Iterable[Tensor]:
        """Returns the buffers in the module's order."""
        return self.all_buffers


class GlobalAverage:
    """Changes a callback for one fit.

    Args:
        callback: The callback.
        global_step: The global step at the start of the fit.
        source: Returns the global model, given the module.
    """

    def __init__(
        self, callback: Any, global_step: int, source: Callable[[nn.Module], nn.Module | GlobalTensors]
    ) -> None:
        self._callback: Callback = callback
        self._average = average_of(callback)
        self._should_update = callback.should_update
        self._update = self._average.update_parameters
        self._source = source
        self._seen = global_step
        self._times = 1
        vars(callback)["should_update"] = self._count_updates
        vars(self._average)["update_parameters"] = self._update_from_global_model

    def restore(self) -> None:
        """Restores the callback."""
        vars(self._callback).pop("should_update", None)
        vars(self._average).pop("update_parameters", None)

    def _count_updates(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Counts the updates that are due: in a batch of rank 0, the global step may advance by more than one."""
        if step_idx is None:
            self._times = int(self._should_update(epoch_idx=epoch_idx))
        else:
            self._times = sum(bool(self._should_update(step_idx=step)) for step in range(self._seen, step_idx + 1))
            self._seen = step_idx + 1
        return self._times > 0

    def _update_from_global_model(self, module: nn.Module) -> None:
        model = self._source(module)
        for _ in range(self._times):
            self._update(model)  # type: ignore[arg-type]  # it has what an average reads from a module


class GlobalStochasticAverage:
    """Changes a ``StochasticWeightAveraging`` callback for one fit.

    Args:
        callback: The callback.
        source: Returns the global model, given the module.
    """

    def __init__(
        self, callback: StochasticWeightAveraging, source: Callable[[nn.Module], nn.Module | GlobalTensors]
    ) -> None:
        update = callback.update_parameters

        def update_from_global_model(average: Any, module: nn.Module, *args: Any) -> None:
            update(average, source(module), *args)  # type: ignore[arg-type]  # as above

        self._callback = callback
        vars(callback)["update_parameters"] = update_from_global_model

    def restore(self) -> None:
        """Restores the callback."""
        vars(self._callback).pop("update_parameters", None)
