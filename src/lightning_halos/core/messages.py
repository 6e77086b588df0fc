"""The messages between workers, local servers and the global server.

They are plain data without behaviour. A message has at most one tensor, ``vector``; every other field is a plain value,
so that nothing is pickled.

A link keeps the order of its messages. A sender may send a message again if it does not know whether it arrived, so
messages that must count once have a ``number``: the sender counts those of one kind from 1 (0: not numbered, always
new), and the answer has the number of the message that it answers. A ``server`` is the index of a local server, a
``worker`` a global rank.

A ``vector`` is the flat vector of a model (see :mod:`lightning_halos.core.vector`): first the trainable parameters,
then the averaged buffers. The receiver owns it: servers overwrite it, to answer without a second copy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from torch import Tensor

NOT_NEGATIVE = "finite and not negative"
Amount = Annotated[float, NOT_NEGATIVE]
"""A number that is never negative, infinite or NaN. Integers in messages are never negative either."""


@dataclass
class Push:
    """A worker gives its finished round to its local server.

    Attributes:
        version: Version of the local server's model that the round started from; ``None`` for the first round, which
            starts from the model that the run starts with.
        steps: Local steps of the round, as the Trainer counts them (optimizer steps).
        batches: Batches in which an optimizer stepped.
        seconds: Seconds that the worker spent computing the round.
        waited: Seconds that the worker waited for its local server since its last push.
        stop: Whether the worker asks for the complete run to stop.
        final: Whether this is the worker's last push.
        vector: The pseudo-gradient (start minus end), then the worker's buffers. ``None`` if there was no local step
            since the last push.
        data: Ranges of the data that the worker trained on since its last push, as in
            :class:`~lightning_halos.core.cursor.Spans`; empty if the workers do not share data.
    """

    worker: int
    version: int | None
    steps: int
    batches: int
    seconds: Amount
    waited: Amount = 0.0
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
        plateau_steps: Steps of rank 0's plateau schedulers since the worker's last pull: pairs of the scheduler's index
            and the value that it was stepped with.
        metrics: The metrics that rank 0 published last, by name.
        vector: The local server's model.
    """

    version: int
    local_steps: int
    position: int
    stop: bool
    plateau_steps: list[tuple[int, float]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    vector: Tensor | None = None
    number: int = 0


@dataclass
class RegionUpdate:
    """A local server sends its accumulated update to the global server.

    Attributes:
        version: Version of the global model that the local server merged last.
        steps: Local steps of the pushes in the update.
        final: Whether this is the local server's last update.
        stop: In a final update: whether one of the server's workers asked for the complete run to stop.
        vector: The accumulated update (model at the last update or merge minus model now), then the buffers.
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
    """The only message of this kind, the last of the only local server: its model becomes the final global model.

    Attributes:
        steps: Local steps of all pushes in the model.
        stop: Whether one of the server's workers asked for the complete run to stop.
    """

    server: int
    steps: int
    stop: bool = False
    vector: Tensor | None = None
    number: int = 1


@dataclass
class GlobalModel:
    """The global server sends its model to a local server, or at the end to everybody.

    Attributes:
        version: Version of the global model.
        final: Whether training is over and every region's last update is in the model.
        stopped: In a final model: whether a worker asked for the run to stop.
        position: In a final model: global steps of the complete run.
    """

    version: int
    final: bool = False
    stopped: bool = False
    position: int = 0
    vector: Tensor | None = None
    number: int = 0


@dataclass
class Progress:
    """A local server reports a push to the global server.

    Attributes:
        worker: The worker that pushed.
        steps: Local steps of the push.
        seconds: Seconds that the worker spent computing them.
        waited: Seconds that the worker waited for its local server before them.
        fastest: Local steps per second of the server's fastest worker.
        staleness: Versions between the model that the push started from and its arrival. ``None`` if it was not
            applied.
        updates: Pushes that the server has applied so far.
        merges: Global models that the server has merged so far.
        rejected: Pushes of this worker that the server has rejected so far.
        bytes_within_regions: Bytes that the server's links inside its region have carried so far.
        bytes_between_regions: Bytes that its links to another region have carried so far.
        stop: See :class:`Push`, like ``data``.
    """

    server: int
    number: int
    worker: int
    steps: int
    seconds: Amount
    waited: Amount
    fastest: Amount
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
    """The global server tells a local server the progress of the run. Receiving it twice changes nothing.

    Attributes:
        total: Local steps that all workers together have finished.
        fastest: Local steps per second of the fastest worker of all regions.
        stop: Whether no worker may start another round.
        counted: Local steps in ``total`` that the receiver has reported.
        first_plateau_step: Number of steps before ``plateau_steps``, since the start.
        plateau_steps: See :class:`Pull`, like ``metrics``.
    """

    total: int
    fastest: Amount
    stop: bool
    counted: int = 0
    first_plateau_step: int = 0
    plateau_steps: list[tuple[int, float]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class LeaseRequest:
    """A worker asks its local server for data to train on, or a local server the global server.

    Attributes:
        steps: Requested size, in local steps. 0 in a worker's request: its server decides.
    """

    steps: int = 0
    number: int = 0


@dataclass
class LeaseGrant:
    """The answer to a :class:`LeaseRequest`: a :class:`~lightning_halos.core.cursor.Lease`, of 0 steps at the end."""

    epoch: int
    first: int
    steps: int
    number: int = 0


@dataclass
class Marker:
    """Chandy-Lamport marker. On first receipt a node snapshots its state and forwards the marker to its workers.

    Attributes:
        save: Identity of the save.
        folder: Folder in which its shards are written.
    """

    save: str
    folder: str


@dataclass
class MarkerReply:
    """A local server tells the global server that its snapshot is taken.

    Attributes:
        updates: Number of the last update that the server sent before its snapshot.
    """

    save: str
    server: int
    updates: int


@dataclass
class ShardWritten:
    """A process tells rank 0 that its shard of a checkpoint is on disk, or why it could not be written.

    Attributes:
        name: Name of the file.
        size: Size of the file in bytes.
        crc32: Checksum of the file.
        error: The reason of a failure; empty if the shard was written.
    """

    save: str
    name: str
    size: int = 0
    crc32: int = 0
    error: str = ""


@dataclass
class Preempted:
    """A process tells its peers that it is preempted, so that the run saves a checkpoint and ends."""


@dataclass
class Failure:
    """A process tells its peers that the run cannot go on.

    Attributes:
        origin: The process that failed, for example ``"rank 3 (region 1)"``.
        reason: The error, with a traceback if available.
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
