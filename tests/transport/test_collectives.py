"""Collectives: the same results whatever the regions, few round trips, few connections, and errors that are true."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.distributed import HashStore, Store, TCPStore

from lightning_halos.transport import groups, star
from lightning_halos.transport.collectives import Collectives
from lightning_halos.transport.errors import PeerLostError
from lightning_halos.transport.groups import gather_through
from tests.integration.harness import context

Regions = Sequence[Sequence[int]]
REGIONS: list[Regions] = [
    [[0]],
    [[0, 1, 2]],
    [[0], [1], [2]],
    [[0, 1], [2, 3]],
    [[2, 3], [0, 1]],
    [[0, 3], [1], [2, 4, 5]],
]
every_topology = pytest.mark.parametrize("regions", REGIONS, ids=str)
two_regions = pytest.mark.parametrize("regions", [[[0, 1, 2]], [[0, 1], [2]]], ids=str)


def ignore(*_: object) -> None: ...


class CountingPair:
    """A pair that counts the tensors that one of its ends sends and receives."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.count = 0

    def __getattr__(self, name: str) -> Any:
        if name in ("send", "recv"):
            self.count += 1
        return getattr(self.group, name)


class Workers:
    """Workers in threads, whose collectives are over real sockets. The last one may wait before it comes."""

    def __init__(self, regions: Regions, port: int, late: threading.Event | None = None, timeout: float = 60.0) -> None:
        self.size = sum(map(len, regions))
        self.all: dict[int, Collectives] = {}
        self.pairs: list[CountingPair] = []

        def connect(rank: int) -> None:
            if late is not None and rank == self.size - 1:
                assert late.wait(60)
            store = TCPStore("127.0.0.1", port)
            collectives = Collectives(regions, rank, store, ignore, "worker {}".format, timeout)
            pairs = collectives._star._pairs
            for peer in pairs:
                pairs[peer] = CountingPair(pairs[peer])
                self.pairs.append(pairs[peer])
            self.all[rank] = collectives

        self._in_threads(connect)

    def run(self, work: Callable[[Collectives, int], Any]) -> list[Any]:
        """Returns what each worker returns, or the error that it raises, by rank."""
        outcomes: dict[int, Any] = {}

        def target(rank: int) -> None:
            try:
                outcomes[rank] = work(self.all[rank], rank)
            except Exception as error:
                outcomes[rank] = error

        self._in_threads(target)
        return [outcomes.get(rank, "still waits") for rank in range(self.size)]

    @property
    def most_transfers(self) -> int:
        """The most tensors that crossed one pair."""
        return max(pair.count for pair in self.pairs)

    def _in_threads(self, target: Callable[[int], None]) -> None:
        threads = [threading.Thread(target=target, args=(rank,), daemon=True) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)


class CountingStore(Store):
    """A process's connection to the store of all processes, which counts its requests."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.store = TCPStore("127.0.0.1", port)
        self.requests = 0

    def set(self, key: str, value: Any) -> None:
        self.requests += 1
        self.store.set(key, value)

    def get(self, key: str) -> bytes:
        self.requests += 1
        return self.store.get(key)

    def check(self, keys: list[str]) -> bool:
        self.requests += 1
        return self.store.check(keys)

    def wait(self, keys: list[str], *timeout: timedelta) -> None:
        self.requests += 1
        self.store.wait(keys, *timeout)


def most_requests(regions: Regions) -> int:
    """Returns the most requests of a process that connects with others, except of the one that has the store."""
    master = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stores = {rank: CountingStore(master.port) for ranks in regions for rank in ranks}

    def connect(rank: int) -> None:
        connected[rank] = Collectives(regions, rank, stores[rank], ignore, "worker {}".format, 60.0)

    connected: dict[int, Collectives] = {}
    threads = [threading.Thread(target=connect, args=(rank,), daemon=True) for rank in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert connected.keys() == stores.keys()
    return max(store.requests for rank, store in stores.items() if rank > 0)


@contextmanager
def workers(regions: Regions) -> Iterator[Workers]:
    master = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield Workers(regions, master.port)


class TestResults:
    @every_topology
    def test_reductions(self, regions: Regions) -> None:
        def work(collectives: Collectives, rank: int) -> list[Any]:
            values = torch.tensor([rank + 1, -rank, 2], dtype=torch.float64)
            names = ("sum", "mean", "avg", "min", "max", "product", "ReduceOp.SUM")
            return [collectives.reduce(values, name).tolist() for name in names]

        with workers(regions) as all_workers:
            size = all_workers.size
            ranks = torch.arange(size, dtype=torch.float64)
            table = torch.stack([ranks + 1, -ranks, torch.full_like(ranks, 2)])
            total, mean = table.sum(1).tolist(), table.mean(1).tolist()
            expected = [
                total,
                mean,
                mean,
                table.amin(1).tolist(),
                table.amax(1).tolist(),
                table.prod(1).tolist(),
                total,
            ]
            for outcome in all_workers.run(work):
                torch.testing.assert_close(torch.tensor(outcome), torch.tensor(expected))

    @every_topology
    def test_gatherings_are_in_the_order_of_the_ranks(self, regions: Regions) -> None:
        def work(collectives: Collectives, rank: int) -> Any:
            collectives.barrier()
            table = collectives.all_gather(torch.tensor([[rank, 10 * rank]], dtype=torch.int32))
            large = collectives.all_gather(torch.full((300,), rank))
            scalars = collectives.all_gather(torch.tensor(rank > 1))
            texts = collectives.gather_texts("" if rank == 1 else f"é{rank}" * (100 * rank + 1))
            return table.tolist(), large[:, 299].tolist(), scalars.tolist(), texts

        with workers(regions) as all_workers:
            ranks = range(all_workers.size)
            expected = (
                [[[rank, 10 * rank]] for rank in ranks],
                list(ranks),
                [rank > 1 for rank in ranks],
                ["" if rank == 1 else f"é{rank}" * (100 * rank + 1) for rank in ranks],
            )
            assert all_workers.run(work) == [expected for _ in ranks]

    @every_topology
    def test_broadcasts_from_every_worker(self, regions: Regions) -> None:
        def work(collectives: Collectives, rank: int) -> Any:
            seen = []
            for source in range(all_workers.size):
                first, second = torch.full((3, 2), float(rank)).t(), torch.tensor(rank, dtype=torch.int16)
                empty = torch.empty(0)
                collectives.broadcast_([first, empty, second], source)
                value = {"rank": rank, (1, "x"): [None, True, 1.5, Path("/a")], "t": torch.full((2, 1), rank)}
                received = collectives.broadcast_object(value, source)
                long = collectives.broadcast_object([str(rank) * 1000, torch.full((1000,), rank).bool()], source)
                seen += [first[1, 2].item(), second.item(), received["rank"], received["t"].tolist()]
                seen += [[*map(str, received[1, "x"])], long[0] == str(source) * 1000, long[1].sum().item()]
            return seen

        expected: list[Any] = []
        with workers(regions) as all_workers:
            for source in range(all_workers.size):
                expected += [float(source), source, source, [[source], [source]]]
                expected += [["None", "True", "1.5", "/a"], True, 1000 * (source > 0)]
            assert all_workers.run(work) == [expected] * all_workers.size

    @every_topology
    def test_tensors_of_many_parts(self, regions: Regions, monkeypatch: pytest.MonkeyPatch) -> None:
        """All workers get the same bits, whatever the order in which parts arrive."""
        monkeypatch.setattr(star, "PART", 100)
        monkeypatch.setattr(star, "_PART_BYTES", 400)

        def work(collectives: Collectives, rank: int) -> Any:
            values = torch.rand(100 * 40 + 7, generator=torch.Generator().manual_seed(rank))
            total = collectives.sum_(values.clone())
            collectives.broadcast_([values], all_workers.size - 1)
            return total, values

        with workers(regions) as all_workers:
            outcomes = all_workers.run(work)
            ranks = range(all_workers.size)
            own = [torch.rand(100 * 40 + 7, generator=torch.Generator().manual_seed(rank)) for rank in ranks]
            torch.testing.assert_close(outcomes[0][0], torch.stack(own).sum(0))
            for total, values in outcomes:
                assert torch.equal(total, outcomes[0][0])
                assert torch.equal(values, own[-1])

    def test_tensors_of_a_validation_which_runs_in_inference_mode(self) -> None:
        def work(collectives: Collectives, rank: int) -> Any:
            with torch.inference_mode():
                total = collectives.reduce(torch.tensor([rank, 2.0]), "sum")
                return total.tolist(), collectives.all_gather(torch.tensor(rank)).tolist(), total.is_inference()

        with workers([[0, 1], [2]]) as all_workers:
            assert all_workers.run(work) == [([3.0, 6.0], [0, 1, 2], True)] * 3

    def test_sums_of_booleans_are_counts(self) -> None:
        def work(collectives: Collectives, rank: int) -> Any:
            flags = torch.tensor([True, rank == 0, False])
            return [collectives.reduce(flags, name) for name in ("sum", "mean", "min", "max")]

        with workers([[0, 1], [2, 3]]) as all_workers:
            for total, mean, least, most in all_workers.run(work):
                assert total.tolist() == [4, 1, 0]
                assert mean.tolist() == [1.0, 0.25, 0.0]
                assert least.tolist() == [True, False, False]
                assert most.tolist() == [True, True, False]

    @pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.float16, torch.bfloat16], ids=str)
    def test_dtypes_that_gloo_does_not_know(self, dtype: torch.dtype) -> None:
        with workers([[0, 1, 2]]) as all_workers:
            for total in all_workers.run(lambda collectives, _: collectives.reduce(torch.ones(2, dtype=dtype), "sum")):
                assert total.dtype == dtype
                assert total.tolist() == [3, 3]

    def test_a_gathering_of_names_needs_no_group(self) -> None:
        store, names = HashStore(), {}

        def target(rank: int) -> None:
            names[rank] = gather_through(store, "region", rank, 3, ["", "eu", "us"][rank], ignore, 60.0)

        threads = [threading.Thread(target=target, args=(rank,), daemon=True) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert names == {rank: ["", "eu", "us"] for rank in range(3)}

    def test_a_gathering_of_names_says_who_did_not_come(self) -> None:
        master = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        with pytest.raises(PeerLostError, match=r"Rank 1 waited for timeout=0.3 s .* Rank\(s\) \[0, 2\] did not"):
            gather_through(master, "region", 1, 3, "eu", ignore, 0.3)


class TestErrors:
    """All workers raise the same error for wrong arguments, and the next collective works."""

    def check(self, regions: Regions, work: Callable[[Collectives, int], Any], kind: type, *parts: str) -> None:
        with workers(regions) as all_workers:
            for outcome in all_workers.run(work):
                assert type(outcome) is kind
                for part in parts:
                    assert part in str(outcome)
            assert (
                all_workers.run(lambda collectives, rank: collectives.gather_texts(str(rank))) == [["0", "1", "2"]] * 3
            )

    @two_regions
    def test_a_reduction_of_different_shapes(self, regions: Regions) -> None:
        self.check(
            regions,
            lambda collectives, rank: collectives.reduce(torch.ones(2 + (rank == 1)), "sum"),
            ValueError,
            "worker 0 has reduce_op='sum', a float32 tensor of shape [2]",
            "worker 1 has reduce_op='sum', a float32 tensor of shape [3]",
        )

    @two_regions
    def test_a_reduction_of_different_dtypes(self, regions: Regions) -> None:
        self.check(
            regions,
            lambda collectives, rank: collectives.reduce(
                torch.ones(2, dtype=[torch.half, torch.int8][rank > 1]), "max"
            ),
            ValueError,
            "a float16 tensor of shape [2]",
            "worker 2 has reduce_op='max', a int8 tensor of shape [2]",
        )

    @two_regions
    def test_a_reduction_of_what_has_no_order(self, regions: Regions) -> None:
        self.check(
            regions,
            lambda collectives, _: collectives.reduce(torch.ones(2, dtype=torch.complex64), "max"),
            TypeError,
            "A tensor of dtype torch.complex64 cannot be reduced",
        )

    @two_regions
    def test_a_reduction_of_another_kind(self, regions: Regions) -> None:
        work = lambda collectives, _: collectives.reduce(torch.ones(2), "median")  # noqa: E731
        self.check(regions, work, ValueError, "reduce_op='median' must be one of")

    @two_regions
    def test_a_gathering_of_different_shapes(self, regions: Regions) -> None:
        self.check(
            regions,
            lambda collectives, rank: collectives.all_gather(torch.ones(2 + (rank == 2))),
            ValueError,
            "worker 0 has a float32 tensor of shape [2], worker 2 has a float32 tensor of shape [3]",
        )

    @two_regions
    def test_a_broadcast_of_different_shapes(self, regions: Regions) -> None:
        self.check(
            regions,
            lambda collectives, rank: collectives.broadcast_([torch.ones(1), torch.ones(2 + (rank == 1))]),
            ValueError,
            "worker 0 has a float32 tensor of shape [1] as number 0",
            "worker 1 has a float32 tensor of shape [3] as number 1",
        )

    @two_regions
    def test_a_broadcast_of_fewer_tensors(self, regions: Regions) -> None:
        self.check(
            regions,
            lambda collectives, rank: collectives.broadcast_([torch.ones(1)] * (2 + (rank == 1))),
            ValueError,
            "worker 1 has 3 tensors",
        )

    @two_regions
    @pytest.mark.parametrize("source", [0, 2])
    def test_a_broadcast_of_what_would_have_to_be_pickled(self, regions: Regions, source: int) -> None:
        self.check(
            regions,
            lambda collectives, _: collectives.broadcast_object([torch.ones(3), object()], source),
            TypeError,
            "A object cannot be broadcast",
        )

    def test_tensors_that_are_not_dense_and_objects_whose_methods_raise(self) -> None:
        """Nobody waits for a worker that could not send: all raise an error, and the next collective works."""

        class Broken:
            def __fspath__(self) -> str:
                raise OSError("no such place")

        sparse, dense = torch.eye(3).to_sparse(), torch.eye(3)
        with workers([[0, 1], [2]]) as all_workers:

            def errors(call: Callable[[Collectives, int], Any]) -> set[type]:
                kinds = {type(outcome) for outcome in all_workers.run(call)}
                assert all_workers.run(lambda collectives, _: collectives.broadcast_object("fine")) == ["fine"] * 3
                return kinds

            for tensor in (sparse, torch.eye(3).to_sparse_csr(), torch.eye(3, device="meta")):
                assert errors(lambda c, _, t=tensor: c.broadcast_object({"graph": t})) == {TypeError}
                assert errors(lambda c, _, t=tensor: c.broadcast_([dense.clone(), t])) == {TypeError}
                assert errors(lambda c, _, t=tensor: c.all_gather(t)) == {TypeError}
                assert errors(lambda c, _, t=tensor: c.reduce(t, "sum")) == {TypeError}
            assert errors(lambda c, rank: c.all_gather(sparse if rank == 1 else dense)) == {ValueError}
            assert errors(lambda c, rank: c.reduce(sparse if rank == 1 else dense, "sum")) == {ValueError}
            assert errors(lambda c, _: c.broadcast_object(Broken(), 1)) == {OSError, TypeError}

    def test_a_broadcast_of_what_contains_itself(self) -> None:
        endless: list[Any] = []
        endless.append(endless)
        with workers([[0, 1]]) as all_workers:
            first, second = all_workers.run(lambda collectives, _: collectives.broadcast_object(endless))
            assert isinstance(first, RecursionError)
            assert isinstance(second, TypeError)


class TestRoundTrips:
    """A start over a slow network takes the same number of round trips whatever there is to send."""

    @pytest.mark.parametrize("regions", [[[0], [1]], [[0, 1], [2, 3, 4, 5]], [range(6)]], ids=str)
    @pytest.mark.parametrize("tensors", [3, 300])
    def test_tensors_are_broadcast_together(self, regions: Regions, tensors: int) -> None:
        def work(collectives: Collectives, rank: int) -> float:
            mine = [torch.full((7,), float(rank), dtype=[torch.float32, torch.half][i % 2]) for i in range(tensors)]
            collectives.broadcast_(mine)
            return sum(tensor.sum().item() for tensor in mine)

        with workers(regions) as all_workers:
            assert set(all_workers.run(work)) == {0.0}
            # The shapes in one or two, each gathered and given back, and the tensors.
            assert all_workers.most_transfers <= 5

    @pytest.mark.parametrize("regions", [[[0], [1]], [[0, 1], [2, 3, 4, 5]], [range(6)]], ids=str)
    def test_texts_are_gathered_together(self, regions: Regions) -> None:
        with workers(regions) as all_workers:
            all_workers.run(lambda collectives, rank: collectives.gather_texts(f"rank {rank}"))
            assert all_workers.most_transfers <= 2

    def test_more_workers_in_a_region_take_no_more_requests_to_the_store_which_may_be_far(self) -> None:
        few, many = (most_requests([[0, 1], range(2, 2 + workers)]) for workers in (2, 8))
        assert few == many

    def test_an_object_needs_one_broadcast_whatever_is_in_it(self) -> None:
        value = [{str(i): torch.ones(3)} for i in range(100)]
        with workers([range(3)]) as all_workers:
            all_workers.run(lambda collectives, rank: collectives.broadcast_object([rank]))
            assert all_workers.most_transfers == 1
            all_workers.run(lambda collectives, _: collectives.broadcast_object(value))
            assert all_workers.most_transfers == 3, "the length and the rest"


def test_a_worker_may_take_longer_than_any_limit_if_all_wait_for_it() -> None:
    """As one does that downloads the data."""
    regions, limit = [[0, 1], [2]], 2.0
    master = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    all_workers = Workers(regions, master.port, timeout=limit)

    def work(collectives: Collectives, rank: int) -> float:
        for late in (2, 0):
            time.sleep(1.5 * limit if rank == late else 0)
            collectives.wait_for_all()
        return collectives.reduce(torch.ones(1), "sum").item()

    assert all_workers.run(work) == [3.0] * 3


def test_a_worker_that_ends_is_missed_however_long_the_others_would_wait() -> None:
    master = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    all_workers = Workers([[0, 1], [2]], master.port)

    def work(collectives: Collectives, rank: int) -> Any:
        if rank == 1:
            time.sleep(0.5)
            all_workers.pairs.clear()  # which keep the connections, too
            return collectives._star.close()
        return collectives.wait_for_all()

    first, _, last = all_workers.run(work)
    assert isinstance(first, PeerLostError)
    assert isinstance(last, PeerLostError)


@pytest.mark.parametrize(
    ("regions", "free"),
    [([[0], [1, 2, 5], [3, 4]], {"3 and 4"}), ([[0], [1, 2], [3, 4, 5]], {"1 and 2", "0 and 1"})],
    ids=["1 waits", "3 waits"],
)
def test_nobody_begins_to_connect_with_a_worker_that_waits_for_a_late_one(
    regions: Regions, free: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt to connect is far shorter than the timeout, so it would fail before the late one, 5, comes."""
    master = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    late, before = threading.Event(), set()
    connect = groups._connect

    def begin(store: Store, name: str, *args: Any) -> Any:
        if not late.is_set():
            before.add(name.removeprefix("star of ranks "))
        return connect(store, name, *args)

    def release() -> None:
        master.wait([f"star/host/{rank}" for rank in range(5)], timedelta(seconds=60))
        time.sleep(0.5)  # in which the others would begin
        late.set()

    monkeypatch.setattr(groups, "_connect", begin)
    threading.Thread(target=release, daemon=True).start()
    all_workers = Workers(regions, master.port, late)
    assert all_workers.run(lambda collectives, rank: collectives.broadcast_object(rank, source=5)) == [5] * 6
    assert before <= free


def _peers(regions: Regions, rank: int, port: int, connection: Any) -> None:
    store = TCPStore("127.0.0.1", port)
    before = {(c.laddr, c.raddr) for c in psutil.Process().net_connections("tcp")}
    collectives = Collectives(regions, rank, store, ignore, "worker {}".format, 60.0)
    collectives.broadcast_object(rank, source=3)
    collectives.reduce(torch.ones(2), "sum")
    collectives.barrier()
    connection.send(
        [
            (c.laddr, c.raddr)
            for c in psutil.Process().net_connections("tcp")
            if c.raddr and (c.laddr, c.raddr) not in before
        ]
    )
    connection.recv()


def test_a_worker_connects_to_its_leader_only_and_leaders_to_rank_0() -> None:
    regions = [[0, 1, 2], [3, 4, 5], [6, 7]]
    master = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, connections = [], []
    for rank in range(8):
        ours, theirs = context.Pipe()
        process = context.Process(target=_peers, args=(regions, rank, master.port, theirs), daemon=True)
        process.start()
        processes.append(process)
        connections.append(ours)
    try:
        assert all(connection.poll(120) for connection in connections)
        sockets = {rank: connection.recv() for rank, connection in enumerate(connections)}
    finally:
        for process in processes:
            process.kill()
            process.join()
    owner = {ends: rank for rank, pairs in sockets.items() for ends in pairs}
    peers = {
        rank: sorted(owner[there, here] for here, there in pairs if (there, here) in owner)
        for rank, pairs in sockets.items()
    }
    assert peers == {
        0: [1, 2, 3, 6],
        1: [0],
        2: [0],
        3: [0, 4, 5],
        4: [3],
        5: [3],
        6: [0, 7],
        7: [6],
    }
