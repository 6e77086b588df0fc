"""A region knows at once what its own workers did, and nothing that comes late undoes what it knows."""

from __future__ import annotations

import queue
import time
from functools import partial
from typing import Any

import torch

from lightning_halos.checkpoint.saves import Saves
from lightning_halos.core.messages import Message, Pull, Push, Status
from lightning_halos.core.schedule import RoundPlanner, StepBudget
from lightning_halos.core.servers import LocalServer
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.hosts import RegionHost
from lightning_halos.transport.link import LoopbackLink, Slot


class Region:
    """One of two regions with a worker each. The global server says what the test says."""

    def __init__(self, max_steps: int) -> None:
        server = LocalServer(0, torch.zeros(1), partial(torch.optim.SGD, lr=1.0), 100, 0.5)
        planner, budget = RoundPlanner(8, False, 2, max_steps), StepBudget(2, max_steps)
        host = RegionHost(server, planner, 1, budget, Slot(1, torch.float32), Alarm("here"), False, None, Saves())
        (models, _), (control, self.control), (worker, self.worker) = (LoopbackLink.pair("a", "b") for _ in range(3))
        self.pulls: queue.SimpleQueue[Message] = queue.SimpleQueue()
        host.connect(models, control)
        host.attach(0, worker)
        self.worker.start(lambda message, *_: self.pulls.put(message), self.fail)

    def push(self, steps: int) -> Pull:
        self.worker.post(Push(0, 0, steps, steps, 1.0))
        pull = self.pulls.get(timeout=10)
        assert isinstance(pull, Pull)
        return pull

    def hear(self, status: Status) -> Pull:
        """Sends a status, waits until it has arrived, and returns what the worker is told then."""
        mark = time.monotonic()
        status.metrics["mark"] = mark
        self.control.post(status)
        deadline = time.monotonic() + 10
        while (pull := self.push(0)).metrics.get("mark") != mark:
            assert time.monotonic() < deadline
        return pull

    def fail(self, error: Any) -> None:
        raise error


def test_own_steps_count_before_the_global_server_confirms_them() -> None:
    region = Region(max_steps=10)
    assert (pull := region.push(8)).position == 4
    assert pull.local_steps == 6, "towards the end rounds get shorter"
    assert not pull.stop
    assert region.push(12).stop


def test_steps_of_others_come_with_the_status_and_own_ones_are_not_counted_twice() -> None:
    region = Region(max_steps=10)
    region.push(8)
    assert region.hear(Status(total=4, fastest=1.0, stop=False, counted=0)).position == 6
    assert region.hear(Status(total=12, fastest=1.0, stop=False, counted=8)).position == 6
    assert region.push(8).stop


def test_an_older_status_does_not_undo_the_stop() -> None:
    region = Region(max_steps=10)
    assert region.hear(Status(total=4, fastest=1.0, stop=True)).stop
    assert region.hear(Status(total=2, fastest=1.0, stop=False)).stop


def test_a_workers_wish_to_stop_holds_in_its_region_at_once() -> None:
    region = Region(max_steps=10)
    region.worker.post(Push(0, 0, 1, 1, 1.0, stop=True))
    pull = region.pulls.get(timeout=10)
    assert isinstance(pull, Pull)
    assert pull.stop
