"""Which processes are a worker together, and which slice of the model each of them carries.

It deals with numbers only, and checks what a user can get wrong about the argument ``worker``. Regions and servers,
whose members are workers, are in ``topology``; how a vector is cut into slices is in ``layout``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

WorkerSize = int | Literal["node"]


@dataclass(frozen=True)
class Placement:
    """The processes of each worker, and the lanes of the run.

    A process's lane is its number inside its worker. Lanes below :attr:`lanes` carry a slice of the model each; further
    processes of a larger worker carry nothing.

    Attributes:
        workers: Global ranks of the processes of each worker, consecutive and ascending.
        lanes: Number of slices, the same in all workers: the size of the smallest worker.
    """

    workers: tuple[tuple[int, ...], ...]
    lanes: int

    @classmethod
    def build(cls, nodes: Sequence[int], worker: WorkerSize, lanes: int | None = None) -> Placement:
        """Groups processes into workers, none of which spans two nodes.

        Args:
            nodes: The number of each process's node, by global rank. Processes of a node are consecutive.
            worker: Processes of a worker, or ``"node"`` for all processes of a node.
            lanes: Number of slices. Default: the size of the smallest worker.

        Raises:
            ValueError: If a node's processes cannot be divided into workers of this size.
        """
        blocks = [[rank for rank, _ in block] for _, block in itertools.groupby(enumerate(nodes), lambda pair: pair[1])]
        if worker != "node":
            check_divides(worker, [len(block) for block in blocks])
        sizes = [len(block) if worker == "node" else worker for block in blocks]
        workers = tuple(
            tuple(block[start : start + size])
            for block, size in zip(blocks, sizes, strict=True)
            for start in range(0, len(block), size)
        )
        smallest = min(map(len, workers))
        return cls(workers, smallest if lanes is None else lanes)

    @property
    def processes(self) -> int:
        """Number of processes of all workers."""
        return sum(map(len, self.workers))

    @property
    def is_single(self) -> bool:
        """Whether each process is a worker."""
        return self.processes == len(self.workers)

    @property
    def is_even(self) -> bool:
        """Whether all workers have the same number of processes."""
        return len(set(map(len, self.workers))) == 1

    @property
    def common_size(self) -> int:
        """The largest size into which all workers could be divided evenly."""
        return math.gcd(*map(len, self.workers))

    def worker_of(self, process: int) -> int:
        """The worker of a process."""
        return next(index for index, ranks in enumerate(self.workers) if process in ranks)

    def lane_of(self, process: int) -> int:
        """The number of a process inside its worker, which is also that of the slice that it carries, if any."""
        return self.workers[self.worker_of(process)].index(process)

    def carries(self, process: int) -> bool:
        """Whether a process carries a slice."""
        return self.lane_of(process) < self.lanes

    def expand(self, workers: Sequence[int]) -> list[int]:
        """Returns the processes of some workers."""
        return [process for worker in workers for process in self.workers[worker]]

    def in_place_of(self, process: int, worker: int) -> int:
        """Returns the process of a worker that stands for any process: itself, or the one with its lane."""
        ranks = self.workers[worker]
        return process if process in ranks else ranks[self.lane_of(process) % len(ranks)]


def check_worker(worker: object) -> None:
    """Checks the argument ``worker`` as far as this is possible without the number of processes.

    Raises:
        TypeError: If it has another type.
        ValueError: If it is less than 1.
    """
    if worker == "node":
        return
    if not isinstance(worker, int) or isinstance(worker, bool):
        raise TypeError(f"worker={worker!r} must be a number of processes such as 2, or 'node' for all of a node.")
    if worker < 1:
        raise ValueError(f"worker={worker} must be at least 1: the number of processes of a worker.")


def check_divides(worker: int, sizes: Sequence[int]) -> None:
    """Checks that nodes with these numbers of processes can be divided into workers of a size.

    Raises:
        ValueError: If not.
    """
    wrong = [index for index, size in enumerate(sizes) if size % worker]
    if wrong:
        common = math.gcd(*sizes)
        raise ValueError(
            f"worker={worker} does not divide the {sizes[wrong[0]]} process(es) of a node, and a worker must not span"
            f" two nodes. Use a size that divides the processes of every node, such as worker={common}, or"
            " worker='node'."
        )


def by_worker(placement: Placement, names: Sequence[str]) -> list[str]:
    """Returns the name of each worker's region, given those of its processes.

    Raises:
        ValueError: If processes of a worker are in different regions.
    """
    for index, ranks in enumerate(placement.workers):
        if len({names[rank] for rank in ranks}) > 1:
            raise ValueError(
                f"HALOS_REGION differs between the processes of worker {index}:"
                f" {', '.join(f'rank {rank} has {names[rank]!r}' for rank in ranks)}. A worker is in one region."
            )
    return [names[ranks[0]] for ranks in placement.workers]
