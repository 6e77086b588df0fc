"""Is Muon better than AdamW inside HALoS? Trains the model of ``time_to_loss.py`` in its cluster with both.

First the learning rate of each optimizer is tuned, with one seed and half the steps: from a first rate, it is doubled
or halved until both neighbors of the best one have been tried. Then three seeds train with the best rate. This is done
with HALoS and the other algorithms, their servers tuned as in ``time_to_loss.py``, to see whether Muon changes their
order. The table has the virtual hours to the lowest loss that all rows with the same optimizer reach, too. Every row
is in ``rows.json`` as soon as it is trained, and is not trained again::

    python benchmarks/muon.py                     # what is not trained yet, and the table
    python benchmarks/muon.py --report            # the table only
    python benchmarks/muon.py --algorithms halos  # only these
    python benchmarks/muon.py --steps 50 --seeds 1 --output build/muon   # whether it runs
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from muon_gpt import MuonGPT
from time_to_loss import BATCH_SIZE, MODEL, ROOT, ROWS, STEPS, Result, quiet, time_to, train, write
from train_char_lm import ByteGPT

from lightning_halos import SimulatedCluster

SEEDS = 3
FIRST_RATES = {"AdamW": 3e-3, "MuonAdamW": 6e-3}
ALGORITHMS = {
    "halos": ROWS["tuned"],
    "async_local_sgd": ROWS["async_local_sgd_tuned"],
    "diloco_dynamic": ROWS["diloco_dynamic_tuned"],
    "diloco": ROWS["diloco_tuned"],
    "sync_sgd": ROWS["sync_sgd"],
}
NAMES = {
    "halos": "HALoS, tuned",
    "async_local_sgd": "Async-Local-SGD, tuned",
    "diloco_dynamic": "DiLoCo, dynamic steps, tuned",
    "diloco": "DiLoCo, tuned",
    "sync_sgd": "synchronous SGD",
}


MODULES = {"AdamW": ByteGPT, "MuonAdamW": MuonGPT}


class Rows:
    """All rows that have been trained, in a file.

    Args:
        path: The file.
        cluster: The cluster in which missing rows are trained; ``None`` to train none.
    """

    def __init__(self, path: Path, cluster: SimulatedCluster | None) -> None:
        self._path = path
        self._cluster = cluster
        self._rows: list[Result] = json.loads(path.read_text()) if path.exists() else []

    def row(self, algorithm: str, optimizer: str, rate: float, steps: int, seed: int) -> Result | None:
        """Returns a row, and trains it first if need be; ``None`` if no rows are trained."""
        key = {"algorithm": algorithm, "optimizer": optimizer, "lr": rate, "global_steps": steps, "seed": seed}
        found = next((row for row in self._rows if key.items() <= row.items()), None)
        if found is None:
            if self._cluster is None:
                return None
            model = {**MODEL, "lr": rate}
            result = train(ALGORITHMS[algorithm], self._cluster, steps, seed, model, MODULES[optimizer])
            found = {**key, **{name: result[name] for name in ("wall_seconds", "virtual_hours", "val_loss")}}
            self._rows.append(found)
            write(self._path, self._rows)
            print(
                f"{NAMES[algorithm]}, {optimizer}, rate {rate:g}, {steps} steps, seed {seed}:"
                f" {found['val_loss'][-1]:.3f} after {found['wall_seconds']:.0f} s",
                flush=True,
            )
        return found

    def tune(self, algorithm: str, optimizer: str, steps: int) -> tuple[float | None, dict[float, float]]:
        """Returns the best learning rate, ``None`` if a row is missing, and the losses of all rates that were tried."""
        losses: dict[float, float] = {}
        best = FIRST_RATES[optimizer]
        while not {best / 2, best, best * 2} <= losses.keys():
            for rate in (best, best / 2, best * 2):
                if rate not in losses:
                    row = self.row(algorithm, optimizer, rate, steps, seed=0)
                    if row is None:
                        return None, losses
                    losses[rate] = row["val_loss"][-1]
            best = min(losses, key=lambda rate: losses[rate])
        return best, losses


def report(rows: Rows, algorithms: list[str], steps: int, seeds: int) -> str:
    """Trains what is missing. Returns the table."""
    tried = []
    final: dict[tuple[str, str, float], list[Result]] = {}
    for algorithm in algorithms:
        for optimizer in MODULES:
            rate, losses = rows.tune(algorithm, optimizer, steps // 2)
            points = ", ".join(f"{one:g}: {loss:.3f}" for one, loss in sorted(losses.items()))
            if losses:
                tried.append(f"{NAMES[algorithm]:30}{optimizer:12}{points}")
            if rate is not None:
                of_seeds = [rows.row(algorithm, optimizer, rate, steps, seed) for seed in range(seeds)]
                if known := [row for row in of_seeds if row is not None]:
                    final[algorithm, optimizer, rate] = known
    lines = [
        f"{'':30}{'':12}{'best rate':>10}{'mean loss':>11}{'spread':>9}{'hours':>10}{'to loss':>8}   loss of each seed"
    ]
    for (algorithm, optimizer, rate), known in final.items():
        rivals = [row for (_, other, _), of_seeds in final.items() for row in of_seeds if other == optimizer]
        common = max(min(row["val_loss"]) for row in rivals)
        ends = [row["val_loss"][-1] for row in known]
        lines.append(
            f"{NAMES[algorithm]:30}{optimizer:12}{rate:10g}{statistics.mean(ends):11.3f}{max(ends) - min(ends):9.3f}"
            f"{statistics.mean(time_to(row, common) for row in known):10.4f}{common:8.3f}"
            f"   {' '.join(f'{loss:.3f}' for loss in ends)}"
        )
    heads = f"Final losses after {steps} global steps of {BATCH_SIZE} samples per worker:"
    return "\n".join([heads, "", *lines, "", f"Rates that were tried, with {steps // 2} global steps:", "", *tried])


def main() -> int:
    """Trains the missing rows, and writes and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--steps", type=int, default=STEPS, help="global steps of a row; half as many to tune")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--cluster", type=Path, default=ROOT / "examples/clusters/paper.yaml")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/muon", help="the folder of all files")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    quiet()
    cluster = None if args.report else SimulatedCluster.from_yaml(args.cluster)
    text = report(Rows(args.output / "rows.json", cluster), args.algorithms, args.steps, args.seeds)
    (args.output / "table.txt").write_text(f"$ python benchmarks/muon.py --report\n\n{text}\n")
    print(f"\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
