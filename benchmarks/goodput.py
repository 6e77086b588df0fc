"""How much of the work goes on when processes fail? HALoS in a star of jobs, and torchft's DiLoCo, under the same hand.

    python benchmarks/goodput.py [--minutes 3] [--every 30] [--seed 1] [--only halos|torchft]

A server (torchft: its lighthouse) and 3 region jobs (torchft: replica groups) of 2 workers train the same small model
with the same pause per batch, each party in a network namespace of its own. The seeded hand of tests/star kills,
stops, terminates, cuts off and restarts any of them, one fault every ``--every`` seconds on average; each lasts up to
8 seconds, and whoever was killed starts again as a script, with all its imports. Prints for each software the useful
local steps per second (HALoS: of batches that were trained on for the first time; torchft: those that a
synchronization kept) without and with faults, and the goodput, which is their ratio. Exits with 1 if HALoS's goodput
is below 90 %, or if it is below torchft's.

torchft 0.2.0 (and OpenTelemetry, which it imports) is installed into ``.venv-torchft``, on top of this environment's
torch. Needs root, for the namespaces.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from torchft_environment import ENVIRONMENT, install_torchft

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.faults.soak import PATIENCE, REGIONS, SERVER, WORKERS, distant, three_regions  # noqa: E402
from tests.integration.harness import free_port  # noqa: E402
from tests.star.evidence import Evidence  # noqa: E402
from tests.star.hand import Fault, Hand, described, plan  # noqa: E402
from tests.star.network import Place, missing  # noqa: E402
from tests.star.processes import Party, Process, Starter, starting  # noqa: E402
from tests.star.roles import Task  # noqa: E402

GOAL = 0.9
TASK = Task(epochs=100, samples=100_000, pause=0.05, local_steps=8, timeout=120.0)
WARM_UP = 10.0  # seconds between the first step of all workers and the first second that counts

Count = Callable[[float, float], int]


class Lighthouse(Party):
    """torchft's coordinator."""

    def __init__(self, starter: Starter, place: Place, port: int) -> None:
        super().__init__(place)
        self._starter = starter
        self._bind = f"{place.ipv4}:{port}"

    def launch(self) -> list[Process]:
        """See the base class."""
        command = [str(ENVIRONMENT / "bin" / "torchft_lighthouse"), "--bind", self._bind, "--min_replicas", "1"]
        # Its default of 60 s would make all others wait for one that is gone for so long.
        return [self._starter.spawn(*command, "--join_timeout_ms", "1000", name="server", place=self.place)]


class ReplicaGroup(Party):
    """Two workers of torchft, data parallel among themselves."""

    def __init__(self, starter: Starter, name: str, place: Place, lighthouse: str) -> None:
        super().__init__(place)
        self._starter = starter
        self._name = name
        self._lighthouse = lighthouse

    def launch(self) -> list[Process]:
        """See the base class."""
        assert self.place is not None
        shared = {
            **TASK.environment(),
            "ADDRESS": self.place.ipv4,
            "GLOO_SOCKET_IFNAME": "eth0",
            "MASTER_ADDR": self.place.ipv4,
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
            "TORCHFT_LIGHTHOUSE": self._lighthouse,
            "WORLD_SIZE": str(WORKERS),
        }
        script = Path(__file__).with_name("goodput_torchft.py")
        command = [str(ENVIRONMENT / "bin" / "python"), str(script), str(self._starter.folder), self._name]
        return [
            self._starter.spawn(
                *command, name=f"{self._name}-{rank}", place=self.place, environment={**shared, "RANK": str(rank)}
            )
            for rank in range(WORKERS)
        ]


def halos(starter: Starter, places: Mapping[str, Place]) -> tuple[dict[str, Party], Count]:
    """The parties, and a function that counts useful steps between two times."""
    star, parties = three_regions(starter, starter.folder, TASK, places)
    return parties, lambda begin, end: Evidence.read(star.evidence).useful_steps(begin, end)


def torchft(starter: Starter, places: Mapping[str, Place]) -> tuple[dict[str, Party], Count]:
    """The parties, and a function that counts the steps that were kept between two times."""
    port = 29510
    parties: dict[str, Party] = {SERVER: Lighthouse(starter, places[SERVER], port)}
    address = f"http://{places[SERVER].ipv4}:{port}"
    parties.update({name: ReplicaGroup(starter, name, places[name], address) for name in REGIONS})

    def count(begin: float, end: float) -> int:
        lines = [line.split() for path in starter.folder.glob("*.kept") for line in path.read_text().splitlines()]
        return sum(int(steps) for at, steps in lines if begin <= float(at) < end)

    return parties, count


SOFTWARE = {"halos": halos, "torchft": torchft}


def rate(name: str, faults: list[Fault], seconds: float, folder: Path) -> float:
    """Useful local steps per second of a software under a plan of faults."""
    folder.mkdir()
    with starting(folder, as_scripts=True) as starter, distant(SERVER, *REGIONS) as places:
        parties, count = SOFTWARE[name](starter, places)
        for party in parties.values():
            party.start()
        deadline = time.monotonic() + 120
        # A worker makes its file before its first step, and all of them wait for each other there.
        while len([*folder.rglob("*.batches"), *folder.rglob("*.steps")]) < WORKERS * len(REGIONS):
            assert time.monotonic() < deadline, starter.logs()
            time.sleep(0.1)
        time.sleep(WARM_UP)
        hand = Hand(faults, parties, TASK.timeout + PATIENCE, lambda line: print(f"    {line}", file=sys.stderr))
        begin = time.time()
        while time.time() < begin + seconds:
            hand.act()
            time.sleep(0.05)
        for complaint in hand.complaints:
            print(f"    {complaint}")
        return count(begin, begin + seconds) / seconds


def main() -> int:
    """Prints a table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="of each of the runs (default: 3)")
    parser.add_argument("--every", type=float, default=30.0, help="mean seconds between faults (default: 30)")
    parser.add_argument("--seed", type=int, default=1, help="of the hand (default: 1)")
    parser.add_argument("--only", choices=SOFTWARE, help="measure only this")
    options = parser.parse_args()
    if reason := missing():
        print(f"goodput.py: {reason}", file=sys.stderr)
        return 2
    names = [options.only] if options.only else list(SOFTWARE)
    if "torchft" in names:
        install_torchft()
    os.environ["PYTHONPATH"] = f"{ROOT / 'src'}:{ROOT}"
    seconds = 60 * options.minutes
    faults = plan(options.seed, seconds - 10, [SERVER, *REGIONS], (options.every / 3, options.every * 5 / 3))
    print(f"{len(faults)} faults in {seconds:.0f} s: {described(faults)}")
    goodput = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in names:
            without = rate(name, [], min(seconds, 60.0), folder / f"{name}-without")
            with_faults = rate(name, faults, seconds, folder / f"{name}-with")
            goodput[name] = with_faults / without
            print(
                f"{name:8} {without:6.1f} useful steps/s without faults, {with_faults:6.1f} with: {goodput[name]:.1%}",
                flush=True,
            )
    return int("halos" in goodput and goodput["halos"] < max(GOAL, goodput.get("torchft", 0.0)))


if __name__ == "__main__":
    sys.exit(main())
