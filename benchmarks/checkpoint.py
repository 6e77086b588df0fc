"""How much do checkpoints slow down the workers that do not save? Alternates runs with and without checkpoints.

    saving    local steps per second of the workers other than rank 0, for the model of examples/train_char_lm.py with
              4 workers in 2 regions, with a checkpoint every 25 global steps, against the same run without checkpoints

Every step takes at least a fixed time, as on an accelerator. So the benchmark measures the time that workers wait for a
save, and not that saving also uses the machine's few cores. Prints the ratio and exits with 1 if it is below its limit.
Run: python benchmarks/checkpoint.py
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_halos import HalosStrategy

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

LIMIT = 0.98  # of the steps per second without saves
PAIRS, STEPS, WARM_UP = 5, 100, 16
EVERY = 25  # global steps between saves
STEP = 0.12  # minimum seconds per step
WORKERS, REGIONS = 4, 2
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "limit_val_batches": 0,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Paced(L.Callback):
    """Stretches every step to a fixed time, and records when it ended."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.begun = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.begun = time.monotonic()

    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(max(0.0, self.begun + STEP - time.monotonic()))
        self.times.append(time.monotonic())


def process(folder: Path) -> None:
    """One worker: trains with saves and without, in turns."""
    from train_char_lm import ByteGPT, StandardLibrary

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    for pair in range(PAIRS):
        for kind in ("saving", "without"):
            paced = Paced()
            saves = ModelCheckpoint(folder / f"checkpoints-{pair}", every_n_train_steps=EVERY, save_top_k=1)
            strategy = HalosStrategy(regions=REGIONS, local_steps=4, accumulate_updates=4)
            trainer = L.Trainer(
                strategy=strategy,
                devices=WORKERS,
                max_steps=STEPS,
                callbacks=[paced, saves] if kind == "saving" else [paced],
                enable_checkpointing=kind == "saving",
                **QUIET,
            )
            trainer.fit(ByteGPT(), StandardLibrary(batch_size=2))
            (folder / f"{kind}-{pair}-{strategy.global_rank}").write_text(json.dumps(paced.times))
            strategy.barrier()


def steps_per_second(folder: Path, kind: str, pair: int) -> float:
    """Steps of the workers other than rank 0 per second, from when all are past the warm-up until one has ended."""
    workers = [json.loads((folder / f"{kind}-{pair}-{rank}").read_text()) for rank in range(1, WORKERS)]
    start, end = max(times[WARM_UP] for times in workers), min(times[-1] for times in workers)
    return sum(start < stamp <= end for times in workers for stamp in times) / (end - start)


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        warnings.filterwarnings("ignore")
        logging.getLogger("lightning").setLevel(logging.ERROR)
        process(args.folder)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, __file__, "--folder", name], check=True, env={**os.environ})
        pairs = [[steps_per_second(folder, kind, pair) for kind in ("saving", "without")] for pair in range(PAIRS)]
    low, share, high = quantiles([saving / without for saving, without in pairs])
    saving, without = (median(column) for column in zip(*pairs, strict=True))
    print(
        f"saving    {saving:5.1f} /s   without {without:5.1f} /s   {share:6.1%} (quartiles {low:.1%} and {high:.1%})",
        end="",
    )
    print(f"   {'ok' if share >= LIMIT else 'FAILED'}: at least {LIMIT:.0%}", flush=True)
    return 0 if share >= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
