"""Three questions about HALoS that reviewers of the paper asked, answered by small experiments; see docs/questions.md.

    split    How does work split if regions have different numbers of workers, and whose updates count how much?
    stale    Does a slow region, whose updates are stale, spoil the global model?
    period   Why is a small K (pushes between two exchanges) worse?

Each row is in ``rows.json`` as soon as it is there, and is not computed again. All settings are named here, so rows do
not depend on the strategies' defaults::

    python benchmarks/questions.py                  # what is missing, and the tables
    python benchmarks/questions.py period --report  # one question, from the rows that are there
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small_runs import (
    PUBLISHED_GLOBAL,
    PUBLISHED_LOCAL,
    ROOT,
    TASKS,
    TUNED_GLOBAL,
    TUNED_LOCAL,
    Rate,
    Row,
    Rows,
    Run,
    halos,
    nesterov,
)
from torch import Tensor

from lightning_halos import SimulatedCluster
from lightning_halos.core.algorithms import Halos
from lightning_halos.core.delayed_nesterov import OptimizerFactory
from lightning_halos.core.finding import Finding
from lightning_halos.core.global_server import GlobalServer
from lightning_halos.core.local_server import LocalServer
from lightning_halos.core.messages import GlobalModel, RegionUpdate
from lightning_halos.planning.planner import make_timing, plan

SEEDS = range(3)
STEPS = 300  # global steps
TASK = "next_byte"
PAPER = SimulatedCluster.from_yaml(ROOT / "examples/clusters/paper.yaml")
Settings = dict[str, Any]

# ---------------------------------------------------------------------- rules that an experiment changes


class CountingServer(LocalServer):
    """A local server whose next update contains the pushes that arrive during an exchange, too."""

    def merge(self, reply: GlobalModel) -> None:
        assert self._base is not None
        unsent = self._base - self.model
        super().merge(reply)
        self._base[: self.num_parameters] += unsent[: self.num_parameters]


class WeighingServer(GlobalServer):
    """A global server that multiplies each update by a weight."""

    weight: Callable[[GlobalServer, RegionUpdate], float]

    def receive(self, update: RegionUpdate, finding: Finding | None = None, name: str | None = None) -> GlobalModel:
        assert update.vector is not None
        update.vector[: self.num_parameters] *= self.weight(self, update)
        return super().receive(update, finding, name)


@dataclass(frozen=True, kw_only=True)
class ChangedHalos(Halos):
    """HALoS with one rule changed.

    Attributes:
        rate_per_region: Sum of the rates of a local server's workers; then a server's rate is this over its workers.
        weight: The weight of an update at the global server.
        counts_all: Whether pushes that arrive during an exchange are in the next update.
    """

    rate_per_region: float | None = None
    weight: Callable[[GlobalServer, RegionUpdate], float] | None = None
    counts_all: bool = False

    def make_local_optimizer(self, workers: int, servers: int) -> OptimizerFactory:
        if self.rate_per_region is None:
            return super().make_local_optimizer(workers, servers)
        return nesterov((self.rate_per_region / workers, 0.0, 1))

    def local_server(self, index: int, servers: int, workers: int, model: Tensor, *rest: Any) -> LocalServer:
        server = super().local_server(index, servers, workers, model, *rest)
        if self.counts_all:
            server.__class__ = CountingServer
        return server

    def global_server(self, servers: int, model: Tensor, shapes: Sequence[torch.Size]) -> GlobalServer | None:
        if self.weight is None:
            return super().global_server(servers, model, shapes)
        server = WeighingServer(model, self.make_global_optimizer(servers), shapes, servers)
        server.weight = self.weight
        return server


def by_staleness(server: GlobalServer, update: RegionUpdate) -> float:
    """Weighs an update by the square root of the staleness that equal regions have, over its own, if that is more."""
    staleness = server.version - update.version
    return min(1.0, (server.senders / (1 + staleness)) ** 0.5)


# ---------------------------------------------------------------------- training


def trained(algorithm: Halos, cluster: SimulatedCluster, task: str, steps: int, seed: int) -> Row:
    """Trains once. Returns the curve, and counts of what happened."""
    run = Run(algorithm, cluster, make_task(task), steps, seed)
    row = run.train()
    regions = range(len(cluster.regions))
    updates = [event for event in run.network.history if event.kind == "update"]
    total = sum(run.trained)
    return {
        **row,
        "steps_of_region": [round(sum(run.trained[r] for r in ranks) / total, 4) for ranks in cluster.regions],
        "updates_of_region": [sum(event.server == region for event in updates) for region in regions],
        "staleness_of_region": [
            round(statistics.mean(event.staleness for event in updates if event.server == region), 2)
            for region in regions
        ],
    }


@cache
def make_task(name: str) -> Any:
    """Makes a task once."""
    return TASKS[name]()


def mean_and_spread(rows: Sequence[Row]) -> str:
    """Returns the mean final loss of the seeds that are there, and the highest minus the lowest."""
    losses = [row["final_loss"] for row in rows]
    spread = f"{max(losses) - min(losses):.3f}" if len(losses) > 1 else "one seed"
    return f"{statistics.mean(losses):10.3f}{spread:>10}"


# ---------------------------------------------------------------------- how work splits

SIZES = (1, 2, 4, 9)  # workers of the regions


def _unequal_regions(home: int) -> SimulatedCluster:
    return SimulatedCluster(
        [[100.0 if a == b else 0.5 for b in range(4)] for a in range(4)],
        [[1.0] * size for size in SIZES],
        step_ms=PAPER.step_ms,
        message_bytes=PAPER.message_bytes,
        global_region=home,
    )


CLUSTERS = {
    "paper's": PAPER,
    "1, 2, 4, 9 workers, server at the 9": _unequal_regions(3),
    "1, 2, 4, 9 workers, server at the 1": _unequal_regions(0),
}
SPLITS: dict[str, Settings] = {
    "rate 0.25, K 8": {"rate": 0.25, "period": 8},
    "rate 1 / workers, K 2 x workers": {"rate_per_region": 1.0, "per_worker": 2},
    "the same, weighed": {"rate_per_region": 1.0, "per_worker": 2, "weighs": True},
    "rate 1 / workers, K 8 x workers": {"rate_per_region": 1.0, "per_worker": 8},
}
"""Settings without local momentum: of the local servers' rates and of K. `weighs`: updates are weighed by workers."""


def by_workers(server: GlobalServer, update: RegionUpdate) -> float:
    """Weighs an update by the workers of its region; the mean weight is 1."""
    return SIZES[update.server] * len(SIZES) / sum(SIZES)


def split_algorithm(name: str) -> ChangedHalos:
    """Returns the algorithm of one of ``SPLITS``."""
    settings = SPLITS[name]
    return ChangedHalos(
        local_steps=4,
        dynamic_local_steps=True,
        accumulate_updates=settings.get("period"),
        updates_per_worker=settings.get("per_worker", 8),
        merge_weight=0.25,
        local_optimizer=nesterov((settings["rate"], 0.0, 1)) if "rate" in settings else None,
        global_optimizer=nesterov(TUNED_GLOBAL),
        rate_per_region=settings.get("rate_per_region"),
        weight=by_workers if settings.get("weighs") else None,
    )


def influence(name: str, cluster: SimulatedCluster) -> tuple[list[float], list[float], list[int]]:
    """Returns each region's share of the local steps and of the global model's changes, and its exchanges.

    A push changes the global model only in an update, by its pseudo-gradient times the rates of both servers. A
    pseudo-gradient counts as its local steps here. Momentum would multiply all of them alike.
    """
    algorithm, hours = split_algorithm(name), 0.2
    made = plan(algorithm, make_timing(cluster), hours, hours * 3.6e6)
    steps = made.rounds * made.local_steps
    shares, changes = [], []
    recording = made.recording
    for group, own, pushes in zip(recording.groups, recording.exchanges, recording.pushes, strict=True):
        size = len(group.ranks)
        rate = algorithm.rate_per_region / size if algorithm.rate_per_region else SPLITS[name]["rate"]
        weight = size * len(recording.groups) / len(steps) if algorithm.weight else 1.0
        done = np.concatenate([[0], np.cumsum(made.local_steps[pushes.senders])])
        starts = np.concatenate([[0], own.merged_versions[:-1]])
        shares.append(float(steps[list(group.ranks)].sum() / steps.sum()))
        changes.append(rate * weight * float((done[own.sent_versions] - done[starts]).sum()))
    exchanges = [len(own.sent) for own in recording.exchanges]
    return shares, [change / sum(changes) for change in changes], exchanges


def split(rows: Callable[..., Row | None]) -> str:
    """Answers the first question."""
    lines = [
        f"shares by region and exchanges in 0.2 hours, from the plan; loss after {STEPS} global steps",
        f"{'':36}{'share of steps':26}{'share of changes':26}{'exchanges':20}{'loss':>10}{'spread':>10}",
    ]
    for place, cluster in CLUSTERS.items():
        lines += ["", place]
        for name, settings in SPLITS.items():
            if settings.get("weighs") and cluster is PAPER:
                continue  # its regions have equally many workers
            steps, changes, exchanges = influence(name, cluster)
            columns = [" ".join(f"{share:5.3f}" for share in shares) for shares in (steps, changes)]
            line = f"    {name:32}{columns[0]:26}{columns[1]:26}{' '.join(map(str, exchanges)):20}"
            if cluster is not PAPER and settings.get("per_worker") != 8:
                found = [
                    rows(
                        {"question": "split", "cluster": place, **settings, "steps": STEPS, "seed": seed},
                        partial(trained, split_algorithm(name), cluster, TASK, STEPS, seed),
                    )
                    for seed in SEEDS
                ]
                known = [row for row in found if row is not None]
                line += mean_and_spread(known) if known else ""
            lines.append(line.rstrip())
    return "\n".join(lines)


# ---------------------------------------------------------------------- stale regions


def _equal_regions(number: int, speed: float = 1.0, link: float = 0.5) -> SimulatedCluster:
    """Returns regions of 4 workers, whose last one has workers of another speed and another link to the others."""
    last = number - 1
    links = [[100.0 if a == b else link if last in (a, b) else 0.5 for b in range(number)] for a in range(number)]
    speeds = [[1.0] * 4] * last + [[speed] * 4]
    return SimulatedCluster(links, speeds, step_ms=PAPER.step_ms, message_bytes=PAPER.message_bytes)


SLOW = {
    "equal regions": _equal_regions(4),
    "workers 8 x slower": _equal_regions(4, speed=1 / 8),
    "workers 32 x slower": _equal_regions(4, speed=1 / 32),
    "link 16 x slower": _equal_regions(4, link=0.5 / 16),
}
WITHOUT = _equal_regions(3)
KINDS = ("kept", "weighed by staleness", "left out")


def stale(rows: Callable[..., Row | None]) -> str:
    """Answers the second question. All runs train on the same number of samples."""
    lines = [
        f"4 regions of 4 workers, the last one slow; {16 * STEPS} local steps in all",
        f"{'':22}{'its updates are':24}{'loss':>10}{'spread':>10}{'before flush':>14}{'seconds':>10}"
        f"{'its share of steps':>20}{'staleness':>11}{'of others':>11}",
    ]
    for slow, cluster in SLOW.items():
        for kind in KINDS:
            if kind == "left out" and slow != "equal regions":
                continue  # the same run for all
            algorithm = ChangedHalos(
                local_steps=4,
                dynamic_local_steps=True,
                accumulate_updates=8,
                merge_weight=0.25,
                local_optimizer=nesterov(TUNED_LOCAL),
                global_optimizer=nesterov(TUNED_GLOBAL),
                weight=by_staleness if kind == "weighed by staleness" else None,
            )
            where, steps = (WITHOUT, STEPS * 16 // 12) if kind == "left out" else (cluster, STEPS)
            found = [
                rows(
                    {"question": "stale", "slow": slow, "kind": kind, "steps": steps, "seed": seed},
                    partial(trained, algorithm, where, TASK, steps, seed),
                )
                for seed in SEEDS
            ]
            known = [row for row in found if row is not None]
            if known:
                row = known[0]
                out = kind == "left out"
                lines.append(
                    f"{'' if out else slow:22}{kind:24}{mean_and_spread(known)}"
                    f"{statistics.mean(row['val_loss'][-2] for row in known):14.3f}"
                    f"{statistics.mean(row['virtual_seconds'][-1] for row in known):10.1f}"
                    f"{'' if out else format(row['steps_of_region'][-1], '.3f'):>20}"
                    f"{'' if out else format(row['staleness_of_region'][-1], '.1f'):>11}"
                    f"{statistics.mean(row['staleness_of_region'][:3]):11.1f}"
                )
    return "\n".join(lines)


# ---------------------------------------------------------------------- a small K

SERVERS: dict[str, tuple[int, Rate, Rate]] = {
    "tuned": (4, TUNED_LOCAL, TUNED_GLOBAL),
    "published": (8, PUBLISHED_LOCAL, PUBLISHED_GLOBAL),
}
FAST_LINKS = dataclasses.replace(PAPER, bandwidths=[[100.0] * 4] * 4)
CHANGES: dict[str, dict[str, Sequence[int]]] = {
    "tuned": {
        "as it is": (1, 8, 16, 64),
        "links between regions as fast as inside": (1, 8),
        "global rate x share(8) / share(K)": (1,),
        "all pushes counted, global rate x share(K)": (1, 8),
    },
    "published": {"as it is": (1, 8, 32, 64), "global rate x share(32) / share(K)": (1,)},
}
"""Values of K, by what is changed. ``share`` is the part of the pushes that are in an update, from the plan."""


def share_of(servers: str, period: int, cluster: SimulatedCluster = PAPER) -> tuple[float, float]:
    """Returns the part of the pushes that are in an update, and the exchanges of a region in ``STEPS`` global steps."""
    made = plan(halos(SERVERS[servers][0], period, *SERVERS[servers][1:]), make_timing(cluster), 0.5)
    assert made.sent_share is not None
    return made.sent_share, made.global_updates / made.global_steps * STEPS / len(cluster.regions)


def period(rows: Callable[..., Row | None]) -> str:
    """Answers the third question.

    The gain is what the global model moves in the long run when the regions' models move by 1: the sum of the regions'
    rates, times what momentum makes of it, times the part of the pushes that are sent.
    """
    lines = []
    for servers, (steps, local, outer) in SERVERS.items():
        lines += [
            f"{servers}: H {steps}, local {local[0]:g}/{local[1]:g}/{local[2]}, global"
            f" {outer[0]:g}/{outer[1]:g}/{outer[2]}, alpha 0.25; {STEPS} global steps",
            f"{'':44}{'K':>4}{'loss':>10}{'spread':>10}{'pushes sent':>13}{'exchanges':>11}{'gain':>7}",
        ]
        for change, periods in CHANGES[servers].items():
            for k in periods:
                rate = outer
                cluster = FAST_LINKS if change.startswith("links") else PAPER
                if "rate" in change:
                    share = share_of(servers, k)[0]
                    usual = 8 if servers == "tuned" else 32
                    factor = share if change.startswith("all") else share_of(servers, usual)[0] / share
                    rate = (round(outer[0] * factor, 4), *outer[1:])
                algorithm = ChangedHalos(
                    local_steps=steps,
                    dynamic_local_steps=True,
                    accumulate_updates=k,
                    merge_weight=0.25,
                    local_optimizer=nesterov(local),
                    global_optimizer=nesterov(rate),
                    counts_all=change.startswith("all"),
                )
                key = {"question": "period", "servers": servers, "change": change, "K": k, "global": rate}
                found = [
                    rows(
                        {**key, "steps": STEPS, "seed": seed},
                        partial(trained, algorithm, cluster, TASK, STEPS, seed),
                    )
                    for seed in SEEDS
                ]
                known = [row for row in found if row is not None]
                if known:
                    share, exchanges = share_of(servers, k, cluster)
                    share = 1.0 if change.startswith("all") else share
                    gain = len(cluster.regions) * rate[0] / (1 - rate[1]) * share
                    lines.append(f"{change:44}{k:4}{mean_and_spread(known)}{share:13.0%}{exchanges:11.1f}{gain:7.2f}")
        lines.append("")
    return "\n".join(lines).rstrip()


QUESTIONS = {"split": split, "stale": stale, "period": period}


def main() -> int:
    """Computes the missing rows, and writes and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", default=list(QUESTIONS), help="default: all")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/questions", help="the folder of all files")
    args = parser.parse_args()
    if unknown := set(args.questions) - set(QUESTIONS):
        parser.error(f"{unknown.pop()!r} is none of {', '.join(QUESTIONS)}")
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rows = Rows(args.output / "rows.json", trains=not args.report)
    texts = []
    for name in args.questions:
        texts.append(f"$ python benchmarks/questions.py {name} --report\n\n{QUESTIONS[name](rows)}\n")
        (args.output / f"{name}.txt").write_text(texts[-1])
    print("\n\n".join(texts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
