"""What does a narrow wire format cost in loss, and what does it save? Trains a small language model in each of them.

A simulated cluster of two regions trains the model of `time_to_loss.py` under HALoS, with real rounding, several times
with other seeds. Rows differ in the formats only. A run is a process of its own; what is in the results file already is
not run again::

    python benchmarks/wire.py                        # all rows
    python benchmarks/wire.py --rows float32 int4    # only these
    python benchmarks/wire.py --table-only           # the table again, without training

Exits with 1 if the loss with int4 between regions is more than 1 % above that with float32, on average, or if a message
has more than 0.16 of the bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from time_to_loss import MODEL, ROOT, quiet, train, write

from lightning_halos import SimulatedCluster
from lightning_halos.core.wire_formats import WireFormats
from lightning_halos.simulation.timing import Timing

STEPS, SEEDS = 600, (0, 1, 2)
MOST_LOSS, MOST_BYTES = 0.01, 0.16
CLUSTER = SimulatedCluster(
    bandwidths=[[1.0, 0.02], [0.02, 1.0]],  # Gbit/s
    worker_speeds=[[1.0, 0.5], [0.8, 0.25]],
    step_ms=100.0,
    message_bytes=40_000_000,
)
SETTINGS: dict[str, Any] = {
    "algorithm": "halos",
    "local_steps": 4,
    "accumulate_updates": 4,
    "merge_weight": 0.25,
    "local_optimizer": {"lr": 0.5, "momentum": 0.0, "delay": 1},
    "global_optimizer": {"lr": 0.5, "momentum": 0.2, "delay": 1},
}
ROWS: dict[str, dict[str, str]] = {
    "float32": {},
    "int4": {"between": "int4"},
    "int4 everywhere": {"within": "int4", "between": "int4"},
    "int8": {"between": "int8"},
    "bfloat16": {"between": "bfloat16"},
}


def run(row: str, seed: int, output: Path) -> None:
    """Trains once, and adds what came out to the results."""
    result = train({**SETTINGS, "wire": ROWS[row]}, CLUSTER, STEPS, seed)
    results = read(output)
    keys = ("wall_seconds", "virtual_hours", "val_loss", "samples")
    results.append({"row": row, "seed": seed, "steps": STEPS, "model": MODEL, **{key: result[key] for key in keys}})
    write(output / "results.json", results)


def read(output: Path) -> list[dict[str, Any]]:
    """Returns the results so far."""
    path = output / "results.json"
    return json.loads(path.read_text()) if path.exists() else []


def table(results: list[dict[str, Any]]) -> tuple[str, bool]:
    """Returns the table, and whether int4 keeps its limits."""
    losses = {row: [entry["val_loss"][-1] for entry in results if entry["row"] == row] for row in ROWS}
    hours = {row: [entry["virtual_hours"][-1] for entry in results if entry["row"] == row] for row in ROWS}
    timing, kept = Timing(CLUSTER, CLUSTER.message_bytes or 0), True
    lines = [f"{'format between regions':24}{'bytes':>8}{'final loss':>24}{'mean':>9}{'more':>9}{'hours':>9}"]
    for row, found in losses.items():
        if not found:
            continue
        size = timing.on(WireFormats.of(ROWS[row])).bytes_between / timing.message_bytes
        more = mean(found) / mean(losses["float32"]) - 1 if losses["float32"] else float("nan")
        shown = " ".join(f"{loss:.4f}" for loss in found)
        line = f"{row:24}{size:8.3f}{shown:>24}{mean(found):9.4f}{more:+9.2%}{mean(hours[row]):9.3f}"
        lines.append(line)
        if row == "int4":
            kept = more <= MOST_LOSS and size <= MOST_BYTES
    if len(losses["float32"]) > 1:
        noise = stdev(losses["float32"]) / mean(losses["float32"])
        lines.append(f"\nThe standard deviation of the loss over seeds, in float32: {noise:.2%} of it.")
    return "\n".join(lines), kept


def main() -> int:
    """Trains what is missing, each run in a process of its own, and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/wire", help="the folder of all files")
    parser.add_argument("--run", nargs=2, metavar=("ROW", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.run:
        quiet()
        run(args.run[0], int(args.run[1]), args.output)
        return 0
    failed = False
    for seed in args.seeds:
        for row in [] if args.table_only else args.rows:
            if not any((entry["row"], entry["seed"]) == (row, seed) for entry in read(args.output)):
                print(f"training: {row}, seed {seed}", flush=True)
                command = [sys.executable, *sys.argv, "--run", row, str(seed)]
                failed |= bool(subprocess.run(command, stderr=subprocess.STDOUT).returncode)
    text, kept = table(read(args.output))
    rows = [repr(row) if " " in row else row for row in dict.fromkeys(entry["row"] for entry in read(args.output))]
    (args.output / "table.txt").write_text(f"$ python benchmarks/wire.py --rows {' '.join(rows)}\n\n{text}\n")
    print(text)
    return int(failed or not kept)


if __name__ == "__main__":
    sys.exit(main())
