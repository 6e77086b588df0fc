"""What is the overhead of HALoS over plain training? Compares training with and without it, in the same run.

    round trip   pseudo-gradient, push, apply, pull and load of a 40M-parameter model between two processes, against a
                 bare gloo send and receive of the same bytes between the same two
    throughput   steps per second of two workers of one region, against two independent Trainers side by side, for the
                 model of examples/train_char_lm.py
    monitor      steps per second of two workers with HalosMonitor, a logger and the progress bar, against the same
                 without HalosMonitor
    memory       peak memory of a leader beyond that of a worker, in multiples of a 40M-parameter model
    divided      peak memory of a process of a worker of 4 processes with FSDP2, against one process, for a model of
                 100M parameters with AdamW, libraries included, with the packages that lightning-halos requires
    lanes        bytes per round that a process of a worker of 4 processes sends and receives for HALoS, with 4 lanes
                 against one lane, for a 4M-parameter model

Prints each number and exits with 1 if one is outside its limit. Run: python benchmarks/overhead.py [MEASUREMENT ...]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from required import make_environment
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_halos import HalosMonitor, HalosStrategy
from lightning_halos.core.algorithms import Halos
from lightning_halos.core.compat import gloo_group
from lightning_halos.core.global_node import GlobalNode
from lightning_halos.core.region_node import RegionNode
from lightning_halos.core.schedule import StepBudget
from lightning_halos.core.topology import Topology
from lightning_halos.core.vector import ModelVector
from lightning_halos.core.worker import WorkerRound
from lightning_halos.transport.groups import Groups
from lightning_halos.transport.link import GlooLink
from lightning_halos.transport.runtime import NodeRuntime

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

ROUND_TRIP_LIMIT = 2.0  # times the bare send and receive
THROUGHPUT_LIMIT = 0.95  # of the independent Trainers' steps per second
MONITOR_LIMIT = 0.98  # of the steps per second without it
MEMORY_LIMIT = 8.0  # models, for a leader of 4 workers, of which three push at the same time
DIVIDED_LIMIT = 0.35  # of the peak memory of one process
LANES, LANES_LIMIT = 4, 0.27  # of the bytes per process of one lane

ROUND_TRIPS = 31
FITS, STEPS, WARM_UP = 15, 120, 24  # many short fits, so that other load on the machine affects both kinds alike
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "limit_val_batches": 0,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def layers(number: int) -> nn.Sequential:
    """About 40M parameters in so many layers."""
    width = round((40e6 / number) ** 0.5)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(number)))


# ---------------------------------------------------------------------- round trip


def round_trip_process(folder: Path) -> None:
    """Two ranks take turns at bare round trips and at those of a worker; rank 1 takes the time."""
    rank, timeout = int(os.environ["RANK"]), 60.0
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = dist.FileStore(str(folder / "store"), 2)
    bare = gloo_group(dist.PrefixStore("bare", store), rank, 2, timedelta(seconds=timeout), "127.0.0.1")
    topology = Topology.build([[0, 1]], servers_per_region=1)
    module = layers(40)
    vector = ModelVector(module)
    memory = vector.read(vector.new())
    groups = Groups(store, topology, rank, timeout, lambda: None)
    nodes: tuple[Any, Any] = None, None
    if rank == 0:
        server = Halos().local_server(0, 1, 2, memory.clone(), vector.shapes, topology.describe)
        nodes = GlobalNode(None, 1, StepBudget(2)), RegionNode(server, Halos().planner(2), [0, 1], StepBudget(2))
    runtime = NodeRuntime(rank, topology, groups, *nodes, memory, timeout, lambda: None)
    worker = WorkerRound(rank, local_steps=8)
    buffer = torch.ones_like(memory)
    peer = 1 - rank

    def send() -> None:
        bare.send([buffer], peer, 0).wait()

    def receive() -> None:
        bare.recv([buffer], peer, 0).wait()

    def exchange() -> None:
        push = worker.push(memory)
        pull, progress = runtime.client.exchange(push, partial(vector.pseudo_gradient_, memory))
        vector.write(memory, progress)
        worker.receive(pull, waited=0.0)

    if rank == 0:
        for _ in range(ROUND_TRIPS + 1):
            receive()
            send()
    else:
        times = []
        for _ in range(ROUND_TRIPS + 1):
            start = time.perf_counter()
            send()
            receive()
            between = time.perf_counter()
            worker.count(steps=8, seconds=1.0)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.mul_(0.999)
            begin = time.perf_counter()
            exchange()
            times.append((between - start, time.perf_counter() - begin))
        (folder / "times").write_text(json.dumps(times[1:]))
    runtime.client.finish(worker.push(None, final=True), lambda advance: None)
    runtime.alarm.close(timeout)


def round_trip() -> bool:
    """Prints the time of a round trip against a bare one. Returns whether it is within the limit."""
    with tempfile.TemporaryDirectory() as name:
        run("round-trip", Path(name), processes=2)
        bare, halos = map(median, zip(*json.loads((Path(name) / "times").read_text()), strict=True))
    print(f"round trip    {halos * 1e3:5.0f} ms   bare {bare * 1e3:5.0f} ms   {halos / bare:6.2f}x", end="")
    return verdict(halos / bare <= ROUND_TRIP_LIMIT, f"at most {ROUND_TRIP_LIMIT:g}x")


# ---------------------------------------------------------------------- throughput


class Stamps(L.Callback):
    """Notes when each batch ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.times.append(time.monotonic())  # the same clock in all processes


def stamped_fit(*callbacks: L.Callback, **flags: Any) -> str:
    """Trains the demo's model. Returns when each batch ended, as JSON."""
    from train_char_lm import ByteGPT, StandardLibrary

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # the time of a step must not depend on the values that it computes
    stamps = Stamps()
    trainer = L.Trainer(**{**QUIET, **flags}, max_steps=STEPS, callbacks=[stamps, *callbacks])
    trainer.fit(ByteGPT(), StandardLibrary())
    return json.dumps(stamps.times)


def throughput_process(folder: Path) -> None:
    """Two processes take turns at being the workers of a region and being on their own."""
    for fit in range(FITS):
        halos = HalosStrategy(regions=1, local_steps=8)
        for name, strategy, devices in ("halos", halos, 2), ("alone", "auto", 1):
            times = stamped_fit(strategy=strategy, devices=devices)
            (folder / f"{name}-{fit}-{halos.global_rank}").write_text(times)
        halos.barrier()


def monitor_process(folder: Path) -> None:
    """The two workers of a region train with the callback and without it, in turns; the order changes each time."""
    kinds: list[tuple[str, list[L.Callback]]] = [("with it", [HalosMonitor()]), ("without", [])]
    for fit in range(FITS):
        for name, callbacks in kinds[:: 1 if fit % 2 else -1]:
            halos = HalosStrategy(regions=1, local_steps=8)
            logger = CSVLogger(folder, name="logs", version=f"{name}-{fit}")
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # where the bar would be
                times = stamped_fit(*callbacks, strategy=halos, devices=2, logger=logger, enable_progress_bar=True)
            (folder / f"{name}-{fit}-{halos.global_rank}").write_text(times)
            halos.barrier()


def steps_per_second(paths: list[Path]) -> float:
    """Steps of all processes per second, while all of them are past the warm-up and none has ended."""
    processes = [json.loads(path.read_text()) for path in paths]
    start, end = max(times[WARM_UP] for times in processes), min(times[-1] for times in processes)
    return sum(start < stamp <= end for times in processes for stamp in times) / (end - start)


def compare(measurement: str, kind: str, other: str, limit: float) -> bool:
    """Prints the steps per second of two kinds of fits. Returns whether the ratio of pairs is within the limit."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(measurement, folder)
        these, those = (
            [steps_per_second([folder / f"{one}-{fit}-{rank}" for rank in range(2)]) for fit in range(FITS)]
            for one in (kind, other)
        )
    low, share, high = quantiles([this / that for this, that in zip(these, those, strict=True)])
    spread = f"(quartiles {low:.1%} and {high:.1%})"
    speeds = f"{median(these):5.1f} /s   {other} {median(those):5.1f} /s"
    print(f"{measurement:14}{speeds}   {share:6.1%} {spread}", end="")
    return verdict(share >= limit, f"at least {limit:.0%}")


def throughput() -> bool:
    """Prints steps per second with and without HALoS. Returns whether they are within the limit."""
    return compare("throughput", "halos", "alone", THROUGHPUT_LIMIT)


def monitor() -> bool:
    """Prints steps per second with and without HalosMonitor. Returns whether they are within the limit."""
    return compare("monitor", "with it", "without", MONITOR_LIMIT)


# ---------------------------------------------------------------------- memory


class Wide(L.LightningModule):
    """About 40M parameters, and next to nothing else in memory."""

    def __init__(self) -> None:
        super().__init__()
        # Gradients of more than 32 MiB go back to the system when they are freed, instead of into malloc's heap.
        self.layers = layers(4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.layers(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def memory_process(folder: Path, regions: list[list[int]] | None) -> None:
    """Trains, and notes the peak memory of this process. Without regions it trains alone."""
    torch.set_num_threads(1)
    halos = HalosStrategy(regions=regions, local_steps=2, accumulate_updates=4) if regions else "auto"
    trainer = L.Trainer(strategy=halos, devices=sum(map(len, regions or [[0]])), **QUIET, max_steps=24)
    module = Wide()
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(256, module.layers[0].in_features))))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    (folder / str(trainer.global_rank)).write_text(status["VmHWM"].split()[0])
    trainer.strategy.barrier()


APART = [[0], [1, 2, 3, 4]]
TOGETHER = [[0, 1], [2, 3]]


def peaks(measurement: str, processes: int) -> list[float]:
    """Peak memory of each process of a run, in models."""
    model = sum(parameter.nbytes for parameter in Wide().parameters()) / 1024
    with tempfile.TemporaryDirectory() as name:
        run(measurement, Path(name))
        return [int((Path(name) / str(rank)).read_text()) / model for rank in range(processes)]


def memory() -> bool:
    """Prints what leaders need beyond training. Returns whether it is within the limit."""
    (alone,), apart, together = peaks("memory-alone", 1), peaks("memory-apart", 5), peaks("memory-together", 4)
    worker = mean(apart[2:])
    leader = apart[1]
    print(f"memory        leader of 4 workers, beyond a worker:   {leader - worker:4.1f} models", end="")
    good = verdict(leader - worker <= MEMORY_LIMIT, f"at most {MEMORY_LIMIT:g}")
    print(f"              leader of 4 workers, beyond a Trainer:  {leader - alone:4.1f} models")
    both = together[0] - mean([together[1], together[3]])
    print(f"              both servers, 2 regions of 2 workers:   {both:4.1f} models")
    return good


# ---------------------------------------------------------------------- divided


class Divisible(L.LightningModule):
    """About 100M parameters, divided among a worker's processes if there are several."""

    width, depth = 2048, 24

    def configure_model(self) -> None:
        mesh = self.device_mesh
        with torch.device("cpu" if mesh is None else "meta"):
            self.layers = nn.Sequential(*(nn.Linear(self.width, self.width) for _ in range(self.depth)))
        if mesh is not None:
            for layer in self.layers:
                fully_shard(layer, mesh=mesh["data_parallel"])
            fully_shard(self.layers, mesh=mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.layers(batch[0]).square().mean()
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.layers(batch[0]).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def divided_process(folder: Path, processes: int) -> None:
    """Trains one worker, and notes what memory this process had before the fit, and its peak."""
    torch.set_num_threads(1)
    inner = ModelParallelStrategy() if processes > 1 else None
    halos = HalosStrategy(local_steps=2, worker=processes, inner=inner)
    quiet = {**QUIET, "limit_val_batches": 2, "val_check_interval": 4, "num_sanity_val_steps": 0}
    trainer = L.Trainer(strategy=halos, devices=processes, **quiet, max_steps=8)
    before = Path("/proc/self/status").read_text()
    samples = DataLoader(TensorDataset(torch.randn(64, Divisible.width)))
    trainer.fit(Divisible(), samples, samples)
    after = Path("/proc/self/status").read_text()
    fields = [dict(line.split(":", 1) for line in text.splitlines()) for text in (before, after)]
    (folder / str(trainer.global_rank)).write_text(f"{fields[0]['VmRSS'].split()[0]} {fields[1]['VmHWM'].split()[0]}")
    halos.barrier()


def divided() -> bool:
    """Prints the peak memory per process of one process and of 4. Returns whether they are within the limit.

    Freed memory goes back to the system at once: in malloc's heaps, one for each thread, it would hide what is used.
    """
    most: dict[int, tuple[int, int]] = {}
    with tempfile.TemporaryDirectory() as name:
        python = make_environment(Path(name) / "environment")
        for processes in (1, LANES):
            (folder := Path(name) / str(processes)).mkdir()
            run(f"divided-{processes}", folder, python=python, MALLOC_MMAP_THRESHOLD_="1000000")
            sizes = [tuple(map(int, (folder / str(rank)).read_text().split())) for rank in range(processes)]
            most[processes] = max((peak * 1024, before * 1024) for before, peak in sizes)
    (peak, libraries), (alone, _) = most[LANES], most[1]
    share, beyond = peak / alone, (peak - libraries) / (alone - libraries)
    print(f"divided       {LANES} processes {peak / 1e9:5.2f} GB each   one {alone / 1e9:5.2f} GB", end="")
    print(f"   {share:6.3f} (beyond the libraries' {libraries / 1e9:4.2f} GB {beyond:5.3f})", end="")
    return verdict(share <= DIVIDED_LIMIT, f"at most {DIVIDED_LIMIT:g}")


# ---------------------------------------------------------------------- lanes


class Narrow(Wide):
    """About 4M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(1000, 1000) for _ in range(4)))


class Rounds(L.Callback):
    """Notes the rounds of this worker."""

    number = 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        strategy: Any = trainer.strategy
        self.number = strategy.round.number


def lanes_process(folder: Path, lanes: int | None) -> None:
    """Trains two workers of 4 processes, and notes the bytes per round of this process's links.

    The links are those between workers and servers, and those between the lanes of a worker. What DDP sends inside a
    worker is not counted.
    """
    torch.set_num_threads(1)
    links: list[GlooLink] = []
    make = GlooLink.__init__

    def note(link: GlooLink, *args: Any, **kwargs: Any) -> None:
        make(link, *args, **kwargs)
        links.append(link)

    GlooLink.__init__ = note  # type: ignore[method-assign]
    halos = HalosStrategy(regions=1, local_steps=2, dynamic_local_steps=False, worker=LANES)
    vars(halos)["_lanes"] = lanes
    rounds = Rounds()
    trainer = L.Trainer(strategy=halos, devices=2 * LANES, **QUIET, max_steps=24, callbacks=[rounds])
    trainer.fit(Narrow(), DataLoader(TensorDataset(torch.randn(1024, 1000))))
    size = sum(link.bytes_sent + link.bytes_received for link in links) / rounds.number
    (folder / str(trainer.global_rank)).write_text(str(size))
    halos.barrier()


def lanes() -> bool:
    """Prints the bytes per process with one lane and with 4. Returns whether they are within the limit."""
    most = {}
    for number in (1, LANES):
        with tempfile.TemporaryDirectory() as name:
            run(f"lanes-{number}", Path(name))
            # Of the worker that does not lead the region.
            most[number] = max(float((Path(name) / str(rank)).read_text()) for rank in range(LANES, 2 * LANES))
    share, sizes = most[LANES] / most[1], {number: f"{size / 1e6:5.2f} MB" for number, size in most.items()}
    print(f"lanes         {LANES} lanes {sizes[LANES]}   one {sizes[1]}   {share:6.3f}", end="")
    return verdict(share <= LANES_LIMIT, f"at most {LANES_LIMIT:g}")


# ---------------------------------------------------------------------- the runs

MEASUREMENTS: dict[str, Callable[[], bool]] = {
    "round-trip": round_trip,
    "throughput": throughput,
    "monitor": monitor,
    "memory": memory,
    "divided": divided,
    "lanes": lanes,
}
PROCESSES: dict[str, Callable[[Path], None]] = {
    "round-trip": round_trip_process,
    "throughput": throughput_process,
    "monitor": monitor_process,
    "memory-alone": partial(memory_process, regions=None),
    "memory-apart": partial(memory_process, regions=APART),
    "memory-together": partial(memory_process, regions=TOGETHER),
    "divided-1": partial(divided_process, processes=1),
    f"divided-{LANES}": partial(divided_process, processes=LANES),
    "lanes-1": partial(lanes_process, lanes=1),
    f"lanes-{LANES}": partial(lanes_process, lanes=LANES),
}


def run(process: str, folder: Path, processes: int = 1, python: Path | str = sys.executable, **variables: str) -> None:
    """Runs this script as one of ``PROCESSES``. Lightning starts those of its workers itself."""
    command = [str(python), __file__, "--process", process, "--folder", str(folder)]
    started = [
        subprocess.Popen(command, env={**os.environ, **variables, **({"RANK": str(rank)} if processes > 1 else {})})
        for rank in range(processes)
    ]
    codes = [one.wait() for one in started]
    if any(codes):
        raise SystemExit(f"A process of the measurement {process} failed.")


def verdict(is_good: bool, limit: str) -> bool:
    """Prints whether a number is within its limit, and returns it."""
    print(f"   {'ok' if is_good else 'FAILED'}: {limit}", flush=True)
    return is_good


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurements", nargs="*", metavar="MEASUREMENT", help=f"one of {', '.join(MEASUREMENTS)}")
    parser.add_argument("--process", choices=PROCESSES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.measurements) - set(MEASUREMENTS):
        parser.error(f"no such measurement: {', '.join(unknown)}")
    if args.process:
        warnings.filterwarnings("ignore")
        logging.getLogger("lightning").setLevel(logging.ERROR)
        PROCESSES[args.process](args.folder)
        return 0
    results = [MEASUREMENTS[name]() for name in args.measurements or MEASUREMENTS]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
