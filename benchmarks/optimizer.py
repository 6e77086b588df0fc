"""Is a DelayedNesterov update limited by memory bandwidth? Compares it with copying the same number of bytes.

Prints the time relative to that copy, for the plain update, for the update that completes a window, and for the mean
over a window. Exits with 1 if the mean is above the limit. Run: python benchmarks/optimizer.py
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import mean, median

import torch

from lightning_halos.core.delayed_nesterov import DelayedNesterov


def seconds(function: Callable[[], object]) -> float:
    """Time that one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=40_000_000, help="float32 elements of the one parameter")
    parser.add_argument("--delay", type=int, default=16, help="updates in a window, at least 2")
    parser.add_argument("--activation", type=float, default=0.0)
    parser.add_argument("--windows", type=int, default=9, help="measured repeats")
    parser.add_argument("--limit", type=float, default=1.5, help="largest accepted ratio of the window mean")
    args = parser.parse_args()
    if args.delay < 2 or args.windows < 1:
        parser.error("--delay must be at least 2 and --windows at least 1")

    # Bytes that an update has to move per float32 element.
    plain = (
        4 * 5 if args.activation == 0 else 4 * 6
    )  # read g, m, p; write m, p (or read g, Delta, m, p; write Delta, p)
    completing = 4 * 5 if args.activation == 0 else 4 * 7
    moved = [plain] * (args.delay - 1) + [completing]

    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(args.elements, generator=generator))
    p.grad = torch.randn(args.elements, generator=generator)
    optimizer = DelayedNesterov([p], lr=1e-3, momentum=0.9, delay=args.delay, activation=args.activation)

    # A copy reads and writes: half of the bytes each. Both sides are filled, so that no page is touched first below.
    source = torch.randn(completing * args.elements // 8, generator=generator)
    target = torch.zeros_like(source).fill_(1.0)

    def copy(bytes_per_element: int) -> None:
        length = bytes_per_element * args.elements // 8
        target[:length].copy_(source[:length])

    for bytes_per_element in moved:  # one unmeasured window: makes the buffers and touches their pages
        optimizer.step()
        copy(bytes_per_element)

    # Copy and update alternate, so that both see the same disturbances.
    windows = [[(seconds(partial(copy, b)), seconds(optimizer.step), b) for b in moved] for _ in range(args.windows)]

    def report(name: str, copies: list[float], updates: list[float]) -> float:
        ratio = median(updates) / median(copies)
        print(
            f"{name:<18} update {1e3 * median(updates):7.1f} ms   copy {1e3 * median(copies):7.1f} ms   {ratio:5.2f}x"
        )
        return ratio

    print(
        f"{args.elements} float32 elements, delay {args.delay}, activation {args.activation}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {args.windows} windows"
    )
    samples = [sample for window in windows for sample in window]
    for name, completes in (("plain update", False), ("completing update", True)):
        chosen = [s for i, s in enumerate(samples, start=1) if (i % args.delay == 0) is completes]
        report(name, [c for c, _, _ in chosen], [u for _, u, _ in chosen])
    ratio = report(
        "window mean",
        [mean(c for c, _, _ in window) for window in windows],
        [mean(u for _, u, _ in window) for window in windows],
    )
    if ratio > args.limit:
        print(f"FAILED: the window mean is above {args.limit}x of a copy")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
