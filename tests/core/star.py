"""A star of jobs in one thread, for tests: the real nodes, and connections that deliver at once or not at all."""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from functools import partial
from typing import Any

import torch

from lightning_halos.core.cursor import LeaseStock
from lightning_halos.core.founding import Founding
from lightning_halos.core.joining import Joining
from lightning_halos.core.local_server import LocalServer
from lightning_halos.core.messages import (
    GlobalModel,
    LeaseGrant,
    LeaseRequest,
    Message,
    Pull,
    Push,
    Refusal,
    RunDescription,
)
from lightning_halos.core.open_global_node import OpenGlobalNode
from lightning_halos.core.open_region_node import OpenRegionNode
from lightning_halos.core.protocol import GLOBAL, STORAGE, Send
from lightning_halos.core.schedule import RoundPlanner, StepBudget
from lightning_halos.core.snapshot import Shard

SGD = partial(torch.optim.SGD, lr=1.0, foreach=False)
DESCRIPTION = RunDescription(
    model="two numbers",
    dtype="float32",
    names=["weight"],
    shapes=[[2]],
    buffers=[],
    algorithm="HALoS",
    settings={"local_steps": 4, "has_momentum": True},
    global_optimizer={"lr": 1.0, "momentum": 0.0, "delay": 1, "activation": 0.0},
)
SHARED = dataclasses.replace(DESCRIPTION, data="numbers", steps_per_epoch=40, epochs=1)


class Job:
    """A region's job: one process with all its workers, which do only what the test says."""

    def __init__(self, star: Star, name: str, session: str, workers: int, description: RunDescription) -> None:
        self.name = name
        self.star = star
        self.workers = workers
        self.joining = Joining(session, workers, description, lambda: torch.zeros(2))
        self.node: OpenRegionNode | None = None
        self.is_connected = False
        self.refusal: Refusal | None = None
        self.got: dict[int, list[Message]] = {rank: [] for rank in range(workers)}
        self.numbers = dict.fromkeys(range(workers), 0)
        self.up: deque[Message] = deque()
        self.sent: list[Message] = []

    @property
    def index(self) -> int:
        return self.star.top.index_of(self.name)

    def connect(self) -> None:
        self.is_connected = True
        self.up.clear()
        self.post([Send(GLOBAL, (self.node or self.joining).join())])
        self.star.pump()

    def cut(self) -> None:
        """Loses the connection; both sides notice it."""
        self.is_connected = False
        if self.node is not None:
            self.node.disconnected()
        self.star.post(self.star.top.disconnected(self.index))
        self.star.pump()

    def die(self) -> None:
        """Ends the process, and the server gives it up."""
        self.is_connected, self.node = False, None
        self.star.post(self.star.top.lose(self.index))
        self.star.pump()

    def post(self, sends: list[Send]) -> None:
        for send in sends:
            message = send.complete()
            if send.to != GLOBAL:
                self.got[send.to].append(message)
            elif self.is_connected:
                self.sent.append(copy.deepcopy(message))  # the server overwrites the vector
                self.up.append(message)

    def receive(self, message: Message) -> None:
        if isinstance(message, Refusal):
            self.refusal = message
            self.is_connected = False
            if self.node is not None:
                self.node.disconnected()
        elif self.node is not None:
            self.post(self.node.handle(GLOBAL, message))
        else:
            self.post(self.joining.handle(message))
            if self.joining.is_ready:
                self._start()

    def _start(self) -> None:
        joining = self.joining
        description, welcome, copy = joining.description, joining.welcome, joining.copy
        server = LocalServer(0, copy.vector.clone(), SGD, 2, 0.5, workers=self.workers)
        planner = RoundPlanner(4, False, welcome.workers, description.max_steps)
        budget = StepBudget(welcome.workers, description.max_steps, welcome.status.total)
        stock = None if description.data is None else LeaseStock(4)
        formats = {GLOBAL: description.wire}
        self.node = OpenRegionNode(server, planner, range(self.workers), budget, stock, joining, formats)
        self.post(self.node.start())

    def push(
        self, rank: int = 0, steps: int = 4, pump: bool = True, seconds: float = 1.0, **fields: Any
    ) -> Pull | None:
        """A worker pushes a round; returns the answer."""
        self.numbers[rank] += 1
        vector = torch.ones(2) if steps else None
        version = self.node.version
        push = Push(rank, version, steps, steps, seconds, vector=vector, number=self.numbers[rank], **fields)
        self.post(self.node.handle(rank, push))
        if pump:
            self.star.pump()
        answer = self.got[rank][-1] if self.got[rank] else None
        return answer if isinstance(answer, Pull) else None

    def ask(self, rank: int = 0) -> LeaseGrant | None:
        """A worker asks for data; returns the answer if there is one."""
        number = sum(isinstance(message, LeaseGrant) for message in self.got[rank]) + 1
        self.post(self.node.handle(rank, LeaseRequest(4, number)))
        self.star.pump()
        return self.lease(rank, number)

    def lease(self, rank: int, number: int) -> LeaseGrant | None:
        grants = [m for m in self.got[rank] if isinstance(m, LeaseGrant) and m.number == number]
        return grants[-1] if grants else None

    def final(self, rank: int = 0) -> GlobalModel | None:
        found = [message for message in self.got[rank] if isinstance(message, GlobalModel)]
        return found[-1] if found else None


class Star:
    """A global server and jobs. Messages arrive at once, unless the connection is cut."""

    def __init__(
        self,
        min_regions: int = 1,
        workers: int | None = None,
        decider: str | None = None,
        patience: float = 600.0,
        run: str = "a run",
    ) -> None:
        self.top: Founding | OpenGlobalNode = Founding(run, min_regions, workers, decider, patience)
        self.jobs: dict[str, Job] = {}
        self.saves = True  # whether a snapshot is on disk after every message
        self.disk: dict[str, Any] | None = None
        self.decider = decider
        self._lives = 0

    @property
    def node(self) -> OpenGlobalNode:
        assert isinstance(self.top, OpenGlobalNode)
        return self.top

    def job(self, name: str, workers: int = 1, description: RunDescription = DESCRIPTION) -> Job:
        """A new process of a region, which joins."""
        self._lives += 1
        job = self.jobs[name] = Job(self, name, f"{name} {self._lives}", workers, description)
        job.connect()
        return job

    def post(self, sends: list[Send]) -> None:
        for send in sends:
            message = send.complete()
            if isinstance(message, Shard):
                assert send.to == STORAGE
                self.disk = message.state
                self.post(self.node.saved(message.marker.save))
                continue
            job = next(job for job in self.jobs.values() if job.index == send.to)
            if job.is_connected:
                job.receive(message)

    def save(self) -> None:
        self.post(self.node.begin_snapshot())

    def pump(self) -> None:
        """Delivers all messages."""
        while waiting := [job for job in self.jobs.values() if job.up]:
            job = waiting[0]
            self.post(self.top.handle(job.index, job.up.popleft()))
            if isinstance(self.top, Founding) and self.top.node is not None:
                self.top = self.top.node
                self.post(self.top.start())
            if self.saves and isinstance(self.top, OpenGlobalNode):
                self.save()

    def tick(self, now: float) -> None:
        """Tells the global server the time."""
        self.post(self.top.tick(now))
        self.pump()

    def restart(self, state: dict[str, Any] | None = None) -> None:
        """Ends the global server and starts it again from the disk. All connections are lost."""
        for job in self.jobs.values():
            job.is_connected = False
            job.up.clear()
            if job.node is not None:
                job.node.disconnected()
        self.top = OpenGlobalNode.restored(self.disk if state is None else state, self.decider)

    def check(self) -> None:
        """Steps are conserved: what counts is in the global model, or in a report whose update is still to come."""
        status = self.node.status()
        unsent = sum(member["unsent"] for member in status["members"].values())
        assert status["run"]["total"] == status["run"]["applied"] + unsent
