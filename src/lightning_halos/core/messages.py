"""What travels between workers, local servers and the global server.

Rules of this room: plain data, no behaviour. A message has at most one tensor, ``vector``; every other field can be
written as JSON, so that no pickle ever crosses a link.

Links keep the order of messages. A sender that cannot know whether a message arrived may send it again: a :class:`Push`
and a :class:`RegionUpdate` have a number, so that a server applies each once, and answers it as often as it comes.

A ``vector`` is the flat form of what travels of a model (see :mod:`lightning_halos.core.vector`): first the trainable
parameters, then the averaged buffers. Whoever sends a vector gives it away: the receiver may write into it, and the
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
        number: Which of the worker's rounds this is, from 1; 0 if rounds are not numbered, and each push is new.
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
    """

    version: int
    local_steps: int
    position: int
    stop: bool
    plateaus: list[tuple[int, float]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    vector: Tensor | None = None


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
        number: Which of the local server's updates this is, from 1; 0 if they are not numbered, and each is new.
    """

    server: int
    version: int
    steps: int
    final: bool = False
    stop: bool = False
    vector: Tensor | None = None
    number: int = 0


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
    """A local server tells the global server what happened since its last report.

    Attributes:
        server: Index of the local server.
        steps: Local steps that its workers finished.
        fastest: Local steps per second of its fastest worker.
        stop: Whether one of its workers asks for the whole run to stop.
        statistics: Counters for monitoring, by name.
        data: The data that its workers trained on; see :class:`Push`.
    """

    server: int
    steps: int
    fastest: float
    stop: bool = False
    statistics: dict[str, Any] = field(default_factory=dict)
    data: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Status:
    """The global server tells a local server how far the whole run is.

    Attributes:
        total: Local steps that all workers have finished.
        fastest: Local steps per second of the fastest worker of all.
        stop: Whether the run is over: no worker starts another round.
        plateaus: All values that the plateau schedulers of rank 0 were stepped with so far, from the start.
        metrics: The metrics that rank 0 published last, by name.
        counted: Local steps in ``total`` that the receiver reported.
    """

    total: int
    fastest: float
    stop: bool
    plateaus: list[tuple[int, float]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    counted: int = 0


@dataclass
class LeaseRequest:
    """A worker asks its local server for data to train on, or a local server the global server.

    Attributes:
        steps: How many local steps' worth a local server wants; its workers get what it thinks right.
    """

    steps: int = 0


@dataclass
class LeaseGrant:
    """The answer to a :class:`LeaseRequest`; see :class:`~lightning_halos.core.cursor.Lease`.

    Attributes:
        epoch: The epoch.
        first: Local steps' worth of data before the range, in this epoch.
        steps: Local steps' worth of data in the range; 0 if there is no more data.
    """

    epoch: int
    first: int
    steps: int


@dataclass
class Marker:
    """Divides what is before a save from what is after it, on every link that it travels on (Chandy and Lamport).

    The global server sends it to the local servers, these send it back, and to their workers. Whoever gets it first
    keeps its state as it is at that moment.

    Attributes:
        save: Which save.
        folder: Where its shards are written.
    """

    save: str
    folder: str


@dataclass
class ShardWritten:
    """Somebody tells rank 0 that its part of a save is on the disk, or that it could not be written.

    Attributes:
        save: Which save.
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
    """Somebody tells its peers that the run is to save a checkpoint and end, because its machine is taken away."""


@dataclass
class Failure:
    """Somebody tells its peers that the run cannot go on.

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
    | GlobalModel
    | Progress
    | Status
    | LeaseRequest
    | LeaseGrant
    | Marker
    | ShardWritten
    | Preempted
    | Failure
)
