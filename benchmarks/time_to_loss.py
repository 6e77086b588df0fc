"""How long does it take to reach a loss? Trains a small language model in a simulated cluster, under five algorithms.

Every row trains the same model on the same number of samples; rows differ only in their strategy. A row runs in a
process of its own and writes a JSON file of its own, for each seed. A row whose file is there is not trained again, so
that a run that was stopped goes on with the row that it was at::

    python benchmarks/time_to_loss.py                        # the rows of the first table
    python benchmarks/time_to_loss.py --best                 # the rows of the second: each algorithm at its best found
    python benchmarks/time_to_loss.py --best --seeds 0 1 2   # with three seeds
    python benchmarks/time_to_loss.py --searched             # the rows of the third: as tuning.py found each algorithm
    python benchmarks/time_to_loss.py --long                 # the rows of the long run, of 6,000 steps
    python benchmarks/time_to_loss.py --long --steps 3000    # of one of half the length
    python benchmarks/time_to_loss.py --long --steps 12000   # HALoS with twice the steps of synchronous SGD
    python benchmarks/time_to_loss.py --long --muon          # of a long run with Muon as inner optimizer
    python benchmarks/time_to_loss.py --rows halos tuned     # only these
    python benchmarks/time_to_loss.py --again                # train what is there, too
    python benchmarks/time_to_loss.py --plot-only            # the picture and the tables again, without training
    python benchmarks/time_to_loss.py --search               # all settings of SEARCH, at half the steps
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from lightning_halos import (
    AsyncLocalSGDStrategy,
    DelayedNesterov,
    DilocoStrategy,
    HalosStrategy,
    SimulatedCluster,
    SyncSGDStrategy,
)
from lightning_halos.tuning.goal import time_to_reach

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

Settings = dict[str, Any]
"""An algorithm, and the arguments of its strategy; a server's optimizer as a dictionary of its own arguments."""
Result = dict[str, Any]

STEPS, SEARCH_STEPS, VALIDATE_EVERY = 600, 300, 25  # global steps: a local step of every worker
LONG_STEPS, LONG_VALIDATE_EVERY = 6000, 100
BATCH_SIZE = 8  # sequences in a local step
MODEL = {"context": 64, "depth": 2, "width": 96, "heads": 4, "lr": 3e-3}  # 57,600 local steps in minutes, on 2 cores
# The best common rates of HALoS and synchronous SGD, see docs/muon/rows.json.
LONG_MODEL, LONG_MUON_MODEL = MODEL | {"lr": 6e-3}, MODEL | {"lr": 2.4e-2}

ALGORITHMS: dict[str, Any] = {
    "halos": HalosStrategy,
    "async_local_sgd": AsyncLocalSGDStrategy,
    "diloco_dynamic": partial(DilocoStrategy, dynamic_local_steps=True),
    "diloco": DilocoStrategy,
    "sync_sgd": SyncSGDStrategy,
}
OPTIMIZERS: dict[str, Any] = {
    "local_optimizer": DelayedNesterov,
    "global_optimizer": DelayedNesterov,
    "optimizer": DelayedNesterov,
    "outer_optimizer": partial(torch.optim.SGD, nesterov=True),
}


def _halos(
    h: int, k: int, rate: float, beta: float, delay: int, outer: tuple[float, float, int], alpha: float = 0.25
) -> Settings:
    return {
        "algorithm": "halos",
        "local_steps": h,
        "accumulate_updates": k,
        "merge_weight": alpha,
        "local_optimizer": {"lr": rate, "momentum": beta, "delay": delay},
        "global_optimizer": dict(zip(("lr", "momentum", "delay"), outer, strict=True)),
    }


_PAPERS = (0.15, 0.5, 2)
_DEMOS = (0.5, 0.2, 1)  # which the demo had when these were tried
_DILOCO = {"local_steps": 32, "outer_optimizer": {"lr": 0.7, "momentum": 0.9}}

# The published settings, for 16 workers in 4 regions. They are complete: a row does not depend on the defaults of a
# strategy.
PUBLISHED: dict[str, Settings] = {
    "halos": _halos(8, 32, 0.2, 0.9, 16, _PAPERS),
    "async_local_sgd": {
        "algorithm": "async_local_sgd",
        "local_steps": 32,
        "optimizer": {"lr": 0.05, "momentum": 0.9, "delay": 32},
    },
    "diloco_dynamic": {"algorithm": "diloco_dynamic", **_DILOCO},
    "diloco": {"algorithm": "diloco", **_DILOCO},
    "sync_sgd": {"algorithm": "sync_sgd"},
}
# The best that were found; see docs/time-to-loss.md.
TUNED: dict[str, Settings] = {
    "tuned": _halos(4, 8, 0.25, 0.0, 1, _DEMOS),
    "async_local_sgd_tuned": PUBLISHED["async_local_sgd"] | {"optimizer": {"lr": 0.0625, "momentum": 0.0, "delay": 1}},
    **{
        f"{name}_tuned": PUBLISHED[name] | {"outer_optimizer": {"lr": 0.7, "momentum": 0.6}}
        for name in ("diloco_dynamic", "diloco")
    },
}


def to_row(settings: Settings, algorithm: str) -> Settings:
    """Returns a strategy's arguments in the form of LightningCLI as a row."""
    row = dict(settings)
    for name in row.keys() & OPTIMIZERS.keys():
        row[name] = row[name]["init_args"]
    if "outer_optimizer" in row:
        row["outer_optimizer"] = {"momentum": 0.0, "nesterov": False} | row["outer_optimizer"]
    return {"algorithm": algorithm, **row}


# What tuning.py found for each algorithm, from its published settings, as far as it has searched.
SEARCHED: dict[str, Settings] = {
    "searched" if algorithm == "halos" else f"{algorithm}_searched": to_row(
        json.loads(path.read_text())["best"], algorithm
    )
    for algorithm in PUBLISHED
    if (path := ROOT / "docs/tuning" / f"{algorithm}.json").exists()
}
# For a long run: some momentum in the local servers.
MOMENTUM: dict[str, Settings] = {
    "tuned_momentum": TUNED["tuned"] | {"local_optimizer": {"lr": 0.25, "momentum": 0.5, "delay": 16}},
}
# Validated with an average of recent global models, by Lightning's EMAWeightAveraging, with a decay per global step.
AVERAGED: dict[str, Settings] = {
    f"{row}_averaged": settings | {"average": 0.995}
    for row, settings in {**PUBLISHED, **SEARCHED}.items()
    if row in ("searched", "sync_sgd")
}
ROWS = {**PUBLISHED, **TUNED, **SEARCHED, **MOMENTUM, **AVERAGED}
FIRST = ("halos", "tuned", "async_local_sgd", "diloco_dynamic", "diloco", "sync_sgd")
SECOND = ("tuned", "async_local_sgd_tuned", "diloco_dynamic_tuned", "diloco_tuned", "sync_sgd")
THIRD = (*SEARCHED, "sync_sgd")
LONG = {  # by the number of steps
    3000: ("sync_sgd", "tuned", "diloco_dynamic_tuned", "tuned_momentum"),
    LONG_STEPS: ("sync_sgd", "searched", "diloco_dynamic_searched", *AVERAGED),
    2 * LONG_STEPS: ("searched", "searched_averaged"),  # compared with synchronous SGD of half as many
}
NAMES = {
    "halos": "HALoS",
    "tuned": "HALoS, tuned",
    "tuned_momentum": "HALoS, tuned, momentum 0.5",
    "searched": "HALoS, searched",
    "searched_averaged": "HALoS, searched, averaged",
    "async_local_sgd": "Async-Local-SGD",
    "async_local_sgd_tuned": "Async-Local-SGD, tuned",
    "async_local_sgd_searched": "Async-Local-SGD, searched",
    "diloco_dynamic": "DiLoCo, dynamic steps",
    "diloco_dynamic_tuned": "DiLoCo, dynamic steps, tuned",
    "diloco_dynamic_searched": "DiLoCo, dynamic H, searched",
    "diloco": "DiLoCo",
    "diloco_tuned": "DiLoCo, tuned",
    "diloco_searched": "DiLoCo, searched",
    "sync_sgd": "synchronous SGD",
    "sync_sgd_averaged": "synchronous SGD, averaged",
}

SHORT = {  # an optimizer's arguments are its rate, momentum and delay
    "local_steps": "H",
    "accumulate_updates": "K",
    "merge_weight": "alpha",
    "local_optimizer": "local",
    "global_optimizer": "global",
    "optimizer": "server",
    "outer_optimizer": "outer",
}


SEARCH: list[Settings] = [
    # HALoS: the paper's settings, a guess, those that the demo had, and what each value does
    PUBLISHED["halos"],
    _halos(4, 8, 0.3, 0.9, 16, _PAPERS),
    _halos(4, 8, 0.4, 0.3, 4, _DEMOS, alpha=0.5),
    _halos(4, 8, 0.3, 0.9, 16, _DEMOS, alpha=0.5),
    _halos(4, 16, 0.4, 0.3, 4, _DEMOS, alpha=0.5),
    _halos(4, 8, 0.4, 0.6, 4, _DEMOS, alpha=0.5),
    _halos(4, 8, 0.25, 0.0, 1, _DEMOS, alpha=0.5),
    _halos(4, 8, 0.4, 0.3, 4, (0.3, 0.0, 1)),
    # most of the loss was due to momentum: without it, what is left to choose
    _halos(4, 8, 0.25, 0.0, 1, (0.3, 0.0, 1), alpha=0.5),
    _halos(8, 8, 0.25, 0.0, 1, _DEMOS, alpha=0.5),
    TUNED["tuned"],
    _halos(4, 8, 0.25, 0.0, 1, (0.8, 0.0, 1), alpha=0.5),
    # Async-Local-SGD: the same discovery
    TUNED["async_local_sgd_tuned"],
    # DiLoCo: fewer, larger rounds, and less outer momentum, alone and together; larger rounds of Async-Local-SGD too
    PUBLISHED["diloco_dynamic"] | {"local_steps": 64},
    TUNED["diloco_dynamic_tuned"],
    TUNED["async_local_sgd_tuned"] | {"local_steps": 64},
    TUNED["diloco_dynamic_tuned"] | {"local_steps": 64},
    # HALoS: a lower and a higher local rate
    _halos(4, 8, 0.15, 0.0, 1, _DEMOS),
    _halos(4, 8, 0.4, 0.0, 1, _DEMOS),
]

# ---------------------------------------------------------------------- one row


def make_strategy(settings: Settings, cluster: SimulatedCluster) -> HalosStrategy:
    """Makes a strategy from its settings."""
    arguments = dict(settings)
    algorithm = ALGORITHMS[arguments.pop("algorithm")]
    for name in arguments.keys() & OPTIMIZERS.keys():
        arguments[name] = partial(OPTIMIZERS[name], **arguments[name])
    strategy: HalosStrategy = algorithm(simulate=cluster, **arguments)
    return strategy


class LossCurve(L.Callback):
    """Notes the loss of the global model after each validation, and the virtual time at which this model was there.

    Args:
        path: The file to write, a line of JSON for each validation.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        strategy: Any = trainer.strategy
        point = trainer.global_step, strategy.model_seconds, trainer.callback_metrics["val_loss"].item()
        with self.path.open("a") as file:
            print(json.dumps(point), file=file)


def train(
    settings: Settings,
    cluster: SimulatedCluster,
    steps: int,
    seed: int,
    model: Settings = MODEL,
    module: Any = None,
    validate_every: int = VALIDATE_EVERY,
) -> Result:
    """Trains once. Returns the loss over virtual time, and how it came about.

    Args:
        settings: The algorithm, the arguments of its strategy, and the decay of an ``average``, if any.
        cluster: The cluster.
        steps: Global steps.
        seed: Of the model and the data.
        model: Arguments of the module.
        module: Makes the module from ``model``. Default: ``ByteGPT``.
        validate_every: Global steps between two validations.
    """
    from train_char_lm import ByteGPT, StandardLibrary

    L.seed_everything(seed, verbose=False)
    strategy = make_strategy({key: value for key, value in settings.items() if key != "average"}, cluster)
    averages = [EMAWeightAveraging(decay=settings["average"])] if "average" in settings else []
    with tempfile.TemporaryDirectory() as folder:  # the curve is rank 0's, and rank 0 is another process
        path = Path(folder) / "curve"
        trainer = L.Trainer(
            strategy=strategy,
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            val_check_interval=min(validate_every, steps),
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            gradient_clip_val=1.0,
            callbacks=[LossCurve(path), *averages],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        start = time.perf_counter()
        trainer.fit((module or ByteGPT)(**model), StandardLibrary(model["context"], BATCH_SIZE))
        wall = time.perf_counter() - start
        step, seconds, loss = zip(*map(json.loads, path.read_text().splitlines()), strict=True)
    return {
        "settings": settings,
        "model": model,
        "global_steps": steps,
        "samples": strategy.history[-1].steps * BATCH_SIZE,
        "seed": seed,
        "wall_seconds": round(wall, 1),
        "global_step": step,
        "virtual_hours": [round(s / 3600, 6) for s in seconds],
        "val_loss": [round(value, 4) for value in loss],
    }


def quiet() -> None:
    """Leaves out what Lightning says at the start of each of many runs; and no threads within a worker."""
    warnings.filterwarnings("ignore")
    for name in ("lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # the time of a step must not depend on the values that it computes


def write(path: Path, result: Any) -> None:
    """Writes JSON: a line for each entry."""
    opening, closing = "[]" if isinstance(result, list) else "{}"
    entries = (
        [json.dumps(entry) for entry in result]
        if isinstance(result, list)
        else [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items()]
    )
    path.write_text(f"{opening}\n" + ",\n".join(entries) + f"\n{closing}\n")


def path_of(output: Path, row: str, seed: int) -> Path:
    """The file of a row; seeds other than 0 are in its name."""
    return output / (f"{row}.seed{seed}.json" if seed else f"{row}.json")


def is_trained(path: Path, row: Result) -> bool:
    """Whether a file has the result of a row: its settings, model, cluster, steps and seed."""
    return path.exists() and row.items() <= json.loads(path.read_text()).items()


def read(output: Path, rows: Sequence[str]) -> dict[str, list[Result]]:
    """Reads the results of some rows, of the seeds that all those rows have of which there is a result."""
    found = {row: {} for row in rows}  # type: dict[str, dict[int, Result]]
    for row in rows:
        for path in (path_of(output, row, 0), *output.glob(f"{row}.seed*.json")):
            if path.exists():
                result = json.loads(path.read_text())
                found[row][result["seed"]] = result
    there = {row: results for row, results in found.items() if results}
    common = sorted(set.intersection(*(set(results) for results in there.values()))) if there else []
    return {row: [results[seed] for seed in common] for row, results in there.items() if common}


# ---------------------------------------------------------------------- the search


def search(args: argparse.Namespace, cluster: SimulatedCluster) -> None:
    """Tries all settings of ``SEARCH``, of some algorithms or of all, and adds them to what was tried before."""
    path = args.output / "search.json"
    tried: list[Result] = json.loads(path.read_text()) if path.exists() else []
    done = [(entry["settings"], entry["global_steps"], entry["seed"]) for entry in tried]
    for settings, seed in itertools.product(SEARCH, args.seeds):
        if (settings, SEARCH_STEPS, seed) in done or (args.search and settings["algorithm"] not in args.search):
            continue
        result = train(settings, cluster, SEARCH_STEPS, seed)
        kept = {key: result[key] for key in ("settings", "global_steps", "seed", "val_loss")}
        tried.append({"final_loss": result["val_loss"][-1], "hours": result["virtual_hours"][-1], **kept})
        write(path, tried)
        print(f"{result['val_loss'][-1]:.3f}  {result['virtual_hours'][-1]:.4f} h  {json.dumps(settings)}", flush=True)


# ---------------------------------------------------------------------- table and picture


def time_to(result: Result, target: float) -> float:
    """Virtual hours until the loss is down at a target; see :func:`time_to_reach`."""
    return time_to_reach(target, result["virtual_hours"], result["val_loss"])


def table(results: dict[str, list[Result]], reference: str) -> tuple[str, float]:
    """Compares rows by the time to the best loss that all of them reach, with all seeds.

    Args:
        results: Of each row, a result per seed; the same seeds for all rows.
        reference: The row to which the times of the others are compared, seed by seed.

    Returns:
        The table, with means over the seeds and, if there are several, their ranges; and this loss.
    """
    target = max(min(one["val_loss"]) for seeds in results.values() for one in seeds)
    earlier = [round(target + above, 1) for above in (0.4, 0.2)]  # the ratios depend on where one looks
    has_seeds = len(results[reference]) > 1
    over = f"{'':{90 if has_seeds else 72}}times that of {NAMES[reference]}, to a loss of"
    heads = "".join(f"{value:10.3f}" for value in (*earlier, target))
    spread = f"{'of the seeds':>18}" if has_seeds else ""
    lines = [
        over,
        f"{'':30}{'final loss':>12}{spread}{'hours in all':>14}{f'hours to {target:.3f}':>16}{heads}{spread}",
    ]
    for name, seeds in results.items():
        final = [one["val_loss"][-1] for one in seeds]
        ratios = [
            [time_to(one, value) / time_to(base, value) for one, base in zip(seeds, results[reference], strict=True)]
            for value in (*earlier, target)
        ]
        lines.append(
            f"{NAMES[name]:30}{statistics.mean(final):12.3f}"
            + (f"{f'{min(final):.3f} to {max(final):.3f}':>18}" if has_seeds else "")
            + f"{statistics.mean(one['virtual_hours'][-1] for one in seeds):14.4f}"
            + f"{statistics.mean(time_to(one, target) for one in seeds):16.4f}"
            + "".join(f"{statistics.mean(each):10.2f}" for each in ratios)
            + (f"{f'{min(ratios[-1]):.2f} to {max(ratios[-1]):.2f}':>18}" if has_seeds else "")
        )
    return "\n".join(lines), target


def closeness(results: dict[str, list[Result]], base: str = "sync_sgd") -> str:
    """Says how far each row's final loss is above that of a row of synchronous SGD, and how long that took to it."""
    above_base, time_of_base = f"above {NAMES[base]}", "its time to this loss"
    lines = [f"{'':30}{'final loss':>12}{above_base:>34}{time_of_base:>24}"]
    for name, seeds in results.items():
        pairs = list(zip(seeds, results[base], strict=True))
        above = statistics.mean(one["val_loss"][-1] / base["val_loss"][-1] - 1 for one, base in pairs)
        times = statistics.mean(
            time_to(base, min(one["val_loss"])) / time_to(one, min(one["val_loss"])) for one, base in pairs
        )
        final = statistics.mean(one["val_loss"][-1] for one in seeds)
        reached = "not reached" if math.isnan(times) else f"{times:.2f} times"
        lines.append(f"{NAMES[name]:30}{final:12.3f}{above:33.1%} {reached:>24}")
    return "\n".join(lines)


def listing(tried: list[Result]) -> str:
    """Lists what a search tried, and what came out."""
    lines = ["final loss   hours in all   settings"]
    for entry in tried:
        settings = dict(entry["settings"])
        words = [settings.pop("algorithm")]
        for name, value in settings.items():
            shown = "/".join(f"{v:g}" for v in value.values()) if isinstance(value, dict) else f"{value:g}"
            words.append(f"{SHORT[name]} {shown}")
        lines.append(f"{entry['final_loss']:10.3f}{entry['hours']:15.4f}   {', '.join(words)}")
    return "\n".join(lines)


def plot(results: dict[str, Result], reference: str, target: float, title: str, path: Path) -> None:
    """Draws the loss over virtual hours, and where each row reaches the common loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(target, color="gray", linestyle="--", linewidth=1)
    base = time_to(results[reference], target)
    for name, result in results.items():
        points = [(h, loss) for h, loss in zip(result["virtual_hours"], result["val_loss"], strict=True) if h > 0]
        (line,) = axes.plot(*zip(*points, strict=True), marker=".", markersize=4, linewidth=1.4)
        hours = time_to(result, target)
        line.set_label(f"{NAMES[name]} ({hours / base:.3g}x)")
        axes.plot(hours, target, "o", color=line.get_color(), markersize=7)
    axes.annotate(
        f"{target:.2f}: the best that all reach", (0.01, target), xycoords=("axes fraction", "data"),
        xytext=(0, -13), textcoords="offset points", color="gray",
    )  # fmt: skip
    axes.set_xscale("log")
    lowest = min(min(result["val_loss"]) for result in results.values())
    axes.set_ylim(lowest - 0.1, target + 1.2)
    axes.set_xlabel("virtual hours")
    axes.set_ylabel("validation loss (nats per byte)")
    axes.set_title(title)
    axes.legend(title="time to the dashed line")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=130)


TITLE = "A byte-level GPT in the paper's cluster, the same samples for each algorithm"


def report(output: Path) -> None:
    """Writes the tables and the picture of the rows that are there, and prints the tables."""
    first, second, third = read(output, FIRST), read(output, SECOND), read(output, THIRD)
    first = {name: [seeds[0]] for name, seeds in first.items()}
    texts = []
    if "halos" in first:
        text, target = table(first, "halos")
        minutes = sum(result["wall_seconds"] for (result,) in first.values()) / 60
        texts.append(f"$ python benchmarks/time_to_loss.py\n\n{text}\n\n{minutes:.1f} minutes of wall-clock time.")
        plot({name: one for name, (one,) in first.items()}, "halos", target, TITLE, output / "time_to_loss.png")
    for option, rows, reference, results in (
        ("--best", SECOND, "tuned", second),
        ("--searched", THIRD, "searched", third),
    ):
        if len(results) == len(rows) and reference in results:
            chosen = [one["seed"] for one in results[reference]]
            seeds = f" --seeds {' '.join(map(str, chosen))}" if len(chosen) > 1 else ""
            texts.append(f"$ python benchmarks/time_to_loss.py {option}{seeds}\n\n{table(results, reference)[0]}")
    if (path := output / "search.json").exists():
        texts.append(f"$ python benchmarks/time_to_loss.py --search\n\n{listing(json.loads(path.read_text()))}")
    publish(texts, output)


def long_report(output: Path, rows: Sequence[str], options: str) -> None:
    """Writes the tables and the picture of a long run, as far as its rows are there, and prints the tables.

    If it has no row of synchronous SGD, that of ``LONG_STEPS`` takes its place.

    Args:
        output: The folder of its files.
        rows: Its rows.
        options: What makes it, besides ``--long``.
    """
    results = read(output, rows)
    if "sync_sgd" not in rows:
        results = read(output.parent / str(LONG_STEPS), ["sync_sgd", "sync_sgd_averaged"]) | results
    halos = next((row for row in results if ROWS[row]["algorithm"] == "halos"), None)
    if halos is None or "sync_sgd" not in results:
        print("The table needs the rows of HALoS and of synchronous SGD.")
        return
    text, target = table(results, halos)
    steps = results[halos][0]["global_steps"]
    others = results["sync_sgd"][0]["global_steps"]
    title = f"The same model for {steps:,} global steps, " + (
        "the same samples for each algorithm" if others == steps else f"under synchronous SGD for {others:,}"
    )
    plot({name: seeds[0] for name, seeds in results.items()}, halos, target, title, output / "time_to_loss.png")
    parts = [f"$ python benchmarks/time_to_loss.py --long{options} --plot-only", text, closeness(results)]
    if "sync_sgd_averaged" in results:
        averaged = {name: seeds for name, seeds in results.items() if name in AVERAGED}
        parts.append(closeness(averaged, "sync_sgd_averaged"))
    publish(["\n\n".join(parts)], output)


def publish(texts: list[str], output: Path) -> None:
    """Writes the tables to a file, and prints them."""
    (output / "table.txt").write_text("\n\n\n".join(texts) + "\n")
    print("\n\n\n".join(texts))


def module_of(args: argparse.Namespace) -> Any:
    """Returns what makes the module; ``None`` for that of ``train``."""
    if not args.muon:
        return None
    from muon_gpt import MuonGPT

    return MuonGPT


def main() -> int:
    """Trains the rows, each in a process of its own, and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="train only these")
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--best", action="store_true", help="train the rows of the second table")
    rows.add_argument("--searched", action="store_true", help="train the rows of the third table")
    rows.add_argument("--long", action="store_true", help=f"the long run, of {LONG_STEPS:,} global steps")
    parser.add_argument("--muon", action="store_true", help="with --long: with Muon instead of AdamW")
    parser.add_argument("--again", action="store_true", help="train rows again whose files are there")
    parser.add_argument("--plot-only", action="store_true", help="train nothing")
    parser.add_argument("--search", nargs="*", choices=ALGORITHMS, help="try the settings of these algorithms, or all")
    parser.add_argument("--cluster", type=Path, default=ROOT / "examples/clusters/paper.yaml")
    parser.add_argument("--steps", type=int, help=f"global steps of a row (default: {STEPS}; --long: {LONG_STEPS:,})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--output",
        type=Path,
        help="the folder of all files (default: docs/time_to_loss; --long: its folder STEPS; --muon: STEPS-muon)",
    )
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.muon and not args.long:
        parser.error("--muon needs --long; benchmarks/muon.py compares Muon and AdamW in short runs")
    folder = ROOT / "docs/time_to_loss"
    args.steps = args.steps or (LONG_STEPS if args.long else STEPS)
    long_folder = folder / (f"{args.steps}-muon" if args.muon else str(args.steps))
    args.output = args.output or (long_folder if args.long else folder)
    long_rows = LONG[LONG_STEPS] if args.muon else LONG.get(args.steps, LONG[LONG_STEPS])
    model = LONG_MUON_MODEL if args.muon else LONG_MODEL if args.long else MODEL

    args.output.mkdir(parents=True, exist_ok=True)
    if args.row or args.search is not None:
        quiet()
        cluster = SimulatedCluster.from_yaml(args.cluster)
        if args.row:
            (seed,) = args.seeds
            every = LONG_VALIDATE_EVERY if args.long else VALIDATE_EVERY
            result = train(ROWS[args.row], cluster, args.steps, seed, model, module_of(args), every)
            write(path_of(args.output, args.row, seed), {"cluster": args.cluster.name, **result})
        else:
            search(args, cluster)
        return 0

    failed = []
    rows = args.rows or (long_rows if args.long else SECOND if args.best else THIRD if args.searched else FIRST)
    for seed, row in itertools.product(args.seeds, () if args.plot_only else rows):
        wanted = {"cluster": args.cluster.name, "settings": ROWS[row], "model": model}
        wanted |= {"global_steps": args.steps, "seed": seed}
        if not args.again and is_trained(path_of(args.output, row, seed), wanted):
            continue
        print(f"training: {NAMES[row]}, seed {seed}", flush=True)
        command = [sys.executable, *sys.argv, "--row", row, "--seeds", str(seed)]
        if subprocess.run(command, stderr=subprocess.STDOUT).returncode:
            failed.append(f"{row} (seed {seed})")
    if args.long:
        options = f" --steps {args.steps}" if args.steps != LONG_STEPS else ""
        long_report(args.output, long_rows, options + (" --muon" if args.muon else ""))
    else:
        report(args.output)
    if failed:
        print(f"\nThese rows failed: {', '.join(failed)}.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
