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
    """A worker gives its finished round to its local server."""

    worker: int
    # Version of the local server's model that the round started from; `None` for the first round, which starts from the
    # model that the run starts with.
    version: int | None
    steps: int  # local steps of the round, as the Trainer counts them (optimizer steps)
    batches: int  # batches in which an optimizer stepped
    seconds: Amount  # seconds that the worker spent computing the round
    waited: Amount = 0.0  # seconds that the worker waited for its local server since its last push
    stop: bool = False  # whether the worker asks for the complete run to stop
    final: bool = False  # whether this is the worker's last push
    # The pseudo-gradient (start minus end), then the averaged buffers; `None` if there was no local step since the last
    # push.
    vector: Tensor | None = None
    number: int = 0
    # Ranges of the data that the worker trained on since its last push, as in `cursor.Spans`; empty if the workers do
    # not share data.
    data: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Pull:
    """A local server gives a worker its model and the next round."""

    version: int  # version of the local server's model
    local_steps: int  # local steps that the next round should have
    position: int  # global steps so far: local steps of all workers, divided by the number of workers
    stop: bool  # whether the run is over; the worker then sends a final `Push`
    # Steps of rank 0's plateau schedulers since the worker's last pull: pairs of the scheduler's index and the value
    # that it was stepped with.
    plateau_steps: list[tuple[int, float]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)  # the metrics that rank 0 published last, by name
    vector: Tensor | None = None  # the local server's model
    number: int = 0


@dataclass
class RegionUpdate:
    """A local server sends its accumulated update to the global server."""

    server: int
    version: int  # version of the global model that the local server merged last
    steps: int  # local steps of the pushes in the update
    final: bool = False  # whether this is the local server's last update
    stop: bool = False  # in a final update: whether one of the server's workers asked for the complete run to stop
    # The accumulated update (model at the last update or merge minus model now), then the averaged buffers.
    vector: Tensor | None = None
    number: int = 0


@dataclass
class RegionModel:
    """The only message of this kind, the last of the only local server: its model becomes the final global model."""

    server: int
    steps: int  # local steps of all pushes in the model
    stop: bool = False  # whether one of the server's workers asked for the complete run to stop
    vector: Tensor | None = None
    number: int = 1


@dataclass
class GlobalModel:
    """The global server sends its model to a local server, or at the end to everybody."""

    version: int  # version of the global model
    final: bool = False  # whether training is over and every region's last update is in the model
    stopped: bool = False  # in a final model: whether a worker asked for the run to stop
    position: int = 0  # in a final model: global steps of the complete run
    vector: Tensor | None = None
    number: int = 0


@dataclass
class Progress:
    """A local server reports a push to the global server."""

    server: int
    number: int
    worker: int  # who pushed
    steps: int  # local steps of the push
    seconds: Amount  # seconds that the worker spent computing them
    waited: Amount  # seconds that the worker waited for its local server before them
    fastest: Amount  # local steps per second of the server's fastest worker
    # Versions between the model that the push started from and its arrival; `None` if it was not applied.
    staleness: int | None = None
    updates: int = 0  # pushes that the server has applied so far
    merges: int = 0  # global models that the server has merged so far
    rejected: int = 0  # pushes of this worker that the server has rejected so far
    bytes_within_regions: int = 0  # bytes that the server's links inside its region have carried so far
    bytes_between_regions: int = 0  # bytes that its links to another region have carried so far
    stop: bool = False  # see `Push`, like `data`
    data: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Status:
    """The global server tells a local server the progress of the run. Receiving it twice changes nothing."""

    total: int  # local steps that all workers together have finished
    fastest: Amount  # local steps per second of the fastest worker of all regions
    stop: bool  # whether no worker may start another round
    counted: int = 0  # local steps in `total` that the receiver has reported
    first_plateau_step: int = 0  # number of steps before `plateau_steps`, since the start
    plateau_steps: list[tuple[int, float]] = field(default_factory=list)  # see `Pull`, like `metrics`
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class LeaseRequest:
    """A worker asks its local server for data to train on, or a local server the global server."""

    steps: int = 0  # requested size, in local steps; 0 in a worker's request: its server decides
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
    """Chandy-Lamport marker. On first receipt a node snapshots its state and forwards the marker to its workers."""

    save: str  # identity of the save
    folder: str  # folder in which its shards are written


@dataclass
class MarkerReply:
    """A local server tells the global server that its snapshot is taken."""

    save: str
    server: int
    updates: int  # number of the last update that the server sent before its snapshot


@dataclass
class ShardWritten:
    """A process tells rank 0 that its shard of a checkpoint is on disk, or why it could not be written."""

    save: str
    name: str  # name of the file
    size: int = 0  # size of the file in bytes
    crc32: int = 0  # checksum of the file
    error: str = ""  # the reason of a failure; empty if the shard was written


@dataclass
class Preempted:
    """A process tells its peers that it is preempted, so that the run saves a checkpoint and ends."""


@dataclass
class Failure:
    """A process tells its peers that the run cannot go on."""

    origin: str  # the process that failed, for example `"rank 3 (region 1)"`
    reason: str  # the error, with a traceback if available


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
