"""What one process of a simulation runs besides its training: a link to the world, which is on rank 0.

Rules of this room: it offers what :class:`~lightning_halos.transport.process.Process` offers, so that nobody who trains
knows in which world he does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lightning_halos.simulation.world import World
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.client import WorkerClient
from lightning_halos.transport.groups import Groups
from lightning_halos.transport.link import GlooLink, Link, LoopbackLink

_WORLD = "the simulated world of rank 0"


class SimulatedProcess:
    """The links of one process of a simulation, during one fit.

    Args:
        rank: Global rank of this process.
        workers: Number of workers.
        groups: Process groups whose ``region`` is all workers.
        make_world: Makes the world, on rank 0.
        timeout: Seconds of silence after which a peer counts as lost.
        interrupted: Called several times a second while the worker waits; may raise.

    Attributes:
        alarm: Where failures go.
        client: The worker's end of its link.
        world: The world; ``None`` on all ranks but 0.
    """

    def __init__(
        self,
        rank: int,
        workers: int,
        groups: Groups,
        make_world: Callable[[Alarm], World],
        timeout: float,
        interrupted: Callable[[], None],
    ) -> None:
        self.alarm = Alarm(f"rank {rank}")
        self.world: World | None = None
        link: Link
        if rank == 0:
            self.world = make_world(self.alarm)
            link, its = LoopbackLink.pair(_WORLD, "rank 0")
            self.alarm.links += [link, its]
            self.world.attach(0, its)
            for other in range(1, workers):
                assert groups.region is not None
                far = GlooLink(groups.region, other, f"rank {other}", timeout)
                self.alarm.links.append(far)
                self.world.attach(other, far)
        else:
            assert groups.region is not None
            link = GlooLink(groups.region, 0, _WORLD, timeout)
            self.alarm.links.append(link)
        self.client = WorkerClient(link, self.alarm, timeout, interrupted)
        self.alarm.watch(timeout)
        if self.world is not None:
            self.world.start()

    @property
    def has_global_model(self) -> bool:
        """Whether this process is the one that can read the global model."""
        return self.world is not None

    @property
    def version(self) -> int:
        """Updates that are in the global model."""
        assert self.world is not None
        return self.world.version

    @property
    def steps(self) -> int:
        """Local steps that are in the global model."""
        assert self.world is not None
        return self.world.steps

    def read(self, out: Tensor) -> None:
        """Copies the global model into the vector ``out``."""
        assert self.world is not None
        self.world.read(out)

    def publish(self, plateaus: Sequence[tuple[int, float]], metrics: dict[str, float]) -> None:
        """Tells everybody what the plateau schedulers of rank 0 were stepped with, and its metrics."""
        assert self.world is not None
        self.world.publish(plateaus, metrics)

    def statistics(self) -> list[dict[str, Any]]:
        """The counters of each local server; see :class:`~lightning_halos.HalosMonitor`."""
        assert self.world is not None
        return self.world.statistics()

    def close(self, timeout: float) -> None:
        """Says goodbye to all peers and waits for theirs, for so many seconds at most."""
        self.alarm.close(timeout)
