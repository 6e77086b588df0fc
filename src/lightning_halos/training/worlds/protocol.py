"""The interface between a fit and the world that its worker trains in: real, synchronous or simulated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor

from lightning_halos.core.cursor import Lease
from lightning_halos.core.messages import GlobalModel, Marker, Pull, Push, ShardWritten
from lightning_halos.core.quantization import Format
from lightning_halos.core.vector import Fill
from lightning_halos.core.worker import WorkerRound
from lightning_halos.transport.alarm import Alarm


class Client(Protocol):
    """The worker's end; see :class:`~lightning_halos.transport.client.WorkerClient`.

    Attributes:
        answer: In a simulation, the complete answer to the push of :meth:`send`, until :meth:`take` returns it at its
            virtual time. A checkpoint saves and restores it. Otherwise ``None``.
    """

    answer: Pull | None

    def exchange(self, push: Push, fill: Fill) -> tuple[Pull, Iterable[int]]:
        """Sends the worker's push, and waits for the answer."""

    def send(self, push: Push, fill: Fill) -> None:
        """Sends the worker's push, and does not wait for the answer."""

    def has_answer(self, batches: int) -> bool:
        """Returns whether :meth:`take` would not wait, given the batches since the push of :meth:`send`."""

    def take(self) -> Pull:
        """Waits for the complete answer to the push of :meth:`send`, and returns it."""

    def finish(self, push: Push, fill: Fill) -> tuple[GlobalModel, Iterable[int]]:
        """Sends the worker's last push, and waits for the final model."""


class CheckpointedWorld(Protocol):
    """The interface between checkpoints and a world whose servers they contain."""

    def on_marker(self, save: Callable[[Marker, Push], None]) -> None:
        """Sets the function that saves this worker's state, given a marker and the worker's unanswered push."""

    def tell(self, message: ShardWritten) -> None:
        """Tells rank 0 that a shard of this process has been written."""

    def start_snapshot(self, marker: Marker) -> object:
        """Starts a snapshot of all servers and workers, which they write in the background. On rank 0."""

    def adopt_final_model(self, model: Tensor) -> None:
        """Replaces the models of this process's local servers by the final model, when the run is over."""

    def state(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Returns the states of this process's local server and of the global server, after the end of the run.

        ``None`` for those that it does not host.
        """

    def progress(self) -> dict[str, Any]:
        """Returns the progress of the run, as fields of a checkpoint's manifest. On rank 0."""


class World(ABC):
    """The world that a worker trains in during one fit. It is made when all workers are in step.

    Attributes:
        alarm: The alarm to report failures to.
        client: The worker's end.
        first_round: The worker's first round, which starts without a message.
        leases: Leases of the worker's training data; empty if the workers do not share data.
        wire: The format of vectors on this worker's link.
        is_simulated: Whether the world is simulated. Then rounds are planned, and a resumed run repeats them exactly.
    """

    alarm: Alarm
    client: Client
    first_round: WorkerRound
    leases: Iterator[Lease]
    wire: Format = "float32"
    is_simulated = False

    @property
    @abstractmethod
    def has_global_model(self) -> bool:
        """Whether this process can read the global model."""

    @property
    def decides(self) -> bool:
        """Whether this process validates and saves for the run, and decides when it stops early.

        In a region job that may change during a fit.
        """
        return self.has_global_model

    @property
    def callbacks(self) -> str:
        """The state of the callbacks of the process that decided before this one, as text; empty without one."""
        return ""

    @property
    def checkpointed(self) -> CheckpointedWorld | None:
        """The interface for checkpoints; ``None`` without servers."""
        return None

    @property
    def clock(self) -> Callable[[], float] | None:
        """Returns the virtual time in seconds; ``None`` in real runs, and on ranks other than 0."""
        return None

    @property
    @abstractmethod
    def version(self) -> int:
        """Number of updates in the global model. On rank 0."""

    @property
    def steps(self) -> int:
        """Local steps of this run in the global model. On rank 0."""
        return 0

    @abstractmethod
    def read(self, out: Tensor) -> None:
        """Copies the global model into ``out``, unless only the workers have a model. On rank 0."""

    @abstractmethod
    def publish(self, plateau_steps: Sequence[tuple[int, float]], metrics: dict[str, float], callbacks: str) -> None:
        """Sends what this process has decided to all workers, if it decides.

        Args:
            plateau_steps: New steps of its plateau schedulers.
            metrics: Its metrics.
            callbacks: State of its callbacks, which only a region job sends, to the job that decides next.
        """

    @property
    def rejected(self) -> int:
        """Number of updates that the servers have rejected, as far as rank 0 knows. On rank 0."""
        return sum(server["rejected"] for server in self.statistics())

    def statistics(self) -> list[dict[str, Any]]:
        """Returns the counters of each local server; see :class:`~lightning_halos.HalosMonitor`. On rank 0."""
        return []

    def close(self, timeout: float) -> None:
        """Says goodbye to all peers, and waits for their goodbyes, at most ``timeout`` seconds."""
        self.alarm.close(timeout)
