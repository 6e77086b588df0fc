"""Does the tuner find good settings in half an hour? Compares what it finds with settings that were tuned by hand.

On the paper's cluster it starts from the published settings of each algorithm, and searches with the model of
``time_to_loss.py``. What it finds is trained once more, in full, as a row there is; ``time_to_loss.py --searched``
trains it with further seeds. On random clusters, it starts from the strategy's defaults, with a smaller model, and what
it finds is compared with them under a seed that the search has not seen::

    python benchmarks/tuning.py paper                     # HALoS and baselines: 30 minutes of search for each
    python benchmarks/tuning.py paper --algorithms halos  # this one only
    python benchmarks/tuning.py random                    # two clusters, 5 minutes of search for each
    python benchmarks/tuning.py report                    # the table again, without training
    python benchmarks/tuning.py paper --minutes 2 --steps 48 --output build/tuning    # whether it runs

A search that was stopped goes on with the same command. Its files are in ``--work``.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from time_to_loss import (
    BATCH_SIZE,
    MODEL,
    OPTIMIZERS,
    PUBLISHED,
    ROOT,
    STEPS,
    Result,
    Settings,
    quiet,
    to_row,
    train,
    write,
)
from train_char_lm import ByteGPT, StandardLibrary

from lightning_halos import AsyncLocalSGDStrategy, DilocoStrategy, HalosStrategy, SimulatedCluster
from lightning_halos.planning.random_cluster import random_cluster
from lightning_halos.training.strategy import AlgorithmStrategy

SMALL = {**MODEL, "width": 48, "depth": 1}
RANDOM_STEPS = 300
CLUSTERS = {"2x2": (2, 2, 1), "3x2": (3, 2, 2)}  # regions, workers per region, seed
OTHER_SEED = 1
ALGORITHMS: dict[str, tuple[type[AlgorithmStrategy], Settings]] = {  # strategies, and what is not varied
    "halos": (HalosStrategy, {}),
    "async_local_sgd": (AsyncLocalSGDStrategy, {}),
    "diloco_dynamic": (DilocoStrategy, {"dynamic_local_steps": True}),
    "diloco": (DilocoStrategy, {"dynamic_local_steps": False}),
}
_NESTEROV, _SGD = "lightning_halos.DelayedNesterov", "torch.optim.SGD"


def make() -> tuple[ByteGPT, StandardLibrary]:
    """The model of ``time_to_loss.py`` and its data."""
    return ByteGPT(**MODEL), StandardLibrary(MODEL["context"], BATCH_SIZE)


def make_small() -> tuple[ByteGPT, StandardLibrary]:
    """A smaller one."""
    return ByteGPT(**SMALL), StandardLibrary(SMALL["context"], BATCH_SIZE)


def to_yaml_form(row: Settings) -> Settings:
    """Returns a row of ``time_to_loss.py`` as arguments of the strategy in the form of LightningCLI."""
    settings = {name: value for name, value in row.items() if name != "algorithm"}
    for name in settings.keys() & OPTIMIZERS.keys():
        class_path = _SGD if name == "outer_optimizer" else _NESTEROV
        extra = {"nesterov": True} if class_path == _SGD else {}
        settings[name] = {"class_path": class_path, "init_args": settings[name] | extra}
    return settings


def search(
    make: Any,
    cluster: SimulatedCluster,
    steps: int,
    args: argparse.Namespace,
    name: str,
    start: Any,
    strategy: type[AlgorithmStrategy] = HalosStrategy,
    fixed: Settings | None = None,
) -> Result:
    """Searches. Returns what was found, and what it cost."""
    begin, before = time.perf_counter(), _core_seconds()
    tuned = strategy.tune(
        cluster,
        make,
        hours=args.minutes / 60,
        steps=steps,
        start=start,
        fixed=fixed,
        trainer={"gradient_clip_val": 1.0},
        jobs=args.jobs,
        folder=args.work / name,
    )
    print(f"\n{tuned.table}", flush=True)
    return {
        "command": f"python benchmarks/tuning.py {args.what} --minutes {args.minutes:g}",
        "steps": steps,
        "minutes": round((time.perf_counter() - begin) / 60, 1),
        "core_minutes": round((_core_seconds() - before) / 60, 1),
        "start_loss": tuned.start_value,
        "best_loss": tuned.value,
        "best": tuned.settings,
        "importances": {name: round(share, 3) for name, share in tuned.importances.items()},
        "table": tuned.table.splitlines(),
        "trials": [
            {
                "name": trial.name,
                "outcome": trial.outcome,
                "loss": trial.value,
                "curve": [[point.step, round(point.seconds, 1), round(point.value, 4)] for point in trial.curve],
                "settings": trial.settings,
            }
            for trial in tuned.trials
        ],
    }


def _core_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def paper(args: argparse.Namespace) -> None:
    """Searches on the paper's cluster for each algorithm, and trains what was found."""
    cluster = SimulatedCluster.from_yaml(ROOT / "examples/clusters/paper.yaml")
    steps = args.steps or STEPS
    quiet()
    for name in args.algorithms:
        path = args.output / f"{name}.json"
        strategy, fixed = ALGORITHMS[name]
        result = search(make, cluster, steps, args, name, to_yaml_form(PUBLISHED[name]), strategy, fixed)
        write(path, result)
        result["again"] = train(to_row(result["best"], name), cluster, steps, seed=0)
        write(path, result)


def random_clusters(args: argparse.Namespace) -> None:
    """Searches on random clusters, and trains what was found and the defaults with another seed."""
    for name, (regions, workers, seed) in CLUSTERS.items():
        cluster, steps = random_cluster(regions, workers, seed), args.steps or RANDOM_STEPS
        result = search(make_small, cluster, steps, args, name, None)
        write(args.output / f"{name}.json", result)
        quiet()
        result["again"] = train(to_row(result["best"], "halos"), cluster, steps, OTHER_SEED, SMALL)
        result["defaults"] = train({"algorithm": "halos"}, cluster, steps, OTHER_SEED, SMALL)
        write(args.output / f"{name}.json", result)


def report(output: Path) -> None:
    """Prints and writes the table: the search, and what it found trained again (random clusters: another seed)."""
    by_hand = {name: "tuned" if name == "halos" else f"{name}_tuned" for name in ALGORITHMS}  # rows of time_to_loss.py
    lines = [
        f"{'search':17}{'start':>8}{'best':>8}{'again':>8}{'compared with':>20}{'minutes':>9}{'core-minutes':>14}"
        f"{'trials':>8}"
    ]
    for path in [output / f"{name}.json" for name in (*ALGORITHMS, *CLUSTERS)]:
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        again = result.get("again", {}).get("val_loss", [float("nan")])[-1]
        if path.stem in by_hand:
            hand = json.loads((ROOT / f"docs/time_to_loss/{by_hand[path.stem]}.json").read_text())
            other = f"{hand['val_loss'][-1]:.3f} (by hand)"
        else:
            other = f"{result['defaults']['val_loss'][-1]:.3f} (defaults)"
        lines.append(
            f"{path.stem:17}{result['start_loss'] or float('nan'):8.3f}{result['best_loss']:8.3f}{again:8.3f}"
            f"{other:>20}{result['minutes']:9.1f}{result['core_minutes']:14.1f}{len(result['trials']):8}"
        )
    text = "\n".join(lines)
    (output / "table.txt").write_text(f"$ python benchmarks/tuning.py report\n\n{text}\n")
    print(text)


def main() -> int:
    """Searches, trains and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("paper", "random", "report"))
    parser.add_argument("--minutes", type=float, help="of each search (default: 30, and 5 for each random cluster)")
    parser.add_argument("--steps", type=int, help=f"global steps (default: {STEPS}, and {RANDOM_STEPS})")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS), help="for paper")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/tuning")
    parser.add_argument("--work", type=Path, default=ROOT / "build/tuning", help="the folder of the searches")
    args = parser.parse_args()
    args.minutes = args.minutes or (5 if args.what == "random" else 30)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.what == "paper":
        paper(args)
    elif args.what == "random":
        random_clusters(args)
    report(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
