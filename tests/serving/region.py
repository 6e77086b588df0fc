"""A region's job as the server sees it: a script that speaks the protocol over TLS, without Lightning and training.

Its update is always the same vector, so that the global model says how many updates it has.
"""

from __future__ import annotations

import queue
import time
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lightning_halos.core.messages import (
    GlobalModel,
    InitialModel,
    Join,
    LeaseGrant,
    LeaseRequest,
    Message,
    Progress,
    RegionUpdate,
    RunDescription,
    Status,
    Welcome,
)
from lightning_halos.core.protocol import uses_models_link
from lightning_halos.transport.address import Address
from lightning_halos.transport.dialer import dial
from lightning_halos.transport.errors import PeerLostError
from lightning_halos.transport.session import Session

M = TypeVar("M")

LIMIT = 20.0
"""Seconds that a region waits for anything."""

STEPS = 4
"""Local steps of a round."""

DESCRIPTION = RunDescription(
    model="toy",
    dtype="float32",
    names=["layer.weight", "layer.bias"],
    shapes=[[3, 4], [4]],
    buffers=[("mean", [2])],
    algorithm="HALoS",
    settings={"local_steps": STEPS, "has_momentum": True},
    global_optimizer={"lr": 1.0, "momentum": 0.0, "delay": 1, "activation": 0.0},
    data="numbers",
    steps_per_epoch=1000,
    epochs=1,
    max_steps=40,
)
ELEMENTS = 18


class Region:
    """A member.

    Args:
        port: The server's port on this machine.
        keys: The region's keys.
        workers: Number of its workers.
        description: What it believes the run is.
    """

    def __init__(self, port: int, keys: Path, workers: int = 1, description: RunDescription = DESCRIPTION) -> None:
        self.process = uuid.uuid4().hex
        self.port = port
        self.failure: Exception | None = None
        self.model = torch.zeros(ELEMENTS)
        self.index = -1
        self.run = ""
        self.updates: deque[tuple[list[Progress], RegionUpdate]] = deque()  # that no snapshot has
        self.saved = self._saved_report = self.rounds = 0
        self.is_stopped = False
        self.falter: Callable[[], None] = lambda: None  # called in the middle of a round; may raise a PeerLostError
        self._keys = keys
        self._workers = workers
        self._description = description
        self._number = self._report = self._lease = 0

    def connect(self, port: int | None = None) -> None:
        """Dials the server, until it is there."""
        self.port = port or self.port
        self.failure = None
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._kept: list[Message] = []
        self.dial()
        self._models = self.session.models((ELEMENTS, torch.float32))
        for link in (self.session.control, self._models):
            link.start(self._on_message, self._on_failure)

    def dial(self) -> None:
        """Opens a connection, on which nothing is sent or read yet."""
        self.session: Session = dial(Address("127.0.0.1", self.port), self._keys, streams=2, timeout=LIMIT)

    def post(self, message: Message) -> None:
        (self._models if uses_models_link(message) else self.session.control).post(message)

    def expect(self, kind: type[M]) -> M:
        """Returns the next message of a kind. Other messages are kept.

        Raises:
            PeerLostError: If the connection is lost before.
        """
        for index, message in enumerate(self._kept):
            if isinstance(message, kind):
                del self._kept[index]
                return message
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            failure = self.failure
            try:
                message = self._inbox.get(timeout=0.05)
            except queue.Empty:
                if failure is not None:
                    raise PeerLostError(str(failure)) from None
                continue
            if isinstance(message, kind):
                return message
            self._kept.append(message)
        raise AssertionError(f"no {kind.__name__} came, but {self._kept}")

    def join(self) -> None:
        """Asks to join, with all that this process holds."""
        held = [span for reports, _ in self.updates for report in reports for span in report.data]
        numbers = self.saved, self._saved_report
        self.post(Join(self.process, self._workers, self._description, held, *numbers, run=self.run))

    def enter(self, port: int | None = None) -> Welcome:
        """Joins the run, or returns to it, and founds it if asked to."""
        self.connect(port)
        self.join()
        return self.settle()

    def settle(self) -> Welcome:
        welcome = self.expect(Welcome)
        if welcome.needs_model:
            self.post(InitialModel(self.model.clone()))
            welcome = self.expect(Welcome)
        self.index, self.run = welcome.member, welcome.run
        return welcome

    def lease(self) -> LeaseGrant:
        self._lease += 1
        self.post(LeaseRequest(STEPS, self._lease))
        return self.expect(LeaseGrant)

    def work(self) -> None:
        """Trains one round on leased data, and sends it as an update. Does not wait for the answer."""
        grant = self.lease()
        assert grant.steps
        self.falter()
        self._report += 1
        self.rounds += 1
        data = [(grant.first, grant.first + grant.steps)]
        report = Progress(self.index, self._report, 0, grant.steps, 0.1, 0.0, 40.0, 0, data=data)
        self._update(-torch.ones(ELEMENTS), grant.steps, [report])

    def flush(self, leave: bool = False, stop: bool = False) -> None:
        """Sends the last update, with nothing in it."""
        self._update(torch.zeros(ELEMENTS), 0, [], final=True, leave=leave, stop=stop)

    def _update(self, vector: Tensor, steps: int, reports: list[Progress], **more: bool) -> None:
        self._number += 1
        for report in reports:
            report.update = self._number
        update = RegionUpdate(self.index, 0, steps, vector=vector, number=self._number, reports=self._report, **more)
        self.updates.append((reports, update))
        self.send(*reports, update)

    def work_blindly(self) -> None:
        """Reports something."""
        self.post(Progress(self.index, 1, 0, 0, 0.1, 0.0, 1.0, update=1))

    def repeat(self, welcome: Welcome) -> None:
        """Repeats what the server does not have, and waits for the answers."""
        for reports, update in list(self.updates):
            if update.number > welcome.received:
                self.send(*reports, update)
                if not update.final:
                    self.answer()

    def train(self) -> GlobalModel:
        """Works until the run is over, whatever happens to the server meanwhile. Returns the final model."""
        is_flushed = False
        while True:
            try:
                self.connect()
                self.join()
                self.repeat(self.settle())
                while not self.is_stopped and not is_flushed:
                    self.work()
                    self.falter()
                    self.answer()
                if not is_flushed:
                    is_flushed = True
                    self.flush()
                final = self.final()
                self.goodbye()
                return final
            except PeerLostError:
                self.cut()

    def send(self, *messages: Message) -> None:
        """Posts messages as they are; their vectors stay."""
        for message in messages:
            self.post(message)

    def answer(self) -> Tensor:
        """Waits for the answer to an update."""
        model = self.expect(GlobalModel)
        assert model.vector is not None
        self.model = model.vector
        return self.model

    def expect_nothing(self) -> None:
        """Checks that no model has come yet."""
        assert not any(isinstance(message, GlobalModel) for message in self._kept)
        with suppress(queue.Empty):
            while True:
                assert not isinstance(self._inbox.get(timeout=0.1), GlobalModel)

    def final(self) -> GlobalModel:
        """Waits for the final model."""
        while not (model := self.expect(GlobalModel)).final:
            pass
        return model

    def goodbye(self) -> None:
        self.session.close(LIMIT)

    def fall_silent(self) -> None:
        """Sends nothing more, not even signs of life, as a machine without power."""
        for link in (self.session.control, self._models):
            link._send_frame = lambda *_, **__: None  # type: ignore[method-assign]

    def cut(self) -> None:
        """Loses the connection."""
        self.session.abort()

    def _on_message(self, message: Message, progress: object) -> None:
        for _ in progress:  # type: ignore[attr-defined]
            pass
        if isinstance(message, Status):
            self._on_status(message)
        elif isinstance(message, Welcome):
            self._on_status(message.status)
        if not isinstance(message, Status):
            self._inbox.put(message)

    def _on_status(self, status: Status) -> None:
        self.is_stopped = status.stop
        self.saved = max(self.saved, status.saved)
        while self.updates and self.updates[0][1].number <= self.saved:
            reports, _ = self.updates.popleft()
            self._saved_report = max([self._saved_report, *(report.number for report in reports)])

    def _on_failure(self, error: Exception) -> None:
        self.failure = error
