"""How fast are tokens read? Measures gigabytes per second of a corpus in Megatron's format, from the page cache.

    reading    shuffled batches of the corpus, read and collated in one process, per second of processor time: the work
               of a DataLoader worker, except for passing batches on
    loader     the same through a DataLoader with 2 workers, as uint16, as the data modules do it
    ready      the same DataLoader over tensors in memory: the cost of passing batches on
    int64      as `loader`, but tokens are converted to int64 before they are passed on
    copying    2 processes that copy the same number of bytes in memory

Bytes are those of the file (uint16). The measurements take turns, and each counts with its best turn, because other
load on the machine can only slow it down. Exits with 1 if `loader` is below 1 GB/s, unless the DataLoader itself is the
limit, that is, if `ready` is also below and `reading` is not. Run: python benchmarks/tokens.py
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_halos.data import IndexedTokens, IndexedTokensWriter

LIMIT = 1.0  # GB/s
WORKERS = 2
CONTEXT = 2048
GIGABYTE = 1e9


class Ready(Dataset[Tensor]):
    """Returns the same sequence, from memory, for every index."""

    def __init__(self, sequences: int) -> None:
        self.sequences = sequences
        self.row = torch.zeros(CONTEXT + 1, dtype=torch.uint16)

    def __len__(self) -> int:
        return self.sequences

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [self.row] * len(indices)


def through_loader(dataset: Any, order: list[int], batch_size: int) -> Callable[[], float]:
    """Returns a function that measures the seconds for all batches, with persistent workers."""
    loader = DataLoader(dataset, batch_size, sampler=order, num_workers=WORKERS, persistent_workers=True)

    def measure() -> float:
        start = time.perf_counter()
        for _ in loader:
            pass
        return time.perf_counter() - start

    return measure


def reading(tokens: IndexedTokens, order: list[int], batch_size: int) -> float:
    """Processor seconds to read and collate all batches in this process."""
    start = time.process_time()
    for first in range(0, len(order), batch_size):
        default_collate(tokens.__getitems__(order[first : first + batch_size]))
    return time.process_time() - start


def copying(size: int) -> float:
    """Seconds in which processes copy so many bytes together."""
    with multiprocessing.get_context("fork").Pool(WORKERS) as pool:
        return max(pool.map(copy, [size // WORKERS] * WORKERS, chunksize=1))


def copy(size: int) -> float:
    """Seconds in which a process copies so many bytes."""
    block = 1 << 20
    source, target = np.ones(64 * block, np.uint8), np.empty(block, np.uint8)
    start = time.perf_counter()
    for number in range(size // block):
        place = number % 64 * block
        target[:] = source[place : place + block]
    return time.perf_counter() - start


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=1 << 14, help="of 2049 tokens (default: 16384)")
    parser.add_argument("--batch-size", type=int, default=256, help="sequences in a batch (default: 256)")
    parser.add_argument("--rounds", type=int, default=40, help="of all measurements (default: 40)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "tokens"
        with IndexedTokensWriter(prefix) as writer:
            row = np.random.default_rng(0).integers(0, 50_000, CONTEXT + 1, np.uint16)
            for _ in range(arguments.sequences):
                writer.add(row)
        stored = IndexedTokens(prefix, CONTEXT, as_stored=True)
        order = torch.randperm(len(stored), generator=torch.Generator().manual_seed(0)).tolist()
        size, batch_size = len(stored) * (CONTEXT + 1) * stored.dtype.itemsize, arguments.batch_size
        measurements: dict[str, Callable[[], float]] = {
            "reading": lambda: reading(stored, order, batch_size),
            "loader": through_loader(stored, order, batch_size),
            "ready": through_loader(Ready(len(order)), order, batch_size),
            "int64": through_loader(IndexedTokens(prefix, CONTEXT), order, batch_size),
            "copying": lambda: copying(size),
        }
        seconds: dict[str, list[float]] = {name: [] for name in measurements}
        for _ in range(arguments.rounds):
            for name, measure in measurements.items():
                seconds[name].append(measure())
    rates = {name: size / min(times) / GIGABYTE for name, times in seconds.items()}
    print(f"{size / GIGABYTE:.2f} GB in {len(order)} sequences, {batch_size} in a batch, {WORKERS} workers")
    for name, rate in rates.items():
        print(f"{name:10} {rate:6.2f} GB/s")
    good = rates["loader"] >= LIMIT or rates["ready"] < LIMIT <= rates["reading"]
    shares = "   ".join(f"loader / {name}   {rates['loader'] / rates[name]:.2f}" for name in ("ready", "copying"))
    verdict = "ok" if good else "FAILED"
    print(f"{shares}   {verdict}: at least {LIMIT:g} GB/s, or what reads nothing (ready) is slower than that")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
