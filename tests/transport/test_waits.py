"""Every wait has a limit. Its error says who waited for whom, for what, and when each peer was last heard of."""

from __future__ import annotations

import os
import queue
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from lightning_halos.checkpoint.saves import Saves
from lightning_halos.core.algorithms import SyncSGD
from lightning_halos.core.messages import GlobalModel, Message, Push, Status
from lightning_halos.core.schedule import StepBudget
from lightning_halos.simulation.cluster import SimulatedCluster
from lightning_halos.simulation.network import Work
from lightning_halos.simulation.synchronous_network import SynchronousNetwork
from lightning_halos.simulation.timing import Timing
from lightning_halos.training.worlds.simulated_servers import SimulatedServers
from lightning_halos.transport import collectives as collectives_module
from lightning_halos.transport import link
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.client import WorkerClient
from lightning_halos.transport.collectives import Collectives
from lightning_halos.transport.errors import PeerLostError
from lightning_halos.transport.groups import connect_pairs, gather_through
from lightning_halos.transport.interruption import interruptible
from lightning_halos.transport.link import Link, LoopbackLink
from lightning_halos.transport.store import open_store
from tests.integration.harness import context, free_port

pytestmark = pytest.mark.alone


class Peer(Link):
    """A link to another process that was last heard of at a given time."""

    def __init__(self, name: str, seconds_ago: float | None) -> None:
        super().__init__(name)
        self._heard = None if seconds_ago is None else time.monotonic() - seconds_ago

    def _receive_all(self, on_message: object) -> None: ...


def ignore(*_: object) -> None: ...


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which stands still unless a test changes it."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


class TestLost:
    def test_says_when_every_peer_was_heard_of_the_most_silent_first(self, now: list[float]) -> None:
        alarm = Alarm("rank 0 (region eu)")
        alarm.links += [Peer("rank 1", 0.3), Peer("rank 2", 40), Peer("rank 3", None), Peer("rank 2", 7)]
        alarm.links += LoopbackLink.pair("itself", "itself")
        error = alarm.peer_lost("rank 3", "say anything", 30)
        assert re.fullmatch(
            r"rank 3 did not say anything for 30 s, and rank 0 \(region eu\) waited for it"
            r" \(HalosStrategy\(timeout=...\)\)\. Last heard of: rank 3 never;"
            r" rank 2 7\.0 s ago, at \d\d:\d\d:\d\d; rank 1 0\.3 s ago, at \d\d:\d\d:\d\d\.",
            str(error),
        )

    def test_does_not_name_thousands(self, now: list[float]) -> None:
        alarm = Alarm("rank 0")
        alarm.links += [Peer(f"rank {rank}", rank) for rank in range(1, 100)]
        text = str(alarm.peer_lost("rank 99", "say anything", 30))
        assert len(re.findall("s ago", text)) == 8
        assert "rank 99 99" in text


class Worker:
    """A worker's client, and the other end of its link."""

    def __init__(self, timeout: float) -> None:
        mine, self.server = LoopbackLink.pair("its server", "rank 1")
        self.client = WorkerClient(mine, Alarm("rank 1"), timeout, ignore)
        self.server.start(ignore, ignore)

    def push(self) -> Push:
        return Push(1, 0, 0, 0, 0.0, final=True)


def test_a_push_that_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "MIN_PATIENCE", 0.3)
    worker = Worker(timeout=0.01)
    with pytest.raises(PeerLostError, match=r"its server did not answer a push for 0.3 s, and rank 1 waited for it"):
        worker.client.exchange(worker.push(), ignore)


def test_a_final_model_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "MIN_PATIENCE", 0.5)
    worker = Worker(timeout=0.01)
    with pytest.raises(PeerLostError, match=r"its server did not send the final model, or news .* for 0.5 s"):
        worker.client.finish(worker.push(), ignore)


class Inbox(queue.SimpleQueue[Message]):
    """Says when somebody has looked in vain, and when a message was taken out."""

    def __init__(self) -> None:
        self.in_vain, self.taken = threading.Event(), threading.Event()

    def get(self, block: bool = True, timeout: float | None = None) -> Message:
        try:
            message = super().get(block, timeout)
        except queue.Empty:
            self.in_vain.set()
            raise
        self.taken.set()
        return message


def test_a_final_model_may_take_any_time_as_long_as_there_is_news(
    monkeypatch: pytest.MonkeyPatch, now: list[float]
) -> None:
    monkeypatch.setattr(link, "MIN_PATIENCE", 1.5)
    worker = Worker(timeout=0.01)
    inbox = worker.client._inbox = Inbox()

    def others_go_on() -> None:
        for _ in range(5):
            now[0] += 1.0  # the worker waits for longer than 1.5 s in all, and looks at the time before there is news
            for event, happens in ((inbox.in_vain, ignore), (inbox.in_vain, ignore), (inbox.taken, worker.server.post)):
                event.clear()
                happens(Status(0, 0.0, False))
                event.wait(60)
        worker.server.post(GlobalModel(1, True, vector=torch.zeros(1)))

    threading.Thread(target=others_go_on, daemon=True).start()
    final, _ = worker.client.finish(worker.push(), ignore)
    assert final.final
    assert now[0] == 1005.0


def test_a_worker_of_a_simulation_that_hangs() -> None:
    timing = Timing(SimulatedCluster([[1]], [[1] * 4], 100), 1000)
    network = SynchronousNetwork(timing, Work(StepBudget(4)), SyncSGD(), None)
    servers = SimulatedServers(network, Alarm("rank 0"), 0.3, Saves())
    _, its = LoopbackLink.pair("the world", "rank 3")
    servers.attach(3, its)
    with pytest.raises(PeerLostError, match=r"rank 3 did not finish its round for 0.3 s, and rank 0 waited for it"):
        servers._wait_for(3)


def test_whatever_blocks() -> None:
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        interruptible(lambda: time.sleep(60), ignore, timeout=0.3)
    assert time.monotonic() - begin < 10


def _host_store(connection: Any) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    connection.send(store.port)
    time.sleep(300)


@contextmanager
def stopped_store() -> Iterator[TCPStore]:
    """A store in a process that is stopped without closing its connections."""
    ours, theirs = context.Pipe()
    process = context.Process(target=_host_store, args=(theirs,), daemon=True)
    process.start()
    try:
        assert ours.poll(60)
        store = TCPStore("127.0.0.1", ours.recv(), timeout=timedelta(seconds=60))
        assert store.add("before", 2) == 2
        store.set_timeout(timedelta(seconds=2))
        os.kill(process.pid, signal.SIGSTOP)
        yield store
    finally:
        process.kill()
        process.join()


def test_a_store_whose_process_is_stopped() -> None:
    with stopped_store() as store:
        collectives = Collectives([[0]], 0, store, ignore, "worker {}".format, 0.5)
        collectives.barrier()
        with pytest.raises(
            PeerLostError,
            match=r"worker 0 got no answer from the store .*, to count 'leased', within timeout=0.5 s. worker 0, whose"
            r" process has the store, has ended or is stopped. All were last heard of \d+\.\d s ago",
        ):
            collectives.count("leased", 1)


def test_a_store_whose_process_is_stopped_before_the_regions_are_known() -> None:
    with (
        stopped_store() as store,
        pytest.raises(PeerLostError, match=r"Rank 1 got no answer from the store .* within 1 s"),
    ):
        gather_through(store, "region", 1, 2, "eu", ignore, 0.5)


def test_a_process_group_that_nobody_else_comes_to() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(
        PeerLostError, match=r"Rank 0 waited for .* to connect \(models\). Rank\(s\) \[1\] did not come"
    ):
        connect_pairs(store, "models", 0, None, [1], 0.5, ignore)


def test_a_leader_whose_own_store_is_out_of_reach() -> None:
    store, port = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), free_port()
    store.set("region/host/2", f"127.0.0.1 {port}")
    with pytest.raises(
        PeerLostError, match=rf"Rank 3 did not reach rank 2 .* on 127\.0\.0\.1, port {port}\. .*firewall"
    ):
        connect_pairs(store, "region", 3, 2, [], 0.5, ignore)


class SignalError(Exception):
    """What the handler of a signal raises."""


def raise_signal_error() -> None:
    raise SignalError


def test_a_signal_ends_the_wait_for_a_group() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(SignalError):
        connect_pairs(store, "models", 0, None, [1], 20.0, raise_signal_error)


def test_a_signal_ends_the_wait_for_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "")  # both are restored afterwards
    monkeypatch.setenv("MASTER_PORT", "")
    with pytest.raises(SignalError):
        open_store("127.0.0.1", free_port(), 1, 2, 20.0, raise_signal_error)


def errors_of(
    regions: Sequence[Sequence[int]], missing: int, timeout: float, wait: Callable[[Collectives], object]
) -> Callable[[], dict[int, str]]:
    """Starts workers that wait for each other, of which one does not come. Returns what waits for their errors."""
    master = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = sorted(rank for region in regions for rank in region)
    texts: dict[int, str] = {}

    def work(rank: int) -> None:
        store = TCPStore("127.0.0.1", master.port)
        collectives = Collectives(regions, rank, store, ignore, "worker {}".format, 60.0)
        collectives.barrier()
        collectives._star._limit = timedelta(seconds=timeout)  # not of the connections, for which all are waited for
        try:
            if rank != missing:
                wait(collectives)
        except PeerLostError as error:
            texts[rank] = str(error)
        if wait is reduce:
            ends.wait(60)

    def end() -> dict[int, str]:
        for thread in threads:
            thread.join(60)
        return texts

    ends = threading.Barrier(len(ranks))
    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    return end


def reduce(collectives: Collectives) -> None:
    collectives.reduce(torch.ones(1), "sum")


@pytest.fixture
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, those that wait may need longer to report themselves."""
    monkeypatch.setattr(collectives_module, "_ROLL_CALL", 5.0)


@pytest.mark.usefixtures("_patient")
def test_a_collective_that_one_leaves_names_nobody_else() -> None:
    """Most workers do not wait for the process that has ended, and must learn of it from those that do."""
    arrangements: list[list[Any]] = [[range(6)], [[0, 1, 2], [3, 4, 5]], [[0, 4], [1, 2, 3], [5]]]
    for ended in [errors_of(regions, 3, 60.0, Collectives.barrier) for regions in arrangements]:  # at the same time
        texts = ended()
        assert texts.keys() == set(range(6)) - {3}
        assert all("Did not come, or has ended: worker 3." in text for text in texts.values()), texts


@pytest.mark.usefixtures("_patient")
def test_a_collective_that_one_does_not_come_to() -> None:
    arrangements: list[list[Any]] = [[range(3)], [[0], [1, 2]], [[0, 1], [2]]]
    for ended in [errors_of(regions, 1, 2.0, reduce) for regions in arrangements]:  # at the same time
        texts = ended()
        assert texts.keys() == {0, 2}
        for rank, text in texts.items():
            assert text.startswith(
                f"worker {rank} waited for all workers to give a tensor to a reduction."
                " Did not come, or has ended: worker 1."
            )
            assert re.search(r"All were last heard of \d+\.\d s ago", text)
