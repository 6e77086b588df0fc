"""How fast does a server take pushes? 8 workers push a model as fast as they can, against a plain copy of these bytes.

A push and its answer are two models. So each push is compared with copying two models, in the same process, with as
many threads, in turns; each side counts with its best turn.

    inside      the workers are threads of the server's process, on links inside it: what the server itself costs; also
                by the time of the cores instead of the clock, which other processes disturb less
    processes   the workers are processes on this machine, on gloo links (TCP over loopback), beside the same processes
                and connections that only send a model and receive one: what is left of the connections' speed
    parts       seconds of one thread for each part of a push, and of the connections

Also prints `server_gigabytes_per_second` for the description of a cluster (docs/planning.md): bytes of a model, divided
by the seconds that the server is busy with its push. Exits with 1 if `inside` is below its limit.

Run: python benchmarks/server.py
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from queue import SimpleQueue

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroup, TCPStore

from lightning_halos.core.compat import gloo_group
from lightning_halos.core.delayed_nesterov import DelayedNesterov
from lightning_halos.core.local_server import LocalServer
from lightning_halos.core.messages import Message, Push
from lightning_halos.core.parameter_server import PIECE
from lightning_halos.core.protocol import GLOBAL
from lightning_halos.core.region_node import RegionNode
from lightning_halos.core.schedule import RoundPlanner, StepBudget
from lightning_halos.core.vector import PART
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.compute import ComputeThreads, threads_beside
from lightning_halos.transport.hosts import RegionHost
from lightning_halos.transport.link import GlooLink, Link, LoopbackLink, wait_all
from lightning_halos.transport.push_memory import PUSHES

LIMIT = 0.6  # of a plain copy
WORKERS = 8
TIMEOUT = 600.0


def shapes_of(elements: int) -> list[torch.Size]:
    """Shapes like those of a transformer: a large embedding, and blocks of matrices and vectors."""
    width, left = 768, elements
    sizes = [elements // 4]
    while (left := elements - sum(sizes)) > 0:
        sizes += [min(size, left) for size in (width, 3 * width * width)][: 1 if left <= width else 2]
    while sum(sizes) > elements:
        sizes[-1] -= sum(sizes) - elements
    return [torch.Size([size]) for size in sizes]


def make_server(elements: int, compute: ComputeThreads, exchanges: bool = False) -> LocalServer:
    """Returns a server with HALoS's default optimizer, in the middle of a momentum window."""
    optimizer = partial(DelayedNesterov, lr=0.2, momentum=0.9, delay=2 * WORKERS)
    period = 10**9 if exchanges else None
    server = LocalServer(0, torch.zeros(elements), optimizer, period, 0.25, shapes_of(elements), workers=WORKERS)
    server.map = compute.map
    return server


def seconds(function: Callable[[], object]) -> float:
    """Returns the time that one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def both_times(function: Callable[[], object]) -> tuple[float, float]:
    """Returns the seconds of one call by the clock, and those of all cores together."""
    cpu = time.process_time()
    wall = seconds(function)
    return wall, time.process_time() - cpu


def copy(source: Tensor, target: Tensor, compute: ComputeThreads) -> None:
    """Copies a vector in the threads, in pieces of the server's size."""
    parts = zip(torch.split(target, PIECE), torch.split(source, PIECE), strict=True)
    wait_all(compute.map(lambda pair: pair[0].copy_(pair[1]) is None, parts))


class Server:
    """The server on its links, with a global server that only listens."""

    def __init__(self, elements: int, compute: ComputeThreads, pushes: int) -> None:
        node = RegionNode(
            make_server(elements, compute),
            RoundPlanner(8, False, WORKERS, None),
            range(1, WORKERS + 1),
            StepBudget(WORKERS),
        )
        self.alarm = Alarm("the benchmark")
        self.host = RegionHost(node, self.alarm, (), lambda shard, complete: None, None, compute, pushes)
        here, there = LoopbackLink.pair("the global server", "the server")
        there.start(lambda message, progress: wait_all(progress), self.alarm.fail)
        self.host.attach(GLOBAL, here)


def keep_pushing(links: list[Link], vectors: list[Tensor], rounds: int, workers: list[int]) -> None:
    """Lets each worker push a number of times, and waits for the last answers."""
    done: SimpleQueue[None] = SimpleQueue()
    left = dict.fromkeys(workers, rounds)

    def post(link: Link, worker: int, vector: Tensor) -> None:
        if left[worker]:
            left[worker] -= 1
            link.post(Push(worker, 0, 1, 1, 1.0, vector=vector))
        else:
            done.put(None)

    ends = list(zip(links, workers, vectors, strict=True))
    for link, worker, vector in ends:
        on_answer[link] = partial(post, link, worker, vector)
    for link, worker, vector in ends:
        post(link, worker, vector)
    for _ in links:
        done.get(timeout=TIMEOUT)


on_answer: dict[Link, Callable[[], None]] = {}


def receive(link: Link, message: Message, progress: Iterable[int]) -> None:
    """Receives an answer completely, and goes on."""
    wait_all(progress)
    on_answer[link]()


def inside(elements: int, compute: ComputeThreads, turns: int) -> tuple[list[float], list[float]]:
    """Returns the best times for a push of each worker inside the process, and for copying two models each.

    Each is the seconds by the clock, and those of all cores together, which other processes disturb less.
    """
    server = Server(elements, compute, PUSHES)
    links, vectors = [], [torch.full((elements,), 1e-3) for _ in range(WORKERS)]
    for worker in range(1, WORKERS + 1):
        there, here = LoopbackLink.pair("the server", f"worker {worker}")
        here_end, server_end = there, here
        here_end.start(partial(receive, here_end), server.alarm.fail)
        server.host.attach(worker, server_end)
        links.append(here_end)
    workers = list(range(1, WORKERS + 1))
    pairs = list(zip(vectors, [*vectors[1:], vectors[0]], strict=True))
    keep_pushing(links, vectors, 1, workers)
    times = []
    for _ in range(turns):
        pushing = both_times(lambda: keep_pushing(links, vectors, 1, workers))
        copying = both_times(lambda: [copy(source, target, compute) for source, target in pairs for _ in range(2)])
        times.append((pushing, copying))
        for vector in vectors:
            vector.fill_(1e-3)
    for link in [*links, *(link for own in server.host._links.values() for link in own)]:
        link.close()
    columns = [list(zip(*column, strict=True)) for column in zip(*times, strict=True)]
    pushes, copies = ([min(kind) for kind in column] for column in columns)
    return pushes, copies


def parts(elements: int, compute: ComputeThreads) -> dict[str, float]:
    """Returns the seconds for each part of a push."""
    server, vector = make_server(elements, compute, exchanges=True), torch.full((elements,), 1e-3)
    server.apply(vector, True, vector)
    vector.fill_(1e-3)
    found = {"inspect": min(seconds(lambda: server.inspect(vector)) for _ in range(3))}
    found["apply and answer"] = min(seconds(lambda: server.apply(vector, True, vector)) for _ in range(3))
    update = server.begin_exchange()
    found["fill an update for the global server"] = seconds(lambda: server.fill(update))
    return found


def pair(store: TCPStore, name: str, rank: int) -> ProcessGroup:
    """Connects the server (rank 0) and a worker (rank 1)."""
    return gloo_group(PrefixStore(name, store), rank, 2, timedelta(seconds=TIMEOUT), "127.0.0.1")


def work(rank: int, port: int, elements: int, turns: int) -> None:
    """A worker's process."""
    store = TCPStore("127.0.0.1", port)
    torch.set_num_threads(1)
    vector = torch.full((elements,), 1e-3)
    bare = pair(store, f"bare {rank}", 1)
    link = GlooLink(pair(store, f"link {rank}", 1), 0, "the server", TIMEOUT, (elements, torch.float32), lambda: vector)
    link.start(partial(receive, link), lambda error: os._exit(1))
    for turn in range(turns + 1):
        for name, run in (
            ("bare", lambda: exchange_bare(bare, 0, vector, 0)),
            ("link", lambda: keep_pushing([link], [vector], 1, [rank])),
        ):
            store.set(f"ready {name} {turn} {rank}", "")
            store.wait([f"go {name} {turn}"])
            run()
            store.set(f"done {name} {turn} {rank}", "")
        vector.fill_(1e-3)
    store.wait(["end"])
    os._exit(0)


def exchange_bare(group: ProcessGroup, peer: int, vector: Tensor, first: int) -> None:
    """Sends a vector in parts and receives one, or the other way round, as a link does."""
    pieces = torch.split(vector, PART)
    for is_send in ([True, False], [False, True])[first]:
        works = [group.send([part], peer, 0) if is_send else group.recv([part], peer, 0) for part in pieces]
        for one in works:
            one.wait()


def among_processes(elements: int, compute: ComputeThreads, turns: int, pushes: int) -> tuple[float, float]:
    """Returns the best seconds for a push of each process, and for bare exchanges of the same vectors."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = [sys.executable, __file__, "--elements", str(elements), "--turns", str(turns), "--work"]
    ranks = range(1, WORKERS + 1)
    with ExitStack() as stack:
        for rank in ranks:
            process = subprocess.Popen([*command, str(rank), str(store.port)])
            stack.callback(process.wait, 60)
        stack.callback(store.set, "end", "")
        server = Server(elements, compute, pushes)
        groups, memory = [], [torch.zeros(elements) for _ in range(pushes)]
        for rank in ranks:
            groups.append(pair(store, f"bare {rank}", 0))
            group = pair(store, f"link {rank}", 0)
            own = partial(server.host.memory_for_push, rank)
            link = GlooLink(group, 1, f"worker {rank}", TIMEOUT, (elements, torch.float32), own)
            server.host.attach(rank, link)
        times: dict[str, list[float]] = {"bare": [], "link": []}
        for turn in range(turns + 1):
            for name in times:
                store.wait([f"ready {name} {turn} {rank}" for rank in ranks])
                start = time.perf_counter()
                store.set(f"go {name} {turn}", "")
                if name == "bare":
                    echo(groups, memory)
                store.wait([f"done {name} {turn} {rank}" for rank in ranks])
                times[name].append(time.perf_counter() - start)
        server.alarm.disarm()  # the workers end without a goodbye
        return min(times["link"][1:]), min(times["bare"][1:])


def echo(groups: list[ProcessGroup], memory: list[Tensor]) -> None:
    """Receives a vector from each process into one of a few memories, and sends it back."""
    free: SimpleQueue[Tensor] = SimpleQueue()
    for vector in memory:
        free.put(vector)

    def serve(group: ProcessGroup) -> None:
        vector = free.get()
        exchange_bare(group, 1, vector, 1)
        free.put(vector)

    threads = [threading.Thread(target=serve, args=(group,)) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> int:
    """Runs the benchmark, or one of its workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=100_000_000, help="of the model (float32)")
    parser.add_argument("--threads", type=int, default=threads_beside(1), help="of the server and of the copy")
    parser.add_argument("--pushes", type=int, nargs="+", default=[1, PUSHES], help="that the server has memory for")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--inside", action="store_true", help="leave the processes out")
    parser.add_argument("--work", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    elements, turns = options.elements, options.turns
    if options.work:
        work(*options.work, elements, turns)
        return 0

    compute, both = ComputeThreads(options.threads), 2 * 4 * elements * WORKERS / 1e9
    print(f"{elements} parameters, {WORKERS} workers, {options.threads} compute thread(s), torch {torch.__version__},")
    print(f"load of the machine {os.getloadavg()[0]:.1f}; GB/s of models, pushes and answers together")
    (pushing, push_cpu), (copying, copy_cpu) = inside(elements, compute, turns)
    ratio = copying / pushing
    print(
        f"inside      {both / pushing:6.2f} GB/s, plain copy {both / copying:6.2f} GB/s: {ratio:.2f};"
        f" by the time of the cores {copy_cpu / push_cpu:.2f}"
    )
    for pushes in [] if options.inside else options.pushes:
        link, bare = among_processes(elements, compute, turns, pushes)
        print(
            f"processes   {both / link:6.2f} GB/s, bare gloo {both / bare:6.2f} GB/s: {bare / link:.2f};"
            f" {copying / link:.2f} of a plain copy; with memory for {pushes} push(es)"
        )
    found = parts(elements, compute)
    for name, needed in found.items():
        print(f"parts       {1e3 * needed:7.1f} ms to {name}")
    busy = found["inspect"] + found["apply and answer"]
    print(f"server_gigabytes_per_second: {4 * elements / busy / 1e9:.2g}")
    return int(ratio < LIMIT)


if __name__ == "__main__":
    sys.exit(main())
