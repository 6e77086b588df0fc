"""Snapshots: copies of a server's state that are made little by little, while the server goes on.

There are no threads and no locks here. The holder of the server's lock copies one portion at a time, and the server
copies all portions that are left before it overwrites anything (copy on write), so that the copy is the state at the
moment when the snapshot began. The nodes decide when a snapshot begins and what a shard consists of.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_halos.core.cursor import Spans
from lightning_halos.core.messages import Marker, MarkerReply, Progress, RegionUpdate


class Portion(NamedTuple):
    """A part of a server's tensors, which is copied at once."""

    elements: slice  # of the model, and of the other vectors as far as they have them
    parameters: Sequence[int]  # their numbers in the optimizer's state


class ServerSnapshot:
    """The state of a server at one moment.

    Plain values are copied at once, tensors portion by portion.

    Args:
        state: The state itself, not a copy: vectors, an optimizer's ``state_dict`` under ``"optimizer"``, and plain
            values that nobody changes. Element i of each vector belongs to element i of the model. A vector may be
            shorter, such as a residual, which has no buffers: slices beyond its end are empty.
        portions: The portions of its tensors. Together they are all of them.

    Attributes:
        state: The copy. Its tensors are valid when :meth:`advance` has returned ``True``.
    """

    def __init__(self, state: Mapping[str, Any], portions: Iterable[Portion]) -> None:
        optimizer = state["optimizer"]
        vectors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        copies = {name: torch.empty_like(vector) for name, vector in vectors.items()}
        buffers = {
            number: {name: _blank(value) for name, value in own.items()} for number, own in optimizer["state"].items()
        }
        groups = copy.deepcopy(optimizer["param_groups"])
        self.state = {**state, **copies, "optimizer": {"state": buffers, "param_groups": groups}}
        self._pending: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for index, portion in enumerate(portions):
            pairs = [(copies[name][portion.elements], vector[portion.elements]) for name, vector in vectors.items()]
            for number in portion.parameters:
                for name, value in optimizer["state"].get(number, {}).items():
                    if isinstance(value, Tensor):
                        pairs.append((buffers[number][name], value))
            self._pending[index] = pairs

    @property
    def pending(self) -> Sequence[int]:
        """The indices of the portions that have not been copied yet."""
        return tuple(self._pending)

    def take(self, index: int) -> None:
        """Copies a portion, unless this has been done. Threads may do so with different portions."""
        for target, source in self._pending.pop(index, ()):
            target.copy_(source)

    def advance(self) -> bool:
        """Copies the next portion. Returns whether the snapshot is complete."""
        if self._pending:
            self.take(next(iter(self._pending)))
        return not self._pending

    def complete(self) -> dict[str, Any]:
        """Copies all that is left. Returns the state."""
        while not self.advance():
            pass
        return self.state


@dataclass
class Shard:
    """A node's part of a snapshot of all nodes, to be written to disk."""

    marker: Marker
    server: int | None  # index of the local server whose state this is; None for the global server
    state: dict[str, Any]  # tensors and plain values, valid when `snapshot` is complete
    snapshot: ServerSnapshot | None  # the copy of the server's state within `state`
    progress: dict[str, Any] = field(default_factory=dict)  # of the run, for the manifest; only of the global server

    def advance(self) -> bool:
        """Copies the next portion of the server's state. Returns whether ``state`` is complete."""
        return self.snapshot is None or self.snapshot.advance()


@dataclass
class RunSnapshot:
    """A snapshot of all nodes in progress (Chandy and Lamport, "Distributed Snapshots", 1985).

    It consists of the state of the global node when it sent the markers, and of the channel state: updates and progress
    reports that local servers sent before their own snapshots and that arrived after the global node's.
    """

    marker: Marker
    state: dict[str, Any]  # of the global node
    server: ServerSnapshot | None  # the copy of the global server's state in it
    total: int  # local steps that all workers have finished
    done: Spans  # the data that they trained on
    updates: list[dict[str, Any]] = field(default_factory=list)  # those that arrived since then, by their fields
    last_updates: dict[int, int] = field(default_factory=dict)  # each local server's last one before its snapshot

    def add_update(self, update: RegionUpdate, finding: tuple[Any, ...] | None) -> None:
        """Adds an update that has arrived, unless it was surely sent after the local server's snapshot.

        Args:
            update: The update.
            finding: What all lanes have found, which a lane cannot see in its own slice; ``None`` for one lane.
        """
        if update.number <= self.last_updates.get(update.server, update.number):
            assert update.vector is not None
            found = {} if finding is None else {"finding": finding}
            self.updates.append({**vars(update), "vector": update.vector.clone(), **found})

    def add_report(self, report: Progress) -> None:
        """Adds a report that has arrived, unless it was sent after the local server's snapshot."""
        if report.server not in self.last_updates:
            self.total += report.steps
            self.done.add(report.data)

    def add_reply(self, reply: MarkerReply) -> None:
        self.last_updates[reply.server] = reply.updates

    def is_complete(self, updates: Mapping[int, float]) -> bool:
        """Returns whether all local servers have replied, and their last updates before the snapshot have arrived.

        ``updates`` has the number of each local server's last update that has arrived; infinite if there are none.
        """
        replies = self.last_updates
        return all(server in replies and replies[server] <= number for server, number in updates.items())

    def shard(self) -> Shard:
        updates = [u for u in self.updates if u["number"] <= self.last_updates[u["server"]]]
        progress = {"total": self.total, "done": list(self.done)}
        return Shard(self.marker, None, {**self.state, "updates": updates}, self.server, progress)


def _blank(value: Any) -> Any:
    return torch.empty_like(value) if isinstance(value, Tensor) else copy.deepcopy(value)
