"""The race on a slow network: HALoS, our DiLoCo, torchft's DiLoCo and Lightning's DDP, side by side.

    sudo python benchmarks/network.py                                # the complete race; about 40 minutes on 2 cores
    sudo python benchmarks/network.py --cases 100 --only halos ddp   # these rows only
    sudo python benchmarks/network.py --wire int4 --overlap          # HALoS also with these, as further rows
    python benchmarks/network.py --report                            # the tables and the picture again

Two regions of two workers each are two network namespaces of this machine, with a link between them that ``tc tbf``
limits: 100, 500 and 20 Mbit/s, and once more 100 Mbit/s with a worker at a quarter of its speed. They train the demo's
GPT with 10.9 million parameters, all with the same data, inner optimizer, schedule and number of samples. Each worker
stands for a device of its own: a batch takes it ``--pace`` seconds, of which it computes for a part and sleeps for the
rest, because all share this machine's cores. A run ends after ``--limit`` seconds, whatever it has reached. Its models
are evaluated afterwards.

Writes each row into ``docs/network/results.json`` when it ends, and does not run rows again that are there with the
same settings, so that a race that was interrupted goes on. Then puts the tables into ``docs/network.md``, and the
picture beside the results. Nothing else should run on the machine.

Needs root, for the namespaces. torchft 0.2.0 is installed into ``.venv-torchft``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from pathlib import Path

from torchft_environment import install_torchft

ROOT = Path(__file__).parents[1]
PATHS = [str(ROOT / "src"), str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "examples")]
sys.path[:0] = PATHS

from race.cases import CONTESTANTS, Case, Contestant  # noqa: E402
from race.report import plot, put, tables  # noqa: E402
from race.rows import Result, run  # noqa: E402

from tests.star.network import missing  # noqa: E402

CASES = ("100", "100-slow", "500", "20")
STEPS = 96  # global steps, a multiple of DiLoCo's rounds


class Results:
    """The rows so far, which are kept in a file.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[Result] = json.loads(path.read_text()) if path.exists() else []

    def has(self, key: dict[str, object]) -> bool:
        """Whether there is a row with these values."""
        return any(row["key"] == key for row in self.rows)

    def add(self, row: Result) -> None:
        """Adds a row, in the place of the one of the same case and contestant, if there is one."""
        same = (row["case"], row["contestant"])
        self.rows = [other for other in self.rows if (other["case"], other["contestant"]) != same] + [row]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("[\n" + ",\n".join(json.dumps(row) for row in self.rows) + "\n]\n")


def machine() -> str:
    """The processor and the number of its cores."""
    name = platform.processor()
    if (path := Path("/proc/cpuinfo")).exists():
        names = [line.partition(":")[2].strip() for line in path.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores"


def contestants(options: argparse.Namespace) -> dict[str, Contestant]:
    """The contestants, with HALoS's further rows."""
    all_of_them = dict(CONTESTANTS)
    if options.wire:
        wire = {"within": "float32", "between": options.wire}
        all_of_them["halos_wire"] = Contestant(
            f"HALoS, {options.wire} between regions", "halos", options={"wire": wire}
        )
    if options.overlap:
        all_of_them["halos_overlap"] = Contestant("HALoS, overlap", "halos", options={"overlap": True})
    return all_of_them


def race(options: argparse.Namespace, results: Results) -> list[str]:
    """Runs the rows that are missing. Returns those that failed."""
    failed = []
    chosen = contestants(options)
    for case in map(Case.parse, options.cases):
        for name, contestant in chosen.items():
            key = {
                "case": case.name,
                "contestant": contestant.name,
                "steps": options.steps,
                "pace": options.pace,
                "limit": options.limit,
            }
            if (options.only and name not in options.only) or results.has(key):
                continue
            print(f"{time.strftime('%H:%M:%S')}  {case.title}: {contestant.name}", flush=True)
            try:
                with tempfile.TemporaryDirectory() as folder:
                    row = run(case, contestant, options.steps, options.pace, options.limit, Path(folder))
            except RuntimeError as error:
                print(error, file=sys.stderr, flush=True)
                failed.append(f"{case.title}: {contestant.name}")
                continue
            results.add({"key": key, "machine": machine(), **row})
            step, seconds, loss = row["curve"][-1]
            print(
                f"          {row['samples_per_second']:.2f} samples/s, predicted"
                f" {row['predicted_samples_per_second']:.2f}; loss {loss:.3f} after {step} global steps,"
                f" {seconds:.0f} s (a batch is computed in {row['computed_seconds']} s; load {row['load_average']})",
                flush=True,
            )
    return failed


def main() -> int:
    """Runs the race and reports; returns 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", nargs="+", default=CASES, help=f"Mbit/s, also with -slow (default: {' '.join(CASES)})"
    )
    parser.add_argument(
        "--only", nargs="+", help="run only these: halos, diloco, torchft, ddp, halos_wire, halos_overlap"
    )
    parser.add_argument("--wire", help="add HALoS with this format of messages between regions, such as int4")
    parser.add_argument("--overlap", action="store_true", help="add HALoS with overlap=True")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"global steps (default: {STEPS})")
    parser.add_argument("--pace", type=float, default=0.6, help="seconds per batch of a device (default: 0.6)")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds until a run is ended (default: 150)")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/network", help="the folder of results and picture")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/network.md", help="the page with the tables")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process or namespace is left behind
    results, failed = Results(options.output / "results.json"), []
    if not options.report:
        if reason := missing():
            print(f"network.py: {reason}", file=sys.stderr)
            return 2
        install_torchft()
        os.environ["PYTHONPATH"] = ":".join(PATHS)
        failed = race(options, results)
    if results.rows:
        text = tables(results.rows)
        print(text)
        put(options.page, text)
        plot(results.rows, options.output / "loss.png")
    if failed:
        print(f"These rows failed: {', '.join(failed)}.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
