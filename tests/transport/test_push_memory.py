"""A server's memory for pushes is bounded, and no worker waits for a slower one's link."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from queue import Empty, SimpleQueue

import pytest
import torch
from torch import Tensor

from lightning_halos.core.local_server import LocalServer
from lightning_halos.core.messages import Message, Pull, Push, Turn
from lightning_halos.core.protocol import GLOBAL
from lightning_halos.core.region_node import RegionNode
from lightning_halos.core.schedule import RoundPlanner, StepBudget
from lightning_halos.core.vector import PART, Advance
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.compute import ComputeThreads
from lightning_halos.transport.hosts import RegionHost
from lightning_halos.transport.lanes import LOCAL_HOST, Lanes
from lightning_halos.transport.link import GlooLink, Link, LoopbackLink, wait_all
from lightning_halos.transport.push_memory import PushMemory
from tests.transport.ends import groups

LIMIT = 60.0
ELEMENTS = 3 * PART + 5


def test_there_is_memory_for_few_pushes_of_many_workers() -> None:
    memory, held = PushMemory(torch.zeros(8), 3), set()
    lock, most, now, all_in_use = threading.Lock(), [0], [0], threading.Event()

    def work(worker: int) -> None:
        for _ in range(20):
            vector = memory.get(worker)
            with lock:
                held.add(vector.data_ptr())
                now[0] += 1
                most[0] = max(most[0], now[0])
                if now[0] == 3:
                    all_in_use.set()
            all_in_use.wait(LIMIT)
            time.sleep(0.0005)
            with lock:
                now[0] -= 1
            memory.put(vector)

    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert not any(thread.is_alive() for thread in threads)
    assert len(held) == most[0] == 3


def test_memory_is_made_when_it_is_needed_and_only_taken_back_from_where_it_is() -> None:
    memory = PushMemory(torch.zeros(8, dtype=torch.float64), 2)
    first = memory.get(0)
    assert (first.shape, first.dtype) == ((8,), torch.float64)
    memory.put(torch.zeros(8))  # of this process's own worker
    memory.put(first)
    assert memory.get(1) is first
    assert memory.get(2) is not first
    with pytest.raises(Empty):
        memory.get(3, timeout=0.01)


def test_slow_workers_leave_memory_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    memory = PushMemory(torch.zeros(8), 3)
    for worker, seconds in enumerate([1.0, 1.5, 10.0, 10.0, 10.0]):
        now[0] += 1
        vector = memory.get(worker)
        now[0] += seconds
        memory.put(vector)
    held = [memory.get(2), memory.get(3)]
    with pytest.raises(Empty):
        memory.get(4, timeout=0.01)  # the third slow one
    waiting: SimpleQueue[Tensor] = SimpleQueue()
    threading.Thread(target=lambda: waiting.put(memory.get(4)), daemon=True).start()
    for worker in (0, 1, 0, 1):  # the others take turns, although it waits for longer
        vector = memory.get(worker, timeout=LIMIT)
        now[0] += 1
        memory.put(vector)
    assert waiting.empty()
    memory.put(held[0])
    assert waiting.get(timeout=LIMIT) is not held[1]


def test_a_following_lane_gives_memory_to_whom_lane_0_has_chosen(
    monkeypatch: pytest.MonkeyPatch, links: list[Link]
) -> None:
    """Also to workers that are slow by its own clock, because all later turns wait behind this one."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    server = LocalServer(0, torch.zeros(8), partial(torch.optim.SGD, lr=1.0), None, 0.5, workers=3)
    node = RegionNode(server, RoundPlanner(8, False, 3, None), range(1, 4), StepBudget(3))
    alarm = Alarm("lane 1")
    there, here = LoopbackLink.pair("lane 1", "lane 0")
    links += [there, here]
    lanes = Lanes(1, {0: here}, alarm, print)
    host = RegionHost(node, alarm, near=(), store=print, lanes=lanes, pushes=2)
    lanes.start()
    granted: SimpleQueue[Tensor] = SimpleQueue()

    def turn(worker: int) -> Tensor:
        there.post(Turn(LOCAL_HOST, worker))
        threading.Thread(target=lambda: granted.put(host.memory_for_push(worker)), daemon=True).start()
        return granted.get(timeout=LIMIT)

    for worker, seconds in ((1, 1.0), (2, 10.0), (3, 10.0)):
        now[0] += 1
        vector = turn(worker)
        now[0] += seconds
        host._memory.put(vector)
    assert turn(2) is not turn(3)


@pytest.fixture
def links() -> Iterator[list[Link]]:
    made: list[Link] = []
    yield made
    for link in made:
        link.close()
    for link in made:
        link.join(10)


def test_rounds_do_not_wait_for_the_push_of_a_slow_worker(links: list[Link]) -> None:
    """Over gloo, with a server that computes in threads, while half a push has arrived."""
    server = LocalServer(0, torch.zeros(ELEMENTS), partial(torch.optim.SGD, lr=1.0), None, 0.5, workers=4)
    node = RegionNode(server, RoundPlanner(8, False, 4, None), range(1, 5), StepBudget(4))
    alarm = Alarm("here")
    host = RegionHost(node, alarm, near=(), store=print, compute=ComputeThreads(2), pushes=2)
    reports = LoopbackLink.pair("the global server", "here")
    reports[1].start(lambda message, progress: wait_all(progress), alarm.fail)
    host.attach(GLOBAL, reports[0])
    half, goes_on = threading.Event(), threading.Event()

    def slowly(vector: Tensor, advance: Advance) -> None:
        advance(PART)
        half.set()
        assert goes_on.wait(LIMIT)

    with groups(5) as made:
        answers: list[SimpleQueue[Pull]] = [SimpleQueue() for _ in range(5)]
        vectors = [torch.ones(ELEMENTS) for _ in range(5)]

        def answered(worker: int, message: Message, progress: Iterable[int]) -> None:
            wait_all(progress)
            assert isinstance(message, Pull)
            answers[worker].put(message)

        ends: list[Link] = [reports[0], reports[1]]
        for worker in range(1, 5):
            memory = partial(host.memory_for_push, worker)
            there = GlooLink(made[0], worker, f"worker {worker}", LIMIT, (ELEMENTS, torch.float32), memory)
            here = GlooLink(
                made[worker], 0, "server", LIMIT, (ELEMENTS, torch.float32), partial(vectors.__getitem__, worker)
            )
            host.attach(worker, there)
            here.start(partial(answered, worker), alarm.fail)
            ends += [there, here]
        links += ends

        def push(worker: int, number: int) -> Push:
            vectors[worker].fill_(1.0)
            return Push(worker, 0, 1, 1, 1.0, vector=vectors[worker], number=number)

        slow = push(1, 1)
        poster = threading.Thread(target=ends[3].post, args=(slow, partial(slowly, vectors[1])), daemon=True)
        poster.start()
        assert half.wait(LIMIT)
        for number in (1, 2, 3):
            for worker in (2, 3, 4):
                ends[2 * worker + 1].post(push(worker, number))
            versions = [answers[worker].get(timeout=LIMIT).version for worker in (2, 3, 4)]
            assert sorted(versions) == [3 * number - 2, 3 * number - 1, 3 * number]
        assert answers[1].empty()
        goes_on.set()
        assert answers[1].get(timeout=LIMIT).version == 10
        assert torch.equal(vectors[1], torch.full((ELEMENTS,), -10.0))
        assert not alarm.has_failed
        alarm.disarm()
        for link in ends:
            link.close()
        for link in ends:
            link.join(10)
        poster.join(LIMIT)
