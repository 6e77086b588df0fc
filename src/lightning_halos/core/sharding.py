"""What a process has of its worker's model, and what it asks of the worker's other processes.

A worker of several processes has a complete model in each of them, or a shard of it. This file knows how torch divides
tensors; which part of them a process sends is decided in :mod:`.vector`, and how processes talk in ``training``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_halos.core.compat import flat_shards, reshard


class Sharded(NamedTuple):
    """How a tensor is divided among the processes of a worker.

    Attributes:
        shape: Shape of the complete tensor, as real numbers.
        sizes: Elements of each process's part. The parts are ranges of the flattened tensor, in order.
    """

    shape: torch.Size
    sizes: list[int]


class WorkerProcesses:
    """The processes of a worker, as one of them sees them: here, those of a worker that has only one.

    All of them must make the same calls in the same order.

    Attributes:
        lane: Number of this process in its worker.
        lanes: Number of lanes of the run. Processes with higher numbers carry no slice.
        model: The model as it is wrapped for several processes; ``None`` for a worker of one process.
    """

    lane = 0
    lanes = 1
    model: nn.Module | None = None

    def share_(self, tensors: Sequence[Tensor], lane: int) -> None:
        """Overwrites tensors with those of one lane's process."""

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Returns for each flag whether any process of the worker has set it."""
        return list(flags)


def find_shards(model: nn.Module | None) -> dict[int, Sharded]:
    """Returns how those parameters are divided of which this process has only a part, by their ``id``.

    Args:
        model: The model, as it is wrapped by ``FullyShardedDataParallel`` or after ``fully_shard``.

    Raises:
        ValueError: If a parameter is divided in another way than by rows (dimension 0) among the processes.
    """
    if model is None:
        return {}
    reshard(model)
    shards = {key: Sharded(*shard) for key, shard in flat_shards(model).items()}
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "placements"):
            shards[id(parameter)] = _by_rows(name, parameter)
    return shards


def local(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor that this process has, without a copy and without gradients."""
    detached = tensor.detach()
    return detached.to_local() if hasattr(detached, "to_local") else detached


def complete(tensor: Tensor) -> Tensor:
    """Returns all values of a distributed tensor, for which all processes of the worker must ask together."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


def _by_rows(name: str, parameter: Tensor) -> Sharded:
    """Returns how a distributed tensor is divided."""
    placements, mesh = parameter.placements, parameter.device_mesh  # type: ignore[attr-defined]
    divided = [index for index in range(mesh.ndim) if mesh.size(index) > 1]
    if len(divided) > 1 or not all(placements[index].is_shard(dim=0) for index in divided):
        raise ValueError(
            f"The parameter {name} is divided as {tuple(placements)} over {mesh}, but workers can only exchange models"
            " that are divided by rows among a worker's processes, as"
            " fully_shard(module, mesh=self.device_mesh['data_parallel']) does it. Tensor parallelism, and replicas of"
            " shards, are not supported."
        )
    shape = torch.Size((*parameter.shape, 2)) if parameter.is_complex() else parameter.shape
    rows, width, number = shape[0], shape[1:].numel(), mesh.size(divided[0]) if divided else 1
    most = -(-rows // number)  # torch.chunk divides like this
    return Sharded(shape, [max(min(most, rows - lane * most), 0) * width for lane in range(number)])
