"""The messages that travel between workers, local servers and the global server.

Plain data, no behaviour. A message has at most one tensor, ``vector``; every other field can be written as JSON, so
that no pickle ever crosses a link.

A link keeps the order of its messages. A sender that cannot know whether a message arrived may send it again, so
messages that must count once have a ``number``: the sender counts them from 1, and the answer carries the number of the
message that it answers.

A ``vector`` is the flat form of the part of a model that travels (see :mod:`lightning_halos.core.vector`): first the
trainable parameters, then the averaged buffers. The sender gives it away: the receiver may write into it, and the
servers do, to answer without a second copy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Push:
    """A worker gives its finished round to its local server.

    Attributes:
        worker: Global rank of the worker.
        version: Version of the local server's model that the round started from.
        steps: Local steps of the round, as the Trainer counts them (optimizer steps).
        batches: Batches of the round in which an optimizer stepped.
        seconds: Seconds that the worker spent computing the round.
        waited: Seconds that the worker waited for its local server since its last push.
        stop: Whether the worker asks for the whole run to stop.
        final: Whether the worker takes part in no further round.
        vector: The pseudo-gradient (start minus end), then the worker's buffers. ``None`` if there was no local step
            since the last push.
        number: Number of this push among the worker's, from 1; 0 if they are not numbered, and each is new.
        data: The data that the worker trained on since its last push, as
            :class:`~lightning_halos.core.cursor.Spans`, if the workers share it.
    """

    worker: int
    version: int
    steps: int
    batches: int
    seconds: float
    waited: float = 0.0
    stop: bool = False
    final: bool = False
    vector: Tensor | None = None
    number: int = 0
    data: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Pull:
    """A local server gives a worker its model and the next round.

    Attributes:
        version: Version of the local server's model.
        local_steps: Local steps that the next round should have.
        position: Global steps so far: local steps of all workers, divided by the number of workers.
        stop: Whether the run is over; the worker then sends a final :class:`Push`.
        plateaus: What the plateau schedulers of rank 0 were stepped with since the worker's last pull: pairs of the
            scheduler's index and the value.
        metrics: The metrics that rank 0 published last, by name.
        vector: The local server's model.
        number: The number of the push that this answers.
    """

    version: int
    local_steps: int
    position: int
    stop: bool
    plateaus: list[tuple[int, float]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    vector: Tensor | None = None
    number: int = 0


@dataclass
class RegionUpdate:
    """A local server gives the global server what its workers have added.

    Attributes:
        server: Index of the local server.
        version: Version of the global model that the local server merged last.
        steps: Local steps behind the update.
        final: Whether this is the local server's last update.
        stop: Of a final update: whether one of the server's workers asked for the whole run to stop.
        vector: The accumulated update (model at the last merge minus model now), then the local server's buffers.
        number: Number of this update among the server's, from 1; 0 if they are not numbered, and each is new.
    """

    server: int
    version: int
    steps: int
    final: bool = False
    stop: bool = False
    vector: Tensor | None = None
    number: int = 0


@dataclass
class RegionModel:
    """The only local server of a run gives its model, as its last message, to become the final global model.

    Attributes:
        server: Index of the local server.
        steps: Local steps behind the model.
        stop: Whether one of the server's workers asked for the whole run to stop.
        vector: The model.
        number: 1: a server sends this once, perhaps repeatedly.
    """

    server: int
    steps: int
    stop: bool = False
    vector: Tensor | None = None
    number: int = 1


@dataclass
class GlobalModel:
    """The global server gives its model to a local server, or at the end to everybody.

    Attributes:
        version: Version of the global model.
        final: Whether training is over and every region's last update is in the model.
        stopped: Of a final model: whether somebody asked for the run to stop.
        position: Of a final model: global steps of the whole run.
        vector: The global model.
        number: The number of the update that this answers.
    """

    version: int
    final: bool = False
    stopped: bool = False
    position: int = 0
    vector: Tensor | None = None
    number: int = 0


@dataclass
class Progress:
    """A local server tells the global server about a push.

    Attributes:
        server: Index of the local server.
        number: Number of this report among the server's, from 1.
        worker: Global rank of the worker that pushed.
        steps: Local steps of the push.
        seconds: Seconds that the worker spent computing them.
        waited: Seconds that the worker waited for its local server before them.
        fastest: Local steps per second of the server's fastest worker.
        staleness: Of an applied push: versions between the model that it started from and its arrival. ``None`` if
            nothing was applied.
        updates: Pushes that the server has applied so far.
        merges: Global models that the server has merged so far.
        rejected: Pushes of this worker that the server has dropped so far.
        bytes_within_regions: Bytes that the server's links inside its region have carried so far.
        bytes_between_regions: Bytes that its links to another region have carried so far.
        stop: Whether the worker asks for the whole run to stop.
        data: The data that the worker trained on; see :class:`Push`.
    """

    server: int
    number: int
    worker: int
    steps: int
    seconds: float
    waited: float
    fastest: float
    staleness: int | None = None
    updates: int = 0
    merges: int = 0
    rejected: int = 0
    bytes_within_regions: int = 0
    bytes_between_regions: int = 0
    stop: bool = False
    data: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Status:
    """The global server tells a local server how far the run is. Receiving it twice is the same as once.

    Attributes:
        total: Local steps that all workers have finished.
        fastest: Local steps per second of the fastest worker of all.
        stop: Whether the run is over: no worker starts another round.
        counted: Local steps in ``total`` that the receiver reported.
        first_plateau: How many steps of plateau schedulers came before ``plateaus``, since the start.
        plateaus: Values that the plateau schedulers of rank 0 were stepped with: pairs of the scheduler's index and the
            value.
        metrics: The metrics that rank 0 published last, by name.
    """

    total: int
    fastest: float
    stop: bool
    counted: int = 0
    first_plateau: int = 0
    plateaus: list[tuple[int, float]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class LeaseRequest:
    """A worker asks its local server for data to train on, or a local server the global server.

    Attributes:
        steps: Data wanted, in local steps. 0 when a worker asks and its server decides.
        number: Number of this request among the sender's, from 1.
    """

    steps: int = 0
    number: int = 0


@dataclass
class LeaseGrant:
    """The answer to a :class:`LeaseRequest`; see :class:`~lightning_halos.core.cursor.Lease`.

    Attributes:
        epoch: The epoch.
        first: Where the range begins in the epoch, in local steps.
        steps: Length of the range, in local steps; 0 if there is no more data.
        number: The number of the request that this answers.
    """

    epoch: int
    first: int
    steps: int
    number: int = 0


@dataclass
class Marker:
    """Chandy-Lamport marker. On first receipt a node snapshots its state and forwards the marker to its workers.

    Attributes:
        save: Name of the save.
        folder: Folder in which its shards are written.
    """

    save: str
    folder: str


@dataclass
class MarkerReply:
    """A local server tells the global server that its snapshot is taken.

    Attributes:
        save: Name of the save.
        server: Index of the local server.
        updates: Number of the last update that the server sent before its snapshot.
    """

    save: str
    server: int
    updates: int


@dataclass
class Shard:
    """A part of a snapshot that has to be written.

    Attributes:
        marker: The save that it belongs to.
        server: Index of the local server that it is the state of; ``None`` for the state of the global server.
        state: Tensors and plain values.
        progress: Of the global server: how far the run was, for the manifest.
    """

    marker: Marker
    server: int | None
    state: dict[str, Any]
    progress: dict[str, Any] = field(default_factory=dict)


@dataclass
class ShardWritten:
    """A process tells rank 0 that its part of a save is on the disk, or that it could not be written.

    Attributes:
        save: Name of the save.
        name: Name of the file.
        size: Bytes of the file.
        sha256: Checksum of the file.
        error: What went wrong; empty if nothing did.
    """

    save: str
    name: str
    size: int = 0
    sha256: str = ""
    error: str = ""


@dataclass
class Preempted:
    """A process tells its peers that the run has to save a checkpoint and end, because its machine is taken away."""


@dataclass
class Failure:
    """A process tells its peers that the run cannot go on.

    Attributes:
        origin: Who failed, for example ``"rank 3 (region 1)"``.
        reason: What happened, with the traceback if there is one.
    """

    origin: str
    reason: str


Message = (
    Push
    | Pull
    | RegionUpdate
    | RegionModel
    | GlobalModel
    | Progress
    | Status
    | LeaseRequest
    | LeaseGrant
    | Marker
    | MarkerReply
    | ShardWritten
    | Preempted
    | Failure
)
