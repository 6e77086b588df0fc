"""The cases and contestants of the race: settings by the planner's rules, and what the planner predicts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_halos.core.algorithms import Algorithm, Diloco, Halos, SyncSGD
from lightning_halos.planning.planner import make_timing, plan
from lightning_halos.planning.sweep import SENT, recommend, sweep
from lightning_halos.simulation.cluster import AllReduce, SimulatedCluster
from lightning_halos.simulation.timing import Timing
from race.task import BATCH, REGIONS, WORKERS, message_bytes

SLOW = 4.0  # times as long for a batch, of the last worker in the cases with a slow one
INSIDE = 10.0  # Gbit/s of messages inside a region: less than a plain copy, because both ends work on them, too
DILOCO_LOCAL_STEPS = (8, 16, 32)
DILOCO_COMPUTES = 0.6  # share of a round in which DiLoCo computes, at least

# What the demo has: good in runs of so few steps (docs/time-to-loss.md).
SERVERS: dict[str, Any] = {
    "merge_weight": 0.5,
    "local": {"lr": 0.4, "momentum": 0.0, "delay": 1},
    "global": {"lr": 0.4, "momentum": 0.2, "delay": 1},
}
OUTER: dict[str, Any] = {"lr": 1.0}  # the mean of the workers' models: a momentum is made for more rounds


@dataclass(frozen=True)
class Case:
    """A network, and the workers on it.

    Attributes:
        mbit: Mbit/s between the regions, in each direction.
        has_slow_worker: Whether the last worker takes 4 times as long for a batch.
    """

    mbit: float
    has_slow_worker: bool

    @property
    def name(self) -> str:
        """A name such as ``"100"`` or ``"100-slow"``."""
        return f"{self.mbit:g}-slow" if self.has_slow_worker else f"{self.mbit:g}"

    @property
    def title(self) -> str:
        """A name for people."""
        return f"{self.mbit:g} Mbit/s" + (", one slow worker" if self.has_slow_worker else "")

    @classmethod
    def parse(cls, name: str) -> Case:
        """Returns the case of a name.

        Raises:
            ValueError: If it is no such name.
        """
        mbit, _, rest = name.partition("-")
        if rest not in ("", "slow"):
            raise ValueError(f"{name!r} must be a number of Mbit/s, such as 100, or the same with -slow.")
        return cls(float(mbit), rest == "slow")

    def seconds(self, pace: float) -> list[float]:
        """Returns the seconds of a batch of each worker, by rank."""
        return [pace] * (WORKERS - 1) + [pace * (SLOW if self.has_slow_worker else 1.0)]

    def cluster(self, pace: float, between: float, all_reduce: AllReduce) -> SimulatedCluster:
        """Describes the cluster, with measured Gbit/s between the regions."""
        per_region = WORKERS // REGIONS
        speeds = [pace / seconds for seconds in self.seconds(pace)]
        return SimulatedCluster(
            bandwidths=[[INSIDE if a == b else between for b in range(REGIONS)] for a in range(REGIONS)],
            worker_speeds=[speeds[i : i + per_region] for i in range(0, WORKERS, per_region)],
            step_ms=pace * 1e3,
            message_bytes=message_bytes(),
            all_reduce=all_reduce,
        )


@dataclass(frozen=True)
class Contestant:
    """A way to train.

    Attributes:
        name: Its name, for people.
        software: ``"halos"``, ``"diloco"``, ``"ddp"`` or ``"torchft"``.
        all_reduce: How it averages over all workers.
        options: Further arguments of HALoS: ``overlap`` and ``wire``, which the planner knows, too.
    """

    name: str
    software: str
    all_reduce: AllReduce = "star"
    options: dict[str, Any] = field(default_factory=dict)


CONTESTANTS = {
    "halos": Contestant("HALoS", "halos"),
    "diloco": Contestant("DiLoCo (ours)", "diloco"),
    "torchft": Contestant("DiLoCo (torchft 0.2.0)", "torchft", "ring"),
    "ddp": Contestant("DDP", "ddp", "ring"),
}


def choose(case: Case, contestant: Contestant, timing: Timing, steps: int, pace: float) -> tuple[dict[str, Any], float]:
    """Returns a contestant's settings, and the seconds per global step that the planner predicts for them.

    HALoS gets the H and K that ``lightning-halos plan --sweep`` recommends: those with the freshest models that keep
    workers busy and send half of the pushes to the global server, if there are such. It keeps them with further
    options, so that its rows differ by these alone. DiLoCo gets the smallest H of 8, 16 and 32 with which it computes
    for at least 60 % of a round, else the largest.
    """
    settings: dict[str, Any] = {
        "software": contestant.software,
        "steps": steps,
        "seconds": case.seconds(pace),
        "validate_every": 1,
    }
    algorithm: Algorithm
    if contestant.software == "halos":
        trials = sweep(timing, servers_per_region=(1,))
        trial = recommend(trials, sent=SENT) or recommend(trials)
        assert trial is not None
        period = trial.updates_per_worker * WORKERS // REGIONS
        algorithm = Halos(local_steps=trial.local_steps, accumulate_updates=period, **contestant.options)
        settings |= {"local_steps": trial.local_steps, "accumulate_updates": period, **SERVERS}
        settings |= {"validate_every": 8, "options": contestant.options}
    elif contestant.software == "ddp":
        algorithm = SyncSGD()
    else:
        algorithm = Diloco(local_steps=DILOCO_LOCAL_STEPS[-1])
        for local_steps in DILOCO_LOCAL_STEPS:
            round_seconds = plan(Diloco(local_steps=local_steps), timing).seconds_per_global_step * local_steps
            if max(settings["seconds"]) * local_steps >= DILOCO_COMPUTES * round_seconds:
                algorithm = Diloco(local_steps=local_steps)
                break
        settings |= {"local_steps": algorithm.local_steps, "outer": OUTER, "validate_every": algorithm.local_steps}
    return settings, plan(algorithm, timing).seconds_per_global_step


def timing(case: Case, contestant: Contestant, pace: float, between: float) -> Timing:
    """Returns the durations of a case for a contestant, with Gbit/s between the regions."""
    return make_timing(case.cluster(pace, between, contestant.all_reduce))


def samples_per_second(seconds_per_global_step: float) -> float:
    """Returns the samples of all workers per second."""
    return WORKERS * BATCH / seconds_per_global_step
