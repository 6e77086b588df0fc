"""Moves tensors between all workers over a star of pairs: each worker with its leader, each leader with the center.

What is moved, and what it means, is in ``collectives``. Large tensors move in parts, so that all pairs are busy at
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import Store, Work

from lightning_halos.core.vector import PART
from lightning_halos.transport.groups import connect_pairs

_FOREVER = timedelta(days=10_000)  # as Lightning's; gloo counts nanoseconds, so not much longer
_PART_BYTES = 2**22  # of a broadcast
_AHEAD = 8  # parts of a reduction that a leader sends to the center before it waits for the first result


class Star:
    """One worker's place in the star. All workers must make it in order to connect.

    Every method must be called by all workers, and raises ``RuntimeError`` if a worker has ended, or does not come in
    time.

    Args:
        regions: Ranks of the workers of each region. The lowest of each is the region's leader, and the lowest of all
            is the center. A region may be empty.
        rank: This worker's rank.
        store: A store of the workers for this star alone.
        timeout: Limit for any wait for another worker, in seconds.
        interrupted: Called several times a second while connecting; may raise.

    Attributes:
        ranks: The ranks of all workers, ascending.

    Raises:
        PeerLostError: If not all workers connect in time.
    """

    def __init__(
        self,
        regions: Sequence[Sequence[int]],
        rank: int,
        store: Store,
        timeout: float,
        interrupted: Callable[[], None],
    ) -> None:
        regions = [sorted(ranks) for ranks in regions if ranks]
        self.ranks = sorted(rank for ranks in regions for rank in ranks)
        self._rank = rank
        self._center = self.ranks[0]
        self._limit = timedelta(seconds=timeout)
        home = next(ranks for ranks in regions if rank in ranks)
        self._below: dict[int, list[int]] = {}
        """The workers that are reached through each child, in the order in which it sends their rows."""
        if rank == home[0]:
            self._below |= {other: [other] for other in home[1:]}
        if rank == self._center:
            self._below |= {ranks[0]: list(ranks) for ranks in regions if rank not in ranks}
        parent = self._center if rank == home[0] else home[0]
        self._parent = None if rank == self._center else parent
        self._pairs = connect_pairs(store, "star", rank, self._parent, list(self._below), timeout, interrupted)

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Waits for other workers without a limit, but not for those that have ended."""
        limit, self._limit = self._limit, _FOREVER
        try:
            yield
        finally:
            self._limit = limit

    def close(self) -> None:
        """Closes all connections of this worker."""
        self._pairs.clear()

    def gather(self, row: Tensor) -> Tensor:
        """Returns a table of the rows of all workers, by rank.

        Args:
            row: A one-dimensional tensor, of the same shape and dtype on all workers.
        """
        blocks = {child: row.new_empty(len(ranks), len(row)) for child, ranks in self._below.items()}
        self._wait([self._receive(child, block) for child, block in blocks.items()])
        table = torch.cat([row.unsqueeze(0), *blocks.values()])
        if self._parent is None:
            order = [self._rank, *(rank for ranks in self._below.values() for rank in ranks)]
            table = table[torch.tensor(order).argsort()]
        else:
            self._wait([self._send(self._parent, table)])
            table = row.new_empty(len(self.ranks), len(row))
        self.broadcast(table, self._center)
        return table

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrites a contiguous tensor with that of the worker ``source``."""
        origin = None if source == self._rank else self._toward(source)
        parts = torch.split(tensor.view(-1), max(1, _PART_BYTES // tensor.element_size())) if tensor.numel() else ()
        arriving = [] if origin is None else [self._receive(origin, part) for part in parts]
        leaving: list[Work] = []
        for index, part in enumerate(parts):
            self._wait(arriving[index : index + 1])
            leaving += [self._send(peer, part) for peer in self._pairs if peer != origin]
        self._wait(leaving)

    @torch.inference_mode()  # a tensor that was made in this mode can only be overwritten in it
    def reduce(self, tensor: Tensor, combine: Callable[[Tensor, Tensor], object]) -> None:
        """Reduces a contiguous tensor over all workers, in place, with the same result on all of them.

        Args:
            tensor: Of the same shape and dtype on all workers.
            combine: Combines its second argument into the first.
        """
        parts = torch.split(tensor.view(-1), PART) if tensor.numel() else ()
        # A result overwrites the part that it was made of. It only comes after the parent has received that part.
        results = [] if self._parent is None else [self._receive(self._parent, part) for part in parts]
        leaving: list[Work] = []

        def pass_on(index: int) -> None:
            self._wait(results[index : index + 1])
            leaving.extend(self._send(child, parts[index]) for child in self._below)

        ahead = 0 if self._parent is None else _AHEAD
        contributions = [self._parts_of(child, parts) for child in self._below]
        for index, part in enumerate(parts):
            for contribution in contributions:
                combine(part, next(contribution))
            if self._parent is not None:
                leaving.append(self._send(self._parent, part))
            if index >= ahead:
                pass_on(index - ahead)
        for index in range(max(0, len(parts) - ahead), len(parts)):
            pass_on(index)
        self._wait(leaving)

    def _parts_of(self, child: int, like: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yields the parts of a child's tensor. The next one arrives while one is used."""
        memory = [torch.empty_like(like[0]), torch.empty_like(like[0])] if like else []

        def post(index: int) -> tuple[Tensor, Work]:
            part = memory[index % 2][: len(like[index])]
            return part, self._receive(child, part)

        coming = [post(0)] if like else []
        for index in range(len(like)):
            part, work = coming.pop()
            if index + 1 < len(like):
                coming.append(post(index + 1))
            self._wait([work])
            yield part

    def _toward(self, rank: int) -> int:
        """Returns the peer through which a worker is reached."""
        child = next((child for child, ranks in self._below.items() if rank in ranks), None)
        if child is not None:
            return child
        assert self._parent is not None
        return self._parent

    def _send(self, peer: int, tensor: Tensor) -> Work:
        pair = self._pairs[peer]
        return pair.send([tensor], 1 - pair.rank(), 0)

    def _receive(self, peer: int, tensor: Tensor) -> Work:
        pair = self._pairs[peer]
        return pair.recv([tensor], 1 - pair.rank(), 0)

    def _wait(self, works: Sequence[Work]) -> None:
        for work in works:
            work.wait(self._limit)
