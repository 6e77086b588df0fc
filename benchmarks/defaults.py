"""Are the defaults sound for the first run of a newcomer: one machine, a few workers, a few hundred steps?

Trains two of the examples in simulated clusters, which give the same result however busy the machine is, under

    default      HalosStrategy() without settings
    published    the same with the values of the HALoS paper, which were made for long runs in 4 regions of 4 workers
    ddp          synchronous SGD on the same samples: what such a run can reach

and prints each final validation loss, and what it is above that of ddp as a share of what ``published`` is. Exits with
1 if the share of ``default`` is above its limit for any task and cluster. ``--all`` adds the settings that were tried::

    python benchmarks/defaults.py                      # three seeds: the table in docs/defaults.md
    python benchmarks/defaults.py --quick              # one seed and fewer steps: what `make bench` runs
    python benchmarks/defaults.py --all --tasks digits --workers 16
    python benchmarks/defaults.py --all --regions 2
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

from lightning_halos import DelayedNesterov, HalosStrategy, SimulatedCluster, SyncSGDStrategy

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

LIMIT = 0.75  # of what `published` is above ddp
SEEDS = 3
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "limit_val_batches": 0,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Task(NamedTuple):
    """What is trained, and for how long.

    Attributes:
        module: The module. Its ``net``, if it has one, maps a batch's inputs to logits, and otherwise itself.
        train: The training samples.
        val: The validation samples.
        batch_size: Samples in the batch of a worker.
        clip: Maximum norm of the gradients, ``None`` for no limit.
        steps: Global steps; a quick run takes half of them.
    """

    module: type[L.LightningModule]
    train: Dataset[Any]
    val: Dataset[Any]
    batch_size: int
    clip: float | None
    steps: int


def digits() -> Task:
    """The classifier of examples/train_digits.py, with its data."""
    from train_digits import ConvNet

    pixels, labels = load_digits(return_X_y=True)
    samples = TensorDataset(torch.tensor(pixels).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels))
    train, val, _ = random_split(samples, [0.6, 0.2, 0.2], torch.Generator().manual_seed(0))
    return Task(ConvNet, train, val, 32, None, 200)


def text() -> Task:
    """The byte-level GPT of examples/train_char_lm.py (the demo), of half its width."""
    from train_char_lm import ByteGPT, StandardLibrary

    data = StandardLibrary()
    data.setup("fit")
    module: Any = partial(ByteGPT, width=64)
    return Task(module, data.train, data.val, 8, 1.0, 400)


TASKS = {"digits": digits, "text": text}


def local(total: float, momentum: float, delay: int, workers: int) -> dict[str, Any]:
    """Arguments of HalosStrategy for a local server whose rates over a round of all its workers have a given sum."""
    optimizer = partial(DelayedNesterov, lr=total / workers, momentum=momentum, delay=delay)
    return {"local_optimizer": optimizer, "defaults": "published"}


def candidates(workers: int, regions: int) -> dict[str, dict[str, Any]]:
    """The settings that are compared with the defaults, as arguments of HalosStrategy.

    Args:
        workers: Workers of a region.
        regions: Number of regions.
    """
    tried = [
        (0.5, 0.0, 1),
        (0.8, 0.0, 1),
        (1.4, 0.0, 1),
        (0.8, 0.3, 4 * workers),
        (0.8, 0.5, 4 * workers),
        (0.1, 0.9, 4 * workers),
    ]
    if regions > 1:  # in one region it is the default
        tried.insert(2, (1.0, 0.0, 1))
    settings = {
        f"{sum_:g}/workers, {beta:g}, {delay}": local(sum_, beta, delay, workers) for sum_, beta, delay in tried
    }
    if regions > 1:
        settings["1/workers, 0, 1; less K"] = {**local(1.0, 0.0, 1, workers), "accumulate_updates": 2 * workers}
        settings["the demo's"] = {
            **local(0.8, 0.0, 1, workers),
            "accumulate_updates": 2 * workers,
            "merge_weight": 0.5,
            "global_optimizer": partial(DelayedNesterov, lr=0.8 / regions, momentum=0.2, delay=1),
        }
    return settings


def clusters(workers: int, regions: int) -> dict[str, SimulatedCluster]:
    """The clusters: workers of equal speed, and with one that is four times slower.

    Args:
        workers: Workers in all regions.
        regions: Regions that they are spread over evenly.
    """
    speeds = {"equal": [1.0] * workers}
    if workers > 1:
        speeds["one slow"] = [1.0] * (workers - 1) + [0.25]
    size = workers // regions
    return {
        name: SimulatedCluster(
            bandwidths=[[100.0] * regions] * regions,
            worker_speeds=[each[region * size : (region + 1) * size] for region in range(regions)],
            step_ms=100.0,
        )
        for name, each in speeds.items()
    }


def train(task: Task, strategy: HalosStrategy, seed: int, steps: int) -> float:
    """Trains once. Returns the final validation loss."""
    L.seed_everything(seed, verbose=False)
    model = task.module()
    trainer = L.Trainer(strategy=strategy, max_steps=steps, gradient_clip_val=task.clip, **QUIET)
    trainer.fit(model, DataLoader(task.train, task.batch_size, shuffle=True, drop_last=True))
    (inputs, targets) = next(iter(DataLoader(task.val, len(task.val))))  # type: ignore[arg-type]
    network = getattr(model, "net", model).eval()
    with torch.inference_mode():
        return F.cross_entropy(network(inputs).flatten(0, -2), targets.flatten()).item()


def main() -> int:
    """Trains, prints the table, and says whether the defaults are within their limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, and half the steps")
    parser.add_argument("--all", action="store_true", help="the candidates, too")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--regions", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    args = parser.parse_args()
    if args.workers % args.regions:
        parser.error(f"{args.workers} workers cannot be spread over {args.regions} regions evenly")

    warnings.filterwarnings("ignore")
    for name in ("lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)

    size = args.workers // args.regions
    settings = {"published": local(0.8, 0.9, 4 * size, size), "default": {}}
    if args.all:
        settings |= candidates(size, args.regions)
    start = time.perf_counter()
    shares = []  # of the default, for each task and cluster
    for name in args.tasks:
        task = TASKS[name]()
        steps = task.steps // 2 if args.quick else task.steps
        seeds = range(1 if args.quick else args.seeds)
        print(f"\n{name}: {args.workers} workers in {args.regions} region(s), {steps} steps, {len(seeds)} seed(s)")
        print(f"{'':10}{'':24}{'loss':>8}{'share':>8}   of each seed", flush=True)
        limit = None
        for cluster_name, cluster in clusters(args.workers, args.regions).items():
            if limit is None:  # the same in every cluster
                losses = [train(task, SyncSGDStrategy(simulate=cluster), seed, steps) for seed in seeds]
                limit = mean(losses)
                print(f"{'':10}{'ddp':24}{limit:8.4f}{'':11}{' '.join(f'{loss:.4f}' for loss in losses)}", flush=True)
            above = None
            for setting, arguments in settings.items():
                strategies = (HalosStrategy(**arguments, simulate=cluster) for _ in seeds)
                losses = [train(task, strategy, seed, steps) for strategy, seed in zip(strategies, seeds, strict=True)]
                above = above or mean(losses) - limit
                share = (mean(losses) - limit) / above
                if setting == "default":
                    shares.append(share)
                print(
                    f"{cluster_name:10}{setting:24}{mean(losses):8.4f}{share:8.2f}   "
                    f"{' '.join(f'{loss:.4f}' for loss in losses)}",
                    flush=True,
                )
    print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes.")
    for share in shares:
        print(f"The default is {share:.2f} of what the published values are above ddp (limit {LIMIT}).")
    return int(not all(share <= LIMIT for share in shares))  # a share of nan is a failure


if __name__ == "__main__":
    sys.exit(main())
