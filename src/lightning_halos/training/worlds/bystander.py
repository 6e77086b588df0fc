"""The world of a process that carries no slice of the model, because its worker has more processes than lanes.

It has no servers and no links: lane 0's process, which is in step with it, passes on what its own client receives. Only
headers are passed on; the model's vector completes the module inside the worker.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor

from lightning_halos.core.cursor import Lease
from lightning_halos.core.messages import GlobalModel, Marker, Pull, Push, ShardWritten
from lightning_halos.core.vector import Fill, ignore_progress
from lightning_halos.core.worker import WorkerRound
from lightning_halos.training.start import Start
from lightning_halos.training.worlds.lockstep import LockstepWorld
from lightning_halos.training.worlds.member import MemberWorld
from lightning_halos.training.worlds.protocol import CheckpointedWorld, Client, World
from lightning_halos.training.worlds.real import RealWorld
from lightning_halos.training.worlds.simulated import SimulatedWorld
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.collectives import Collectives

A = TypeVar("A", Pull, GlobalModel)


class BystanderWorld(World):
    """A process that trains, and gets lane 0's answers. It is its own client, too.

    Args:
        start: The state from which the fit starts.
        is_simulated: Whether the other processes' world is simulated.
    """

    version = 0
    answer: Pull | None = None  # lane 0's client has it

    def __init__(self, start: Start, is_simulated: bool) -> None:
        self.is_simulated = is_simulated
        self.alarm = Alarm(start.site.here)
        self._rank = start.site.rank
        self._nothing = start.memory
        if start.resume is not None and start.memory is not None and not is_simulated:
            start.put_in(start.memory)  # the lanes have the model to resume from
        self._collectives = start.site.worker_collectives
        self.first_round = WorkerRound(start.site.rank, 1)
        self.first_round.load_state_dict(self._collectives.broadcast_object(None))
        self.leases = self._told_leases()
        self.client = self

    @property
    def has_global_model(self) -> bool:
        return self._rank == 0

    @property
    def checkpointed(self) -> CheckpointedWorld:
        return self

    def exchange(self, push: Push, fill: Fill) -> tuple[Pull, Iterable[int]]:
        return self._answer(Pull, push, fill)

    def send(self, push: Push, fill: Fill) -> None:
        if push.vector is not None:
            fill(ignore_progress)  # it has collectives, in which all processes of the worker take part

    def has_answer(self, batches: int) -> bool:
        return True  # the others of the worker know it

    def take(self) -> Pull:
        return self._told(Pull)

    def finish(self, push: Push, fill: Fill) -> tuple[GlobalModel, Iterable[int]]:
        return self._answer(GlobalModel, push, fill)

    def read(self, out: Tensor) -> None:
        pass

    def publish(self, plateau_steps: Sequence[tuple[int, float]], metrics: dict[str, float], callbacks: str) -> None:
        pass

    def on_marker(self, save: Callable[[Marker, Push], None]) -> None:
        pass

    def tell(self, message: ShardWritten) -> None:
        pass

    def start_snapshot(self, marker: Marker) -> None:
        pass

    def adopt_final_model(self, model: Tensor) -> None:
        pass

    def state(self) -> tuple[None, None]:
        return None, None

    def progress(self) -> dict[str, Any]:
        return {}

    def _answer(self, kind: type[A], push: Push, fill: Fill) -> tuple[A, Iterable[int]]:
        self.send(push, fill)
        return self._told(kind), ()

    def _told(self, kind: type[A]) -> A:
        return kind(**self._collectives.broadcast_object(None), vector=self._nothing)

    def _told_leases(self) -> Iterator[Lease]:
        while told := self._collectives.broadcast_object(None):
            yield Lease(*told)


def tell_bystanders(world: RealWorld | MemberWorld | LockstepWorld | SimulatedWorld, collectives: Collectives) -> None:
    """Passes on what a world receives to the other processes of the worker, on lane 0.

    Args:
        world: The world of lane 0.
        collectives: Collectives over the worker's processes.
    """
    world.client = _TellingClient(world.client, collectives)
    world.leases = _told(world.leases, collectives)
    collectives.broadcast_object(world.first_round.state_dict())


def _told(leases: Iterator[Lease], collectives: Collectives) -> Iterator[Lease]:
    for lease in leases:
        collectives.broadcast_object(dataclasses.astuple(lease))
        yield lease
    collectives.broadcast_object(())


class _TellingClient:
    def __init__(self, client: Client, collectives: Collectives) -> None:
        self._client = client
        self._collectives = collectives

    @property
    def answer(self) -> Pull | None:
        return self._client.answer

    @answer.setter
    def answer(self, answer: Pull | None) -> None:
        self._client.answer = answer

    def exchange(self, push: Push, fill: Fill) -> tuple[Pull, Iterable[int]]:
        pull, progress = self._client.exchange(push, fill)
        return self._tell(pull), progress

    def send(self, push: Push, fill: Fill) -> None:
        self._client.send(push, fill)

    def has_answer(self, batches: int) -> bool:
        return self._client.has_answer(batches)

    def take(self) -> Pull:
        return self._tell(self._client.take())

    def finish(self, push: Push, fill: Fill) -> tuple[GlobalModel, Iterable[int]]:
        final, progress = self._client.finish(push, fill)
        return self._tell(final), progress

    def _tell(self, message: A) -> A:
        fields = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
        del fields["vector"]
        self._collectives.broadcast_object(fields)
        return message
