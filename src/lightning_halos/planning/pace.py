"""How many global steps an algorithm trains in a virtual time, and how long it needs for them, from the plan."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from lightning_halos.core.algorithms import Algorithm, ServerAlgorithm
from lightning_halos.planning.planner import MS_PER_HOUR, groups_of, longest_rounds, plan
from lightning_halos.simulation.timing import Timing

_ROUNDS = 300  # of a worker, on average, that are planned to see how long pushes wait for servers


class Pace(NamedTuple):
    """The pace of an algorithm on a cluster: that of all workers together, as all of them have rounds without a break.

    The last rounds of a run are shortened so that they end with its last step. So rounds are not counted, but the time
    of the steps in them, which is exact to about a round.

    Attributes:
        step: Seconds per global step inside a round.
        round_steps: Global steps of a round of all workers; ``inf`` if workers have rounds of their own.
        round_end: Seconds after each round of all workers, for an all-reduce.
        end: Seconds after the last step until the final model is complete.
    """

    step: float
    round_steps: float
    round_end: float
    end: float

    def seconds(self, steps: float) -> float:
        """Returns the virtual seconds of a run with this number of global steps."""
        rounds = math.ceil(steps / self.round_steps - 1e-9) if self.round_steps < math.inf else 0
        return steps * self.step + rounds * self.round_end + self.end

    def steps(self, seconds: float) -> int:
        """Returns the largest number of global steps of a run that takes at most this number of virtual seconds."""
        left = max(0.0, seconds - self.end) * (1 + 1e-9)
        if self.round_steps == math.inf:
            return int(left / self.step)
        one = self.round_steps * self.step + self.round_end
        rounds = int(left / one)
        rest = max(0.0, left - rounds * one - self.round_end) / self.step
        return int(rounds * self.round_steps + rest + 1e-6)


def pace_of(algorithm: Algorithm, timing: Timing) -> Pace:
    """Returns the pace of an algorithm on a cluster."""
    longest = longest_rounds(algorithm, timing)
    horizon = 2 * float(longest.max())  # one round of each worker says all, unless servers take time
    if timing.serve:
        horizon = max(horizon, _ROUNDS / float((1 / longest).mean()))
    made = plan(algorithm, timing, horizon / MS_PER_HOUR)
    duration = made.round_ms.sum(axis=1)
    if not isinstance(algorithm, ServerAlgorithm):
        compute, steps = float(made.round_ms[:, 0].max()), float(made.local_steps.mean())
        return Pace(compute / steps / 1e3, steps, (float(duration[0]) - compute) / 1e3, 0.0)
    step = 1.0 / float(np.mean(made.local_steps / duration)) / 1e3
    groups, home = groups_of(algorithm, timing.cluster), timing.cluster.global_region
    flush = 0.0
    if len(groups) > 1:
        timing = timing.on(algorithm.wire)
        flush = max(timing.transfer(group.region, home) for group in groups) + timing.serve
    return Pace(step, math.inf, 0.0, flush / 1e3)
