"""A job's membership in a star of jobs: its rank 0 dials the global server and joins, and tells the other workers.

It is made when an entry point of the Trainer starts a fit, and outlives that fit's objects, which need what it knows.
What happens on the connection during training is in ``worlds/member``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import secrets
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_halos.core.algorithms import ServerAlgorithm
from lightning_halos.core.compat import bytes_of, dense_parts
from lightning_halos.core.joining import Joining
from lightning_halos.core.layout import Layout
from lightning_halos.core.messages import (
    Decide,
    Enrol,
    Enrolled,
    GlobalModel,
    Message,
    ModelCopy,
    RunDescription,
    Status,
    Welcome,
)
from lightning_halos.core.sharding import complete
from lightning_halos.core.snapshot import Shard
from lightning_halos.core.vector import ModelVector
from lightning_halos.training.compat import AVERAGING_CALLBACKS, epochs_of_training
from lightning_halos.training.server_settings import ServerSettings, numbers_of_global_optimizer
from lightning_halos.training.shared_data import SharedData
from lightning_halos.training.trainer_adapter import callbacks_of
from lightning_halos.transport import wire
from lightning_halos.transport.errors import PeerFailedError
from lightning_halos.transport.link import progress_limit, wait_all
from lightning_halos.transport.server_connection import ServerConnection
from lightning_halos.transport.vector_parts import VectorForm

if TYPE_CHECKING:
    from lightning_halos.training.site import Site
    from lightning_halos.transport.session import Session

T = TypeVar("T")

log = logging.getLogger(__name__)

_TURN = 2.0  # seconds after which the workers are told that rank 0 still waits, so that they do not give up


@dataclass(frozen=True)
class Entry:
    """The moment of the run at which a job takes part.

    Attributes:
        total: Local steps that all workers of the run together have finished.
        epoch: The epoch of the data that is leased next.
        is_over: Whether the run ends, so that no worker may start another round.
        plateau_steps: All steps of plateau schedulers until now.
        metrics: The metrics that were published last.
    """

    total: int
    epoch: int
    is_over: bool
    plateau_steps: Sequence[tuple[int, float]]
    metrics: Mapping[str, float]


class Membership:
    """The membership. Making it enrols the job, so all its workers must do so together.

    Args:
        settings: The global server.
        site: This process's place in the job.

    Attributes:
        session: Identity of this life of the job.
        workers: Number of workers by which local steps are divided to count global steps.
        first: Number of workers of the regions that enrolled before this one.
        connection: The connection with the global server, on rank 0.
        joining: The party that has joined, on rank 0.
        node: How the job has joined, on all lanes of the first worker, with this lane's slice of the model.

    Raises:
        ServerUnreachableError: If rank 0 cannot reach the server in time.
        PeerFailedError: If the server refuses the job; on other ranks, also if rank 0 cannot reach it.
    """

    def __init__(self, settings: ServerSettings, site: Site) -> None:
        self.session = secrets.token_hex(16)
        self.connection: ServerConnection | None = None
        self.joining: JoiningParty | None = None
        self.node: Joining | None = None
        self._site = site
        self._has_told = False
        enrolling = _Enrolling(Enrol(self.session, site.size))

        def enrol() -> dict[str, int]:
            if self.connection is None:
                self.connection = _connect(settings, site)
                self.connection.serve(enrolling)
            _wait(enrolling.is_ready, self.connection, site)
            assert enrolling.answer is not None
            return {"workers": enrolling.answer.workers, "first": enrolling.answer.first}

        try:
            answer = self._on_rank_0(enrol, "for the other regions to start")
        except BaseException:  # else its threads would keep the server's place for this job
            self.close(0.0)
            raise
        self.workers: int = answer["workers"]
        self.first: int = answer["first"]

    def join(self, description: RunDescription, vector: ModelVector, memory: Tensor) -> Entry:
        """Joins the run, and gives the job's workers its model. All of them must call it together.

        Args:
            description: What all members of the run must agree on.
            vector: Converts between the module and its vector. The module gets the global model.
            memory: This lane's vector with the module's present values, which is overwritten with the global model.

        Raises:
            PeerFailedError: If the server refuses the job, because its module, data or settings differ.
        """
        site = self._site
        slices = Slices(site, vector.layout) if site.lanes > 1 and site.rank == 0 and site.carries else None
        complete = memory if slices is None else slices.gather(memory)

        def join() -> dict[str, Any]:
            assert self.connection is not None
            if self.joining is None:
                self.connection.expect_models(VectorForm.of_run(description))
                node = Joining(self.session, site.size, description, complete.clone)
                self.joining = JoiningParty(node, self.connection)
                self.connection.serve(self.joining)
            _wait(self.joining.is_ready, self.connection, site)
            node = self.joining.node
            assert node.welcome is not None
            assert node.status is not None
            assert node.copy is not None
            assert node.copy.vector is not None
            complete.copy_(node.copy.vector)
            return {
                "total": node.status.total,
                "epoch": node.welcome.epoch,
                "is_over": node.status.stop or node.final is not None,
                "plateau_steps": [list(step) for step in node.status.plateau_steps],
                "metrics": dict(node.status.metrics),
                "headers": [
                    "" if message is None else wire.encode(message).hex()
                    for message in (node.welcome, node.copy, node.status, node.final)
                ],
            }

        answer = self._on_rank_0(join, "for the other regions to join")
        if slices is not None:
            slices.scatter(complete, memory)
        if site.rank == 0 and site.carries:
            self.node = self._node_of_lane(description, answer["headers"], memory)
        if site.carries:
            site.lane_collectives.broadcast_([memory])
        vector.write(memory)
        if not vector.lossless:
            vector.read(memory)
        steps = [(int(index), float(value)) for index, value in answer["plateau_steps"]]
        return Entry(answer["total"], answer["epoch"], answer["is_over"], steps, answer["metrics"])

    def _node_of_lane(self, description: RunDescription, headers: Sequence[str], memory: Tensor) -> Joining:
        """Returns how the job has joined, with this lane's slice of the model."""
        if self._site.lanes == 1 and self.joining is not None:
            return self.joining.node
        node = Joining(self.session, self._site.size, description, memory.clone)
        messages = [wire.decode(bytes.fromhex(header), None) if header else None for header in headers]
        for message in messages:
            match message:
                case Welcome():
                    node.welcome = message
                case ModelCopy():
                    message.vector = memory.clone()
                    node.copy = message
                case Status():
                    node.status = message
                case GlobalModel():
                    message.vector = memory.clone()
                    node.final = message
        return node

    def close(self, timeout: float) -> None:
        """Says goodbye to the server."""
        if self.connection is not None:
            self.connection.close(timeout)

    def _on_rank_0(self, ask: Callable[[], dict[str, Any]], what: str) -> dict[str, Any]:
        """Returns on all ranks what ``ask`` returns on rank 0, where it may raise :class:`_WaitingError`."""
        while True:
            answer: dict[str, Any] = {}
            failure: Exception | None = None
            if self._site.process == 0:
                try:
                    answer = ask()
                except _WaitingError:
                    if not self._has_told and not (self.connection is not None and self.connection.is_refused):
                        rank_zero_info(f"This job waits {what}.")
                        self._has_told = True
                except Exception as error:
                    answer, failure = {"failure": str(error)}, error
            answer = self._site.collectives.broadcast_object(answer)
            if failure is not None:
                raise failure
            if "failure" in answer:
                raise PeerFailedError(f"{self._site.topology.describe(0)} cannot join the run: {answer['failure']}")
            if answer:
                return answer


class Slices:
    """Moves the slices of a model between the lanes of the first worker, when they are in step.

    Args:
        site: This process's place.
        layout: The slices.
    """

    def __init__(self, site: Site, layout: Layout) -> None:
        self._collectives = site.collectives_among(site.worker_processes[: site.lanes])
        self._lane = site.lane
        self._layout = layout

    def gather(self, memory: Tensor) -> Tensor:
        """Returns the complete vector on lane 0, and nothing on the others, given each lane's slice."""
        complete = memory.new_empty(self._layout.elements if self._lane == 0 else 0)
        for lane in range(self._layout.lanes):
            part = memory.clone() if lane == self._lane else memory.new_empty(self._layout.elements_of(lane))
            self._collectives.broadcast_([part], lane)
            if self._lane == 0:
                self._layout.put(complete, lane, part)
        return complete

    def scatter(self, complete: Tensor, memory: Tensor) -> None:
        """Overwrites each lane's slice with that of lane 0's complete vector."""
        for lane in range(self._layout.lanes):
            part = memory.new_empty(self._layout.elements_of(lane))
            if self._lane == 0:
                self._layout.cut(complete, lane, part)
            self._collectives.broadcast_([part], 0)
            if lane == self._lane:
                memory.copy_(part)


class _WaitingError(Exception):
    """The server has not answered yet."""


def _wait(is_ready: threading.Event, connection: ServerConnection, site: Site) -> None:
    deadline = time.monotonic() + _TURN
    while not is_ready.wait(0.2):
        site.interrupted()
        connection.check()
        if time.monotonic() > deadline:
            raise _WaitingError


class _Enrolling:
    """The party of a connection that enrols."""

    def __init__(self, message: Enrol) -> None:
        self.answer: Enrolled | None = None
        self.is_ready = threading.Event()
        self._message = message

    def connected(self) -> list[Message]:
        return [self._message]

    def disconnected(self) -> None:
        pass

    def receive(self, message: Message, progress: Iterable[int]) -> bool:
        wait_all(progress)
        if isinstance(message, Enrolled):
            self.answer = message
            self.is_ready.set()
        return True


class JoiningParty:
    """The party of a connection that joins.

    Args:
        node: Says what to send.
        connection: The connection.

    Attributes:
        node: As above.
        early: Other messages that have arrived on the present connection, for the region's server.
        is_ready: Is set when the job has joined and has the global model.
    """

    def __init__(self, node: Joining, connection: ServerConnection) -> None:
        self.node = node
        self.early: list[Message] = []
        self.is_ready = threading.Event()
        self._connection = connection
        self._lock = threading.Lock()

    def connected(self) -> list[Message]:
        with self._lock:
            self.early.clear()  # what an earlier connection has brought, such as who decides, may no longer be so
            return [self.node.join()]

    def disconnected(self) -> None:
        pass

    def receive(self, message: Message, progress: Iterable[int]) -> bool:
        wait_all(progress)
        with self._lock:
            if self.is_ready.is_set():
                return False
            if not isinstance(message, Welcome | Status | ModelCopy | GlobalModel):
                self.early.append(message)
                return True
            if isinstance(message, Status) and not message.decides:
                self.early = [earlier for earlier in self.early if not isinstance(earlier, Decide)]
            for send in self.node.handle(message):
                sent = send.complete()
                assert not isinstance(sent, Shard)
                self._connection.post(sent)
            if (final := self.node.final) is not None and self.node.welcome is not None and not self.node.is_ready:
                # The run is over, so the server says goodbye and answers no request.
                assert final.vector is not None
                self.node.handle(ModelCopy(final.version, 0, 1, final.vector.clone()))
            if self.node.is_ready:
                self._connection.serve(None)
                if final is not None:
                    self._connection.say_goodbye()
                self.is_ready.set()
        return True


def _connect(settings: ServerSettings, site: Site) -> ServerConnection:
    """Dials the global server, for at most the time limit of this job."""
    from lightning_halos.transport.dialer import dial  # here, because only such jobs need cryptography

    def dial_for(limit: float, interrupted: Callable[[], None]) -> Session:
        return dial(settings.address, settings.keys, settings.streams, limit, interrupted, tell=log.warning)

    connection = ServerConnection(settings.server, dial_for, progress_limit(site.timeout))
    name = settings.read_keys().certificate.name
    rank_zero_info(f"This job is the region {name} of the run of {settings.server}.")
    connection.open(site.timeout, site.interrupted)
    return connection


def describe_run(
    trainer: pl.Trainer, algorithm: ServerAlgorithm, vector: ModelVector, data: SharedData | None
) -> RunDescription:
    """Returns what all members of the run must agree on."""
    module = trainer.lightning_module
    settings: dict[str, float | int | bool | str | None] = {}
    for field in dataclasses.fields(algorithm):
        value = getattr(algorithm, field.name)
        if value is None or isinstance(value, bool | int | float | str):
            settings[field.name] = value
    frozen = {entry.path for entry in vector.entries if entry.is_parameter and entry.rule == "first"}
    constants = {name: p for name, p in module.named_parameters() if name in frozen}
    names, buffers = vector.names(module)
    return RunDescription(
        model=json.dumps({**vector.identity, "checksum of frozen parameters": _checksum(constants)}, sort_keys=True),
        dtype=str(vector.dtype).removeprefix("torch."),
        names=names,
        shapes=[list(shape) for shape in vector.complete_shapes],
        buffers=buffers,
        algorithm=algorithm.title,
        settings=settings,
        global_optimizer=numbers_of_global_optimizer(algorithm),
        data=None if data is None else json.dumps(data.identity, sort_keys=True),
        steps_per_epoch=0 if data is None else data.steps_per_epoch,
        epochs=epochs_of_training(trainer),
        max_steps=None if trainer.max_steps == -1 else trainer.max_steps,
        wire=algorithm.wire.between,
        teachers=vector.identity.get("teachers", 0),
    )


def _checksum(tensors: Mapping[str, Any]) -> int:
    """Returns a checksum of frozen parameters, which are not sent, so that all jobs must have the same."""
    checksum = 0
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(name.encode(), checksum)
        # Other jobs may divide their modules in other ways, or not at all.
        for part in dense_parts(complete(tensor)):
            checksum = zlib.crc32(bytes_of(part).numpy().data, checksum)
    return checksum


def refuse_averages(trainer: pl.Trainer) -> None:
    """Refuses callbacks that average the weights of the global model over time, in the memory of one process.

    Raises:
        ValueError: If there are any.
    """
    names = [type(callback).__name__ for callback in callbacks_of(trainer) if isinstance(callback, AVERAGING_CALLBACKS)]
    if names:
        raise ValueError(
            f"{names[0]} keeps an average in one process, which would be lost when another job decides, and which no"
            " other job would have. In a job that is one region of a run (server=..., or HALOS_SERVER), leave it out:"
            " average the checkpoints of the run afterwards, or train in one job."
        )


def without_progress(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Returns the contents of a checkpoint from which a job only takes the weights, because the server has the run."""
    rank_zero_info(
        "ckpt_path in a job that is one region of a run: only its weights are used, and only if the run is new and this"
        " job is the first to join. Otherwise the job continues with the model and progress of the global server."
    )
    kept = {key: value for key, value in checkpoint.items() if key not in ("loops", "callbacks")}
    return {**kept, "optimizer_states": [], "lr_schedulers": [], "callbacks": {}}
