"""What does HALoS cost on a GPU? One command, at most five minutes, one GPU, no network. Prints Markdown.

    round       what a round needs besides training, part by part, and all of it: its parts run at the same time
    training    steps per second and peak memory of one worker, with and without overlap, against a plain Trainer
    workers     steps per second of two workers that share the GPU, against one
    checkpoint  a checkpoint during a fit: how long training stops for it, and the memory that it needs on the GPU
    evaluation  lm-eval of the trained model on the GPU, and whether it scores as on the CPU

Run: python benchmarks/gpu.py [--sizes 70m 410m 1.4b] [--minutes 5] [MEASUREMENT ...]
Without a GPU, to test the benchmark itself: python benchmarks/gpu.py --accelerator cpu --sizes tiny
What does not fit into memory, or into the time, is left out, and it says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_halos import HalosStrategy, LMEvalCallback, data, evaluate
from lightning_halos.core.algorithms import Halos
from lightning_halos.core.compat import gloo_group
from lightning_halos.core.global_node import GlobalNode
from lightning_halos.core.region_node import RegionNode
from lightning_halos.core.schedule import StepBudget
from lightning_halos.core.topology import Topology
from lightning_halos.core.vector import ModelVector
from lightning_halos.core.worker import WorkerRound
from lightning_halos.transport.groups import Groups
from lightning_halos.transport.runtime import NodeRuntime

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

LOCAL_STEPS, ROUNDS = 16, 2  # a round before them is for warming up
TIMES = 3  # that a part of a round is measured
QUESTIONS = 20
TIMEOUT = 120.0
TASK = "local_lambada"


@dataclass(frozen=True)
class Size:
    """A model of the Pythia suite (arXiv 2304.01373), or a tiny one, and its batches.

    Attributes:
        width: Of its layers.
        layers: How many there are.
        heads: Of the attention.
        vocabulary: Number of tokens.
        batch: Sequences in a batch.
        context: Tokens in a sequence.
    """

    width: int
    layers: int
    heads: int
    vocabulary: int = 50304
    batch: int = 8
    context: int = 512

    @property
    def architecture(self) -> dict[str, Any]:
        """Arguments of ``transformers.GPTNeoXConfig``."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": 4 * self.width,
            "max_position_embeddings": 2048,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }

    @property
    def parameters(self) -> int:
        """About as many parameters as the model has."""
        return 2 * self.vocabulary * self.width + 12 * self.layers * self.width**2


SIZES = {
    "tiny": Size(32, 2, 2, vocabulary=1024, batch=2, context=16),
    "70m": Size(512, 6, 8),
    "410m": Size(1024, 24, 16),
    "1.4b": Size(2048, 24, 16),
}


# ---------------------------------------------------------------------- what all measurements use


def device_of(accelerator: str) -> torch.device:
    """The device that is measured: the first one."""
    return torch.device("cuda", 0) if accelerator == "gpu" else torch.device("cpu")


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what is in its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """The seconds of some work, that of the device included."""
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begin


def forget_peaks(device: torch.device) -> None:
    """Lets the peaks of memory begin here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    Path("/proc/self/clear_refs").write_text("5")  # of the kernel's count of this process's memory


def peaks(device: torch.device) -> tuple[float, float]:
    """Peak memory of the device and of the host since :func:`forget_peaks`, in GB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return on_device / 1e9, int(status["VmHWM"].split()[0]) * 1024 / 1e9


class Tokens(Dataset[Tensor]):
    """Sequences of random tokens, which are the same each time."""

    def __init__(self, size: Size, number: int) -> None:
        self._size = size
        self._number = number

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randint(self._size.vocabulary, (self._size.context + 1,), generator=generator)


class Stamps(L.Callback):
    """Notes the time after each ``LOCAL_STEPS`` batches, which is once per round."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.batches = 0
        self.times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1
        if self.batches % LOCAL_STEPS == 0:
            synchronize(self.device)
            self.times.append(time.perf_counter())

    @property
    def rate(self) -> float:
        """Steps per second after the first round."""
        return (len(self.times) - 1) * LOCAL_STEPS / (self.times[-1] - self.times[0])


def make_model(size: Size, device: torch.device) -> L.LightningModule:
    """A new model, made on the device, where that takes no time."""
    from pretrain_pythia import Pythia

    torch.manual_seed(0)
    with device:
        return Pythia(size.architecture, warmup_steps=1)


def fit(size: Size, accelerator: str, strategy: Any, workers: int = 1, callbacks: Any = ()) -> tuple[Any, Any, Stamps]:
    """Trains a model. Returns the Trainer, the model and the times."""
    device = device_of(accelerator)
    stamps = Stamps(device)
    steps = (1 + ROUNDS) * LOCAL_STEPS * workers + 1  # workers share them by their speeds
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=1,
        num_nodes=workers,
        strategy=strategy,
        precision="bf16-mixed",
        max_steps=steps,
        callbacks=[stamps, *callbacks],
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = make_model(size, device)
    trainer.fit(model, DataLoader(Tokens(size, 2 * workers * steps * size.batch), size.batch))
    return trainer, model, stamps


def halos(**options: Any) -> HalosStrategy:
    """The strategy of all fits: one region, whose workers' rounds are equally long."""
    return HalosStrategy(regions=1, local_steps=LOCAL_STEPS, dynamic_local_steps=False, timeout=TIMEOUT, **options)


# ---------------------------------------------------------------------- what is printed, and when it is enough


class Bench:
    """Runs the processes of the measurements, and prints their results as tables.

    Args:
        sizes: The models, by name, the smallest first.
        accelerator: ``"gpu"`` or ``"cpu"``.
        seconds: Limit for everything.
    """

    def __init__(self, sizes: dict[str, Size], accelerator: str, seconds: float) -> None:
        self.sizes = sizes
        self.has_failed = False
        self._accelerator = accelerator
        self._deadline = time.monotonic() + seconds
        self._notes: list[str] = []

    def table(self, title: str, heads: list[str]) -> None:
        """Begins a table."""
        self.finish()
        print(f"\n## {title}\n\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}", flush=True)

    def row(self, *cells: str) -> None:
        """Prints a row."""
        print(f"| {' | '.join(cells)} |", flush=True)

    def finish(self) -> None:
        """Prints what was left out of the last table."""
        for note in self._notes:
            print(f"\n{note}", flush=True)
        self._notes = []

    def measure(
        self, process: str, name: str, vectors_on_device: int, vectors_on_host: int, processes: int = 1
    ) -> list[dict[str, float]]:
        """Returns what each process of a measurement found; nothing if it was left out, which is then noted.

        Args:
            process: One of ``PROCESSES``.
            name: Of the model.
            vectors_on_device: About how often its parameters must fit there, in float32.
            vectors_on_host: The same in host memory.
            processes: How many processes there are.
        """
        size, left = self.sizes[name], self._deadline - time.monotonic()
        lacking = self._lacking(size, vectors_on_device, vectors_on_host)
        if lacking or left <= 0:
            self._notes.append(f"Left out: {process} of {name}, {lacking or 'because the time is up'}.")
            return []
        with tempfile.TemporaryDirectory() as folder:
            words = ["--process", process, "--folder", folder, "--sizes", name, "--accelerator", self._accelerator]
            codes = run_processes([sys.executable, __file__, *words], Path(folder), processes, left)
            if None in codes:
                self._notes.append(f"Left out: {process} of {name}, which was not done when the time was up.")
                return []
            if any(codes):
                self.has_failed = True
                logs = "\n".join((Path(folder) / f"log{rank}").read_text()[-3000:] for rank in range(processes))
                self._notes.append(f"FAILED: {process} of {name}.\n\n```text\n{logs}\n```")
                return []
            return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(processes)]

    def _lacking(self, size: Size, vectors_on_device: int, vectors_on_host: int) -> str:
        """Says which memory is too small; nothing if none is."""
        model, logits = 4 * size.parameters, 4 * size.batch * size.context * size.vocabulary
        if (needed := vectors_on_host * model) > psutil.virtual_memory().available:
            return f"which needs about {needed / 1e9:.0f} GB of host memory"
        if self._accelerator == "gpu":
            needed = vectors_on_device * model + 6 * logits
            if needed > torch.cuda.get_device_properties(0).total_memory:
                return f"which needs about {needed / 1e9:.0f} GB of GPU memory"
        return ""


def run_processes(command: list[str], folder: Path, processes: int, limit: float) -> list[int | None]:
    """Runs a command in processes. Returns their exit codes, ``None`` for those that were not done in time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    started = []
    for rank in range(processes):
        several = {"RANK": str(rank), "NODE_RANK": str(rank), "LOCAL_RANK": "0", **address} if processes > 1 else {}
        with (folder / f"log{rank}").open("wb") as log:
            environment = {**os.environ, **several, "NUMBER": str(rank)}
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
    deadline = time.monotonic() + limit
    codes: list[int | None] = []
    try:
        for one in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.wait(max(0.1, deadline - time.monotonic()))
            codes.append(one.returncode)
    finally:
        for one in started:
            if one.poll() is None or not Path(f"/proc/{one.pid}").exists():  # or another process has its number now
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(one.pid, signal.SIGKILL)
            one.wait()
    return codes


# ---------------------------------------------------------------------- round


def round_process(folder: Path, size: Size, accelerator: str) -> dict[str, float]:
    """Rank 1 is a worker, whose rounds are measured, and rank 0 its server, which computes on the host."""
    rank, device = int(os.environ["RANK"]), device_of(accelerator)
    store = dist.FileStore(str(folder / "store"), 2)
    bare = gloo_group(dist.PrefixStore("bare", store), rank, 2, timedelta(seconds=TIMEOUT), "127.0.0.1")
    topology = Topology.build([[0, 1]], servers_per_region=1)
    module = make_model(size, device)
    vector = ModelVector(module)
    memory = vector.read(vector.new())
    nodes: tuple[Any, Any] = None, None
    groups = Groups(store, topology, rank, TIMEOUT, lambda: None)
    if rank == 0:
        shapes = vector.shapes
        del module, vector  # of which the server needs nothing on the device
        torch.cuda.empty_cache()
        server = Halos().local_server(0, 1, 2, memory.clone(), shapes, topology.describe)
        nodes = GlobalNode(None, 1, StepBudget(2)), RegionNode(server, Halos().planner(2), [0, 1], StepBudget(2))
    runtime = NodeRuntime(rank, topology, groups, *nodes, memory, TIMEOUT, lambda: None)
    worker = WorkerRound(rank, local_steps=LOCAL_STEPS)
    empty = torch.zeros(1)

    def one_way(source: int) -> None:
        """Sends the vector from one to the other, which says when it is there."""
        for tensor, sender in ((memory, source), (empty, 1 - source)):
            (bare.send if rank == sender else bare.recv)([tensor], 1 - rank, 0).wait()

    def exchange() -> None:
        worker.count(steps=LOCAL_STEPS, seconds=1.0)
        push = worker.push(memory)
        pull, progress = runtime.client.exchange(push, partial(vector.pseudo_gradient_, memory))
        vector.write(memory, progress)
        worker.receive(pull, waited=0.0)

    found: dict[str, list[float]] = {}

    def measure(part: str, work: Callable[[], object]) -> None:
        found[part] = [seconds_of(work, device) for _ in range(1 + TIMES)][1:]

    for part, source in (("send", 1), ("receive", 0)):
        measure(part, partial(one_way, source))
    if rank == 0:
        update, answer = torch.full_like(memory, 1e-6), torch.empty_like(memory)

        def apply() -> None:
            server.find(update)
            server.apply(update, True, answer)

        measure("apply", apply)
        one_way(0)  # the worker waits until this process computes no longer
    else:
        optimizer: Any = torch.optim.AdamW(module.parameters(), lr=1e-6)
        tokens = torch.randint(size.vocabulary, (size.batch, size.context + 1), device=device)

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16):
                logits = module(tokens[:, :-1])
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()

        def queued() -> float:
            """The seconds that the device still needs when the host is done with a step."""
            synchronize(device)
            step()
            begin = time.perf_counter()
            synchronize(device)
            return time.perf_counter() - begin

        one_way(0)
        found["synchronize"] = [queued() for _ in range(1 + TIMES)][1:]
        measure("copy", partial(vector.pseudo_gradient_, memory))
        measure("load", partial(vector.write, memory))
        measure("complete", exchange)
    runtime.client.finish(worker.push(None, final=True), lambda advance: None)
    runtime.alarm.close(TIMEOUT)
    return {part: median(times) for part, times in found.items()}


PARTS = ["synchronize", "copy", "send", "apply", "receive", "load", "complete"]


def round_(bench: Bench) -> None:
    """Prints the parts of a round for each size."""
    bench.table("A round, in milliseconds", ["model", "parameters", *PARTS])
    for name, size in bench.sizes.items():
        # The worker has two vectors and the server seven; both make the model on the device first.
        if found := bench.measure("round", name, vectors_on_device=6, vectors_on_host=11, processes=2):
            parts = found[0] | found[1]
            bench.row(name, f"{size.parameters / 1e6:.3g} M", *(f"{1e3 * parts[part]:.3g}" for part in PARTS))


# ---------------------------------------------------------------------- training


def training_process(folder: Path, size: Size, accelerator: str, kind: str) -> dict[str, float]:
    """Trains under a strategy."""
    strategies = {"plain": "auto", "halos": halos, "overlap": partial(halos, overlap=True)}
    strategy, device = strategies[kind], device_of(accelerator)
    forget_peaks(device)
    _, _, stamps = fit(size, accelerator, strategy() if callable(strategy) else strategy)
    on_device, on_host = peaks(device)
    return {"rate": stamps.rate, "device": on_device, "host": on_host}


def training(bench: Bench) -> None:
    """Prints steps per second and memory for each size."""
    heads = ["model", "strategy", "steps per second", "of the plain Trainer's", "GPU memory, GB", "host memory, GB"]
    bench.table(f"Training in bf16-mixed, rounds of {LOCAL_STEPS} steps", heads)
    titles = {"plain": "plain Trainer", "halos": "HALoS", "overlap": "HALoS, overlap"}
    for name in bench.sizes:
        plain = None
        for kind, title in titles.items():
            vectors = 1 if kind == "plain" else 16  # on the host: the worker's, and those of both servers
            if found := bench.measure(f"training-{kind}", name, vectors_on_device=5, vectors_on_host=vectors):
                (result,) = found
                rate = result["rate"]
                plain = rate if kind == "plain" else plain
                share = f"{rate / plain:.1%}" if plain else "-"
                memory = f"{result['device']:.2f}", f"{result['host']:.2f}"
                bench.row(name, title, f"{rate:.3g}", share, *memory)


# ---------------------------------------------------------------------- two workers


def workers_process(folder: Path, size: Size, accelerator: str) -> dict[str, float]:
    """Is one of two workers, each of which is the first device of its node."""
    device = device_of(accelerator)
    _, _, stamps = fit(size, accelerator, halos(), workers=2)
    return {"rate": stamps.rate, "device": peaks(device)[0]}


def workers(bench: Bench) -> None:
    """Prints what two workers on one device do."""
    bench.table("Two workers on one GPU", ["model", "steps per second of both", "GPU memory of each, GB"])
    name = next(iter(bench.sizes))
    if found := bench.measure("workers", name, vectors_on_device=10, vectors_on_host=20, processes=2):
        bench.row(name, f"{sum(one['rate'] for one in found):.3g}", ", ".join(f"{one['device']:.2f}" for one in found))


# ---------------------------------------------------------------------- checkpoint


class Saving(L.Callback):
    """Saves a checkpoint in the second round.

    Attributes:
        seconds: That training stopped for it.
        models: Memory that it needed on the device, in models.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device = path, device
        self.batches = 0
        self.seconds = self.models = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.batches += 1
        if self.batches == LOCAL_STEPS + 2:
            synchronize(self.device)
            is_gpu = self.device.type == "cuda"
            before = torch.cuda.memory_allocated(self.device) if is_gpu else 0
            forget_peaks(self.device)
            self.seconds = seconds_of(partial(trainer.save_checkpoint, self.path), self.device)
            model = sum(parameter.nbytes for parameter in pl_module.parameters())
            self.models = max(0.0, peaks(self.device)[0] * 1e9 - before) / model


def checkpoint_process(folder: Path, size: Size, accelerator: str) -> dict[str, float]:
    """Trains, and saves meanwhile."""
    saving = Saving(folder / "middle.ckpt", device_of(accelerator))
    fit(size, accelerator, halos(), callbacks=[saving])
    saved = [path for path in folder.rglob("*") if path.is_file() and "middle" in str(path)]
    tensors = torch.load(folder / "middle.ckpt", weights_only=True, map_location="meta")["state_dict"].values()
    assert any(path.name == "manifest.json" for path in saved), "the checkpoint is not complete"
    assert len(tensors) > 0
    return {"stopped": saving.seconds, "models": saving.models, "gigabytes": sum(p.stat().st_size for p in saved) / 1e9}


def checkpoint(bench: Bench) -> None:
    """Prints what a checkpoint during a fit costs."""
    heads = ["model", "training stops for, s", "GPU memory for it, in models", "on disk, GB"]
    bench.table("A checkpoint during a fit", heads)
    name = next(iter(bench.sizes))
    if found := bench.measure("checkpoint", name, vectors_on_device=5, vectors_on_host=28):
        (result,) = found
        bench.row(name, f"{result['stopped']:.3g}", f"{result['models']:.3g}", f"{result['gigabytes']:.3g}")


# ---------------------------------------------------------------------- evaluation


def evaluation_process(folder: Path, size: Size, accelerator: str) -> dict[str, float]:
    """Trains with the callback, and evaluates the model on the device and on the host."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[::10]
    documents = (file.read_text(encoding="utf-8") for file in files)
    tokenizer = data.train_tokenizer(documents, min(size.vocabulary, 4096))
    few: dict[str, Any] = {"tokenizer": tokenizer, "include_path": EXAMPLES / "tasks", "limit": QUESTIONS}
    callback = LMEvalCallback(TASK, every_n_steps=LOCAL_STEPS, **few)
    trainer, model, _ = fit(size, accelerator, halos(), callbacks=[callback])
    found = {"in the fit": float(trainer.callback_metrics[f"lm_eval/{TASK}/perplexity"])}
    for place, device in (("device", device_of(accelerator)), ("host", torch.device("cpu"))):
        model.to(device)
        begin = time.perf_counter()
        results = evaluate(model.model, TASK, **few)
        found[f"{place} seconds"] = time.perf_counter() - begin
        found[place] = results["results"][TASK]["perplexity,none"]
    return found


def evaluation(bench: Bench) -> None:
    """Prints how fast and how alike the model is evaluated on the device and on the host."""
    heads = ["model", "in the fit", "afterwards on the GPU", "on the CPU", "seconds on the GPU", "on the CPU"]
    bench.table(f"lm-eval: perplexity in {TASK}, {QUESTIONS} questions", heads)
    name = next(iter(bench.sizes))
    if found := bench.measure("evaluation", name, vectors_on_device=5, vectors_on_host=20):
        (result,) = found
        scores = [f"{result[key]:.6g}" for key in ("in the fit", "device", "host")]
        bench.row(name, *scores, *(f"{result[f'{place} seconds']:.3g}" for place in ("device", "host")))


# ---------------------------------------------------------------------- the runs

MEASUREMENTS: dict[str, Callable[[Bench], None]] = {
    "round": round_,
    "training": training,
    "workers": workers,
    "checkpoint": checkpoint,
    "evaluation": evaluation,
}
PROCESSES: dict[str, Callable[[Path, Size, str], dict[str, float]]] = {
    "round": round_process,
    **{f"training-{kind}": partial(training_process, kind=kind) for kind in ("plain", "halos", "overlap")},
    "workers": workers_process,
    "checkpoint": checkpoint_process,
    "evaluation": evaluation_process,
}


def machine(accelerator: str) -> str:
    """Names the machine."""
    cores, memory = os.cpu_count(), psutil.virtual_memory().total / 1e9
    software = f"Python {platform.python_version()}, torch {torch.__version__}"
    host = f"{cores} CPU cores, {memory:.0f} GB of host memory, {software}"
    if accelerator == "cpu":
        return f"Not a GPU: {host}. These numbers only show that the benchmark runs."
    card = torch.cuda.get_device_properties(0)
    return f"{card.name}, {card.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}; {host}."


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurements", nargs="*", metavar="MEASUREMENT", help=f"of {', '.join(MEASUREMENTS)}")
    parser.add_argument("--accelerator", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[name for name in SIZES if name != "tiny"])
    parser.add_argument("--minutes", type=float, default=5.0, help="limit for everything")
    parser.add_argument("--process", choices=PROCESSES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.measurements) - set(MEASUREMENTS):
        parser.error(f"no such measurement: {', '.join(unknown)}")
    if args.accelerator == "gpu" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; to test the benchmark: --accelerator cpu --sizes tiny")
    if args.process:
        warnings.filterwarnings("ignore")
        logging.getLogger("lightning").setLevel(logging.ERROR)
        found = PROCESSES[args.process](args.folder, SIZES[args.sizes[0]], args.accelerator)
        (args.folder / f"{os.environ['NUMBER']}.json").write_text(json.dumps(found))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through what ends the processes
    sizes = {name: size for name, size in SIZES.items() if name in args.sizes}
    bench = Bench(sizes, args.accelerator, 60 * args.minutes)
    print(machine(args.accelerator))
    for name in args.measurements or MEASUREMENTS:
        MEASUREMENTS[name](bench)
    bench.finish()
    return int(bench.has_failed)


if __name__ == "__main__":
    sys.exit(main())
