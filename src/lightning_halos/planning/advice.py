"""What the planner advises by itself, next to the numbers that were asked for. It simulates the alternative, too."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lightning_halos.core.algorithms import Algorithm, ServerAlgorithm
from lightning_halos.planning.planner import Plan, plan
from lightning_halos.simulation.timing import Timing

PAYS = 0.05
"""Share of the time per global step that overlap must save to be worth it; see ``docs/overlap.md``."""

WAITS = 0.2
"""Share of their time that workers wait with overlap from which on more local steps per round are worth a try."""


def advice_on_overlap(algorithms: Sequence[Algorithm], plans: Sequence[Plan], timing: Timing, hours: float) -> str:
    """Returns a line for each algorithm whose workers may train on while their pushes are answered.

    It leaves out an algorithm whose first round takes longer without overlap than the hours.

    Args:
        algorithms: The algorithms that were planned.
        plans: Their plans.
        timing: The durations on the cluster.
        hours: Virtual hours that were simulated.
    """
    lines = []
    for algorithm, result in zip(algorithms, plans, strict=True):
        if isinstance(algorithm, ServerAlgorithm):
            try:
                other = plan(dataclasses.replace(algorithm, overlap=not algorithm.overlap), timing, hours)
            except ValueError:  # without overlap, the first round takes longer than these hours
                continue
            waiting, overlapping = (other, result) if algorithm.overlap else (result, other)
            before, after = waiting.seconds_per_global_step, overlapping.seconds_per_global_step
            saved = 1 - after / before
            verdict = "it pays here" if saved >= PAYS else "it gains little here"
            waits = float(overlapping.shares[1])
            more = f" Workers still wait {waits:.0%} of their time: raise local_steps, too." if waits >= WAITS else ""
            lines.append(
                f"overlap=True, {result.title}: {after:.3f} s per global step instead of {before:.3f}"
                f" ({saved:.0%} less): {verdict}.{more}\n"
            )
    return "".join(lines)
