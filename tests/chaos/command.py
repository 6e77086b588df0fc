"""``python -m tests.chaos``: random runs of one job or, with ``--star``, of a star of jobs."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Sequence

from lightning_halos.core.protocol import ProtocolError
from tests.chaos.ledger import InvariantError
from tests.chaos.runs import ChaosRun, Scenario
from tests.chaos.star import StarRun, StarScenario


def fault_of(seed: int, trace: Callable[[str], object] | None = None, star: bool = False) -> str | None:
    """Runs the scenario of a seed.

    Args:
        seed: The seed.
        trace: Called with a line for each event.
        star: Whether the run is a star of jobs.

    Returns:
        The error, ``None`` if the run succeeded.
    """
    try:
        if star:
            _show(scenario := StarScenario.draw(seed), trace)
            StarRun(scenario, trace).run()
        else:
            _show(settings := Scenario.draw(seed), trace)
            ChaosRun(settings, trace).run()
    except (InvariantError, ProtocolError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs scenarios and prints the seeds that fail. Returns 1 if any does."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--runs", type=int, default=1000, help="number of runs, with a seed each")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first run; the others' follow")
    parser.add_argument("--star", action="store_true", help="run stars of jobs, whose members come and go")
    parser.add_argument("--verbose", action="store_true", help="print every event")
    options = parser.parse_args(arguments)
    logging.getLogger("lightning_halos").setLevel(logging.ERROR)  # rejected and repeated updates are intended
    begin, failed = time.process_time(), 0
    for seed in range(options.seed, options.seed + options.runs):
        fault = fault_of(seed, print if options.verbose else None, options.star)
        if fault is not None:
            failed += 1
            star = " --star" if options.star else ""
            print(f"seed {seed} failed: {fault}\n  see it with{star} --seed {seed} --runs 1 --verbose", flush=True)
    seconds = time.process_time() - begin
    print(f"{options.runs} runs, {failed} failed, {seconds:.1f} s of CPU time")
    return int(failed > 0)


def _show(scenario: object, trace: Callable[[str], object] | None) -> None:
    if trace is not None:
        trace(str(scenario))
