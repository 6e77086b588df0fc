"""What does overlap do to the time to a loss? Trains in three simulated clusters, with and without it, with 3 seeds.

Each run is a process of its own, and writes a JSON file of its own. Those that are there are not repeated::

    python benchmarks/overlap.py                    # what is missing, and the table
    python benchmarks/overlap.py --seeds 0          # one seed only
    python benchmarks/overlap.py --table-only       # trains nothing
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from lightning_halos import SimulatedCluster
from lightning_halos.core.algorithms import Halos
from lightning_halos.planning.planner import make_timing, plan

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from time_to_loss import TUNED, Result, quiet, time_to, train, write  # noqa: E402  (a script beside this one)

CLUSTERS = {  # files in examples/clusters, and what they are
    "paper": "the paper's",
    "fast_gpus": "10 times faster GPUs, 10 Gbit/s inside",
    "large_model": "1.4 billion parameters",
}
SETTINGS = {"default": {"algorithm": "halos", "defaults": "published"}, "tuned": TUNED["tuned"]}
NAMES = {"default": "published: H 8, K 32, momentum", "tuned": "tuned: H 4, K 8, no momentum"}
STEPS = 300  # global steps: a local step of every worker
MODEL = {"context": 32, "depth": 2, "width": 48, "heads": 4, "lr": 3e-3}


def name_of(cluster: str, setting: str, overlap: bool, seed: int) -> str:
    """Returns the name of a run's file."""
    return f"{cluster}-{setting}-{'overlap' if overlap else 'waiting'}-{seed}.json"


def run(cluster: str, setting: str, overlap: bool, seed: int) -> Result:
    """Trains once."""
    quiet()
    described = SimulatedCluster.from_yaml(ROOT / f"examples/clusters/{cluster}.yaml")
    return train({**SETTINGS[setting], "overlap": overlap}, described, STEPS, seed, MODEL)


def predicted(cluster: str, setting: str) -> float:
    """Returns the time of a global step with overlap, as a share of that without, as the planner sees it."""
    described = SimulatedCluster.from_yaml(ROOT / f"examples/clusters/{cluster}.yaml")
    rounds = {
        name: SETTINGS[setting][name] for name in ("local_steps", "accumulate_updates") if name in SETTINGS[setting]
    }
    halos = [Halos(**rounds, overlap=overlap) for overlap in (False, True)]  # without a length, K is the published one
    one, other = (plan(algorithm, make_timing(described)) for algorithm in halos)
    return other.seconds_per_global_step / one.seconds_per_global_step


def until_the_end(result: Result) -> Result:
    """Returns a run without its last validation, whose time is that of the last updates between regions."""
    return {**result, **{name: result[name][:-1] for name in ("global_step", "virtual_hours", "val_loss")}}


def table(output: Path) -> str:
    """Compares the runs that are there: each seed's pair by the lowest loss that both reach before the end."""
    lines = [
        f"{'':78}time with overlap / without",
        f"{'cluster':40}{'settings':30}{'seeds':>6}{'per global step':>17}{'to the same loss':>22}"
        f"{'loss without':>14}{'with':>8}",
    ]
    for cluster, title in CLUSTERS.items():
        for setting in SETTINGS:
            pairs = []
            for seed in range(100):
                paths = [output / name_of(cluster, setting, overlap, seed) for overlap in (False, True)]
                if all(path.exists() for path in paths):
                    pairs.append([until_the_end(json.loads(path.read_text())) for path in paths])
            if not pairs:
                continue
            ratios = []
            for one, two in pairs:
                target = max(min(one["val_loss"]), min(two["val_loss"]))
                ratios.append(time_to(two, target) / time_to(one, target))
            losses = [np.mean([min(pair[index]["val_loss"]) for pair in pairs]) for index in (0, 1)]
            spread = f"{np.mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            lines.append(
                f"{title:40}{NAMES[setting]:30}{len(pairs):6}{predicted(cluster, setting):17.2f}{spread:>22}"
                f"{losses[0]:14.3f}{losses[1]:8.3f}"
            )
    lines.append(
        "\nTime per global step is the planner's. Losses are the lowest of each run before its end, after the same"
        " number of samples;\nratios and losses are means over the seeds, with the least and the largest ratio."
    )
    return "\n".join(lines)


def main() -> int:
    """Trains what is missing, each run in a process of its own, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--clusters", nargs="+", choices=CLUSTERS, default=list(CLUSTERS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/overlap", help="the folder of all files")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    if args.run:
        cluster, setting, overlap, seed = args.run[0], args.run[1], args.run[2] == "True", int(args.run[3])
        write(args.output / name_of(cluster, setting, overlap, seed), run(cluster, setting, overlap, seed))
        return 0

    failed = []
    runs = [(c, s, o, n) for n in args.seeds for s in args.settings for c in args.clusters for o in (False, True)]
    for described in [] if args.table_only else runs:
        if not (args.output / name_of(*described)).exists():
            print(f"training: {name_of(*described)}", flush=True)
            command = [sys.executable, __file__, "--output", str(args.output), "--run", *map(str, described)]
            if subprocess.run(command, stderr=subprocess.STDOUT).returncode:
                failed.append(name_of(*described))
    text = table(args.output)
    (args.output / "table.txt").write_text(f"$ python benchmarks/overlap.py --table-only\n\n{text}\n")
    print(text)
    if failed:
        print(f"\nThese runs failed: {', '.join(failed)}.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
