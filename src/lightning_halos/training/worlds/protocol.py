"""What a fit needs of the world that its worker trains in: real links, a virtual clock, or lock-step rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor

from lightning_halos.core.cursor import Lease
from lightning_halos.core.messages import GlobalModel, Marker, Pull, Push, ShardWritten
from lightning_halos.core.vector import Reach
from lightning_halos.core.worker import WorkerRound
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.link import Filled


class Client(Protocol):
    """The worker's end; see :class:`~lightning_halos.transport.client.WorkerClient`."""

    def exchange(self, push: Push, fill: Callable[[Reach], object]) -> tuple[Pull, Filled]:
        """Gives the worker's push, and waits for the answer."""

    def finish(self, push: Push, fill: Callable[[Reach], object]) -> tuple[GlobalModel, Filled]:
        """Gives the worker's last push, and waits for the final model."""


class Keeper(Protocol):
    """What checkpoints need of a world whose servers they keep."""

    def on_marker(self, keep: Callable[[Marker, Push], None]) -> None:
        """Sets what copies this worker's state: given the marker of a save, and the worker's unanswered push."""

    def tell(self, message: ShardWritten) -> None:
        """Tells rank 0 that a shard of this process is written."""

    def save(self, marker: Marker) -> object:
        """Keeps the state of all servers and workers as it is now; they write it in the background. On rank 0."""

    def settle(self, model: Tensor) -> None:
        """Lets this process's servers take the final model, when the run is over."""

    def state(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """What a later run goes on from, when this one is over and settled.

        Returns:
            The state of this process's local server, and of the global server; ``None`` for what it does not host.
        """

    def progress(self) -> dict[str, Any]:
        """How far the run is: fields of a checkpoint's manifest. On rank 0."""


class World(Protocol):
    """What a worker trains in during one fit. It is made when all workers are in step.

    Attributes:
        alarm: Where failures go.
        client: The worker's end.
        first_round: The worker's first round, which begins without a message.
        leases: The worker's training data; nothing if the workers do not share it.
        has_global_model: Whether this process is the one that can read the global model.
        keeper: What checkpoints need; ``None`` if there are no servers to keep.
        repeats_rounds: Whether a resumed run repeats rounds exactly as they were, since they are planned ahead.
        clock: Tells the virtual time in seconds; ``None`` in real time, and on other ranks than 0.
    """

    @property
    def alarm(self) -> Alarm: ...
    @property
    def client(self) -> Client: ...
    @property
    def first_round(self) -> WorkerRound: ...
    @property
    def leases(self) -> Iterator[Lease]: ...
    @property
    def has_global_model(self) -> bool: ...
    @property
    def keeper(self) -> Keeper | None: ...
    @property
    def repeats_rounds(self) -> bool: ...
    @property
    def clock(self) -> Callable[[], float] | None: ...

    @property
    def version(self) -> int:
        """Updates that are in the global model. On rank 0."""

    @property
    def steps(self) -> int:
        """Local steps that are in the global model. On rank 0."""

    def read(self, out: Tensor) -> None:
        """Copies the global model into the vector ``out``; leaves it if only the workers have a model. On rank 0."""

    def publish(self, plateaus: Sequence[tuple[int, float]], metrics: dict[str, float]) -> None:
        """Tells all workers what the plateau schedulers of rank 0 were stepped with, and its metrics. On rank 0."""

    def statistics(self) -> list[dict[str, Any]]:
        """Returns the counters of each local server; see :class:`~lightning_halos.HalosMonitor`. On rank 0."""

    def close(self, timeout: float) -> None:
        """Says goodbye to all peers, and waits for theirs.

        Args:
            timeout: Seconds to wait at most.
        """
