"""The messages between workers, local servers, the global server, and the members of a star of jobs.

They are plain data without behavior. A message has at most one tensor, ``vector``; every other field is a plain value,
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
from typing import Annotated, Literal

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
    leave: bool = False  # in a final push: whether the complete region leaves the run, which goes on without it
    epoch: int = 0  # epochs that the worker has finished


@dataclass
class Pull:
    """A local server gives a worker its model and the next round."""

    version: int  # version of the local server's model
    local_steps: int  # local steps that the round after the push should have
    position: int  # global steps so far: local steps of all workers, divided by the number of workers
    stop: bool  # whether the run is over; the worker then sends a final `Push`
    # Steps of rank 0's plateau schedulers since the worker's last pull: pairs of the scheduler's index and the value
    # that it was stepped with.
    plateau_steps: list[tuple[int, float]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)  # the metrics that rank 0 published last, by name
    vector: Tensor | None = None  # the local server's model
    number: int = 0
    # Local steps that the worker may take after the push before it needs another answer: its share of those that are
    # left. `None`: no limit. It matters if the worker trains on while its pushes are answered; see `core.worker`.
    share: int | None = None
    # In a simulation of such a worker: number of batches after the push at which it loads this model.
    batches: int = 0
    is_difference: bool = False  # whether the parameters in the vector are those minus the worker's `Shadow`


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
    leave: bool = False  # in a final update: whether the local server leaves the run, which goes on without it
    reports: int = 0  # in a star of jobs: number of the last report of a push that is in this update or an earlier one


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
    is_difference: bool = False  # see `Pull`, for the local server


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
    update: int = 0  # in a star of jobs: number of the update that contains the push
    epoch: int = 0  # see `Push`


@dataclass
class Status:
    """The global server tells a local server the progress of the run. Receiving it twice changes nothing.

    The last four fields are used in a star of jobs only, where ``total`` may become smaller: when a member is lost, the
    local steps are taken back that it has reported and not sent in an update.
    """

    total: int  # local steps that all workers together have finished
    fastest: Amount  # local steps per second of the fastest worker of all regions
    stop: bool  # whether no worker may start another round
    counted: int = 0  # local steps in `total` that the receiver has reported
    first_plateau_step: int = 0  # number of steps before `plateau_steps`, since the start
    plateau_steps: list[tuple[int, float]] = field(default_factory=list)  # see `Pull`, like `metrics`
    metrics: dict[str, float] = field(default_factory=dict)
    number: int = 0  # of this status among those to the receiver; one that is older than the last is ignored
    saved: int = 0  # number of the receiver's last update that a snapshot on the global server's disk has
    saved_publication: int = 0  # number of the receiver's last `Publish` that it has
    decides: bool = False  # whether the receiver's rank 0 decides: validation, callbacks, checkpoints


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
class Enrol:
    """The first message of a job of a region that does not know yet what a global step is. Answer: `Enrolled`."""

    session: str  # see `Join`
    workers: int  # number of the job's workers


@dataclass
class Enrolled:
    """What a job must know before its module is set up. The answer waits until the number of workers is known."""

    workers: int  # number of workers that a global step is divided by
    first: int  # workers of the regions that enrolled before this one


@dataclass
class RunDescription:
    """What all members must agree on. It has plain values only; the algorithm's functions are not compared."""

    model: str  # identity of the model's vector, see `ModelVector.identity`
    dtype: str  # dtype of the vector: "float32" or "float64"
    names: list[str]  # of the parameters in the vector, as in the module's `state_dict`
    shapes: list[list[int]]  # of the parameters in the vector
    buffers: list[tuple[str, list[int]]]  # names and shapes of what is averaged, behind the parameters; teachers first
    algorithm: str  # title of the algorithm
    # Plain fields of the algorithm by name; at least `local_steps`, the local steps of a round, and `has_momentum`.
    # Defaults depend on these two, on `defaults` and on `global_steps`, the length of the run.
    settings: dict[str, float | int | bool | str | None]
    # Arguments of the global server's `DelayedNesterov`: `lr`, `momentum`, `delay`, `activation`. `None`: those that
    # the algorithm has for a number of members, which follow this number.
    global_optimizer: dict[str, float] | None = None
    data: str | None = None  # identity of the training data; `None` if the workers do not share it
    steps_per_epoch: int = 0  # data of an epoch, in local steps; 0 if the workers do not share data
    epochs: int | None = None  # ordered epochs, `None` for no limit
    max_steps: int | None = None  # ordered global steps, `None` for no limit
    wire: Literal["float32", "bfloat16", "int8", "int4"] = "float32"  # format of vectors between regions
    teachers: int = 0  # elements of teachers, which follow the parameters


@dataclass
class Join:
    """A member's first message on each connection, unless it has enrolled on this one before.

    A session is one life of the member's process. A member with a new session knows nothing of the run; one whose
    connection was lost has the same session as before, and goes on where it was.
    """

    session: str  # a random text, which no other process has
    workers: int  # number of its workers
    description: RunDescription
    # Data that was leased to the session, in local steps from the start of the first epoch. Data of reports that a
    # snapshot on the global server's disk has may be missing.
    held: list[tuple[int, int]] = field(default_factory=list)
    saved: int = 0  # number of the last update that a snapshot has, so that the member cannot repeat it
    saved_report: int = 0  # number of the last report that it cannot repeat
    saved_publication: int = 0  # number of the last `Publish` that it cannot repeat
    is_flushed: bool = False  # whether a snapshot has its last update
    run: str = ""  # the run that the session takes part in, as in `Welcome`; empty for a new session


@dataclass
class Welcome:
    """The global server admits a member, or asks it for the initial model."""

    member: int  # the member's index, which is the ``server`` in its messages
    workers: int  # number of workers that a global step is divided by
    # Progress of the run, with all plateau steps from the start. `counted` is what counts of the member's reports.
    status: Status
    needs_model: bool = False  # whether the member must send an `InitialModel`, after which it is welcomed again
    is_new: bool = True  # whether the process had not joined before
    received: int = 0  # number of the session's last update that the global server has
    reports: int = 0  # number of its last report that counts
    publications: int = 0  # number of its last `Publish` that counts
    # The epoch that the member begins with: that of the data that is leased next. If the workers do not share data, it
    # is that of the slowest worker of the region's earlier jobs or, if that is later, of all others.
    epoch: int = 0
    lost: list[tuple[int, int]] = field(default_factory=list)  # data that it held, and that others have now
    callbacks: str = ""  # for the member that decides: the text in the last `Publish`
    run: str = ""  # a random text, which no other run has; empty if there is no run yet


@dataclass
class Refusal:
    """The global server refuses a member, and closes the connection."""

    reason: str
    for_good: bool = True  # whether the session is refused for ever; else it may try again later


@dataclass
class InitialModel:
    """A member gives the global server the model that the run starts with."""

    vector: Tensor | None = None


@dataclass
class ModelRequest:
    """A member asks for the present global model, which :class:`ModelCopy` brings."""

    number: int


@dataclass
class ModelCopy:
    """A copy of the global model, for a new member or for the one that decides."""

    version: int  # version of the global model
    steps: int  # local steps in the global model
    number: int  # that of the request
    vector: Tensor | None = None


@dataclass
class Publish:
    """The member that decides tells all others the steps of its plateau schedulers, and its metrics."""

    number: int  # counted from 1 in each session
    plateau_steps: list[tuple[int, float]] = field(default_factory=list)  # new ones; see `Pull`, like `metrics`
    metrics: dict[str, float] = field(default_factory=dict)
    callbacks: str = ""  # state of its callbacks, for the member that decides next; the nodes do not read it


@dataclass
class Decide:
    """The global server tells a present member that it decides from now on."""

    callbacks: str  # the text in the last `Publish`


@dataclass
class StatusRequest:
    """Asks a global server of a star of jobs for its state. Whoever has a certificate may ask, without joining."""


@dataclass
class StatusReply:
    """The answer to a :class:`StatusRequest`."""

    text: str  # JSON


@dataclass
class Marker:
    """Chandy-Lamport marker. On first receipt a node snapshots its state and forwards the marker to its workers."""

    save: str  # identity of the save
    folder: str  # folder in which its shards are written
    pushed: int = 0  # to a worker: number of its last push that is in the snapshot


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
class Turn:
    """Lane 0 of a worker tells another lane who gets the memory for a push next, so that all lanes give it alike."""

    host: int  # of the server: 0 for the local server, 1 for the global server
    worker: int


@dataclass
class Inspected:
    """A lane of a worker tells lane 0 that its slice of a vector has arrived, and what it has found in it."""

    host: int  # see `Turn`
    channel: int  # number of the link on which the message arrived, counted from 1 in the same order in all lanes
    fault: str | None  # see `servers.Finding`, like `norm` and `touched`
    norm: float
    touched: list[int]
    within: int = 0  # bytes that the lane's links have carried, as in `Progress`
    between: int = 0


@dataclass
class Ordered:
    """Lane 0 of a worker tells another lane what its server handles next."""

    host: int  # see `Turn`
    channel: int  # see `Inspected`; 0 if the process itself asks for it
    act: str = ""  # what the process itself asks for
    message: bytes = b""  # the fields of lane 0's message, encoded; empty if there is none
    has_vector: bool = False  # whether the message has a vector
    finding: tuple[str | None, float, list[int]] | None = None  # what all lanes have found in it
    within: int = 0  # bytes that all lanes' links have carried, as in `Progress`
    between: int = 0


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
    | Enrol
    | Enrolled
    | Join
    | Welcome
    | Refusal
    | InitialModel
    | ModelRequest
    | ModelCopy
    | Publish
    | Decide
    | StatusRequest
    | StatusReply
    | Marker
    | MarkerReply
    | ShardWritten
    | Turn
    | Inspected
    | Ordered
    | Preempted
    | Failure
)
