"""What the processes of one worker tell each other about its model, over a process group of torch's.

They are in step whenever they use it, because they train on the same batches. Other workers are never involved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lightning_halos.core.compat import broadcast_each_
from lightning_halos.core.sharding import WorkerProcesses


class GroupedProcesses(WorkerProcesses):
    """The processes of a worker that are a process group.

    Args:
        group: Their process group, in the order of the lanes. It must support host memory and the model's device.
        lanes: Number of lanes of the run.
        model: The model, as the strategy inside the worker wraps it.
    """

    def __init__(self, group: ProcessGroup, lanes: int, model: nn.Module) -> None:
        self.lane = group.rank()
        self.lanes = lanes
        self.model = model
        self._group = group

    def share_(self, tensors: Sequence[Tensor], lane: int) -> None:
        """Overwrites tensors with those of one lane's process."""
        broadcast_each_(self._group, list(tensors), lane)

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Returns for each flag whether any process of the worker has set it."""
        found = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in found]
