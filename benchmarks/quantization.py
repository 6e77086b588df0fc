"""How fast are the wire formats on one core? Compares them with a plain copy, and with other ways to compute int8.

Prints GB of float32 numbers per second of the thread's own processor time, so that other processes count less, for
encoding, decoding and rounding in place, and fails if encoding to int8 or int4 is below its limit. The other ways:

    at once             the same operations on the complete vector instead of parts that fit the cache
    prepack             `torch.ops.quantized.embedding_bag_byte_prepack`: fbgemm's kernel, which needs 8 bytes per row
                        for its scale, and is not idempotent
    per channel         `torch.quantize_per_channel` with given scales
    NumPy               the same operations in parts, with NumPy

Run: python benchmarks/quantization.py, with --device cuda on a GPU
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch

from lightning_halos.core import quantization
from lightning_halos.core.quantization import BLOCK, FORMATS, decode, encode, nbytes, round_

LIMITS = {"int8": 1.0, "int4": 0.6}  # GB/s
PART = 2**20  # elements, as links send them


def rate(run: Callable[[], object], size: int, repeats: int, device: str) -> float:
    """Returns the GB/s of the fastest of several runs, by the thread's processor time or, on a GPU, by the clock."""
    clock = time.thread_time if device == "cpu" else time.perf_counter
    run()
    fastest = float("inf")
    for _ in range(repeats):
        if device != "cpu":
            torch.cuda.synchronize()
        start = clock()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        fastest = min(fastest, clock() - start)
    return size / fastest / 1e9


def at_once(vector: torch.Tensor) -> torch.Tensor:
    """Int8 without parts."""
    blocks = vector.view(-1, BLOCK)
    scale = (blocks.abs().amax(1, keepdim=True) / 127).bfloat16().float()
    return (blocks / scale).round().to(torch.int8)


def by_numpy(vector: torch.Tensor) -> np.ndarray:
    """Int8 in parts of the same size, with NumPy."""
    values, out = vector.numpy().reshape(-1, BLOCK), np.empty((vector.numel() // BLOCK, BLOCK), dtype=np.int8)
    rows = 2**16 // BLOCK
    work = np.empty((rows, BLOCK), dtype=np.float32)
    for start in range(0, len(values), rows):
        part = values[start : start + rows]
        own = work[: len(part)]
        scale = np.abs(part, out=own).max(axis=1, keepdims=True) / 127
        np.rint(np.multiply(part, 1 / scale, out=own), out=own)
        out[start : start + rows] = own
    return out


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=2**24)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.elements % PART:
        parser.error(f"--elements must be a multiple of {PART}")
    warnings.filterwarnings("ignore", message=".*deprecat.*")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vector, device = torch.randn(args.elements).to(args.device), args.device
    target, parts = torch.empty_like(vector), torch.split(vector, PART)
    outs = torch.split(target, PART)

    def measure(run: Callable[[], object]) -> float:
        return rate(run, vector.nbytes, args.repeats, device)

    copy, failed = measure(lambda: target.copy_(vector)), False
    print(f"{args.elements:,} elements in parts of {PART:,} on {device}, GB/s of float32; a plain copy: {copy:.1f}\n")
    print(f"{'format':10s} {'bits':>6s} {'encode':>8s} {'decode':>8s} {'round':>8s}")
    for form in FORMATS[1:]:
        data = [encode(part, form) for part in parts]

        def decode_all(data: list[torch.Tensor] = data, form: quantization.Format = form) -> None:
            for own, out in zip(data, outs, strict=True):
                decode(own, out, form)

        found = [
            measure(lambda form=form: [encode(part, form) for part in parts]),
            measure(decode_all),
            measure(lambda form=form: [round_(part, form) for part in outs]),
        ]
        bits = 8 * nbytes(PART, form) / PART
        limit = LIMITS.get(form, 0.0)
        failed |= found[0] < limit
        print(f"{form:10s} {bits:6.2f} " + " ".join(f"{value:8.2f}" for value in found), end="")
        print(f"   (limit {limit:g})" if limit else "")
    if device == "cpu":
        blocks, scales = vector.view(-1, BLOCK), vector.view(-1, BLOCK).abs().amax(1) / 127
        zeros = torch.zeros(len(blocks), dtype=torch.long)
        others: dict[str, Callable[[], object]] = {
            "at once": lambda: at_once(vector),
            "prepack": lambda: torch.ops.quantized.embedding_bag_byte_prepack(blocks),
            "per channel": lambda: torch.quantize_per_channel(blocks, scales, zeros, 0, torch.qint8),
            "NumPy": lambda: by_numpy(vector),
        }
        print("\nother ways to encode to int8")
        for name, run in others.items():
            print(f"{name:20s} {measure(run):6.2f}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
