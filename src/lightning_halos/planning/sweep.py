"""Plans HALoS under many settings, to find those that keep workers busy with little staleness.

It compares times and staleness, never losses, which only training can tell.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_halos.core.algorithms import Halos
from lightning_halos.core.wire_formats import PLAIN, WireFormats
from lightning_halos.planning.planner import Plan, plan
from lightning_halos.planning.report import describe_cluster
from lightning_halos.simulation.timing import Timing
from lightning_halos.text_tables import align

LOCAL_STEPS = (2, 4, 8, 16, 32, 64)
UPDATES_PER_WORKER = (2, 4, 8, 16)
SERVERS_PER_REGION = (1, 2, 4)
KEEP = 0.95
SENT = 0.5


@dataclass(frozen=True)
class Trial:
    """A combination of settings and its plan."""

    local_steps: int  # H
    updates_per_worker: int  # K divided by the number of the server's workers
    servers_per_region: int
    plan: Plan

    @property
    def utilization(self) -> float:
        """Share of computing in the workers' time."""
        return float(self.plan.shares[0])

    @property
    def behind(self) -> float:
        """Mean age of the models that workers start from, in global steps.

        It is the number of local steps that a push misses from its own server's workers, plus the number that a
        region's update misses from the other servers, divided by the number of workers. Versions cannot be used to
        compare settings, because a version is H local steps at a local server and K times H at the global server.
        """
        assert self.plan.updates is not None
        return (self.plan.pushes.missed_steps + self.plan.updates.missed_steps) / len(self.plan.rounds)

    @property
    def sent(self) -> float:
        """Share of the pushes that are part of an update to the global server."""
        return self.plan.sent_share or 0.0

    @property
    def traffic(self) -> float:
        """Gigabytes between regions per global step."""
        return self.plan.bytes_between / 1e9 / self.plan.global_steps

    def beats(self, other: Trial) -> bool:
        """Whether this trial is as good as ``other`` in utilization, staleness and traffic, and better in one."""
        mine, theirs = ((-t.utilization, t.behind, t.traffic) for t in (self, other))
        return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


def sweep(
    timing: Timing,
    hours: float = 1.0,
    local_steps: Sequence[int] = LOCAL_STEPS,
    updates_per_worker: Sequence[int] = UPDATES_PER_WORKER,
    servers_per_region: Sequence[int] = SERVERS_PER_REGION,
    overlap: bool = False,
    wire: WireFormats = PLAIN,
) -> list[Trial]:
    """Plans HALoS under every combination of settings.

    Args:
        timing: The durations on the cluster.
        hours: Virtual hours of each plan.
        local_steps: Values of ``local_steps``.
        updates_per_worker: Values of ``accumulate_updates``, per worker of a server.
        servers_per_region: Values of ``servers_per_region``. Those that exceed the workers of a region are left out.
        overlap: Whether workers train on while their pushes are answered, in all plans.
        wire: The formats in which vectors travel, in all plans.

    Returns:
        A trial for each combination: by ``local_steps``, then by ``servers_per_region``, then by
        ``updates_per_worker``.

    Raises:
        ValueError: If the time is too short for an exchange with the global server, or there would be none.
    """
    if len(timing.cluster.regions) == 1 and 1 in servers_per_region:
        raise ValueError("A sweep varies exchanges with the global server, and a cluster of one region has none.")
    smallest = min(map(len, timing.cluster.regions))
    possible = [number for number in servers_per_region if number <= smallest]
    trials = []
    for steps, servers, updates in itertools.product(local_steps, possible, updates_per_worker):
        halos = Halos(
            local_steps=steps,
            updates_per_worker=updates,
            servers_per_region=servers,
            overlap=overlap,
            wire=wire,
        )
        result = plan(halos, timing, hours)
        if result.sent_share is None:
            raise ValueError(
                f"hours={hours:g} is too short: with local_steps={steps}, servers_per_region={servers} and"
                f" accumulate_updates={updates} for each worker of a server, no exchange with the global server is"
                " completed. Give more hours."
            )
        trials.append(Trial(steps, updates, servers, result))
    return trials


def recommend(trials: Sequence[Trial], keep: float = KEEP, sent: float = 0.0) -> Trial | None:
    """Returns the setting with the least staleness among those that keep workers busy and send enough pushes.

    Args:
        trials: At least one trial.
        keep: Minimum utilization, as a share of the best one.
        sent: Minimum share of the pushes that are part of an update to the global server.

    Returns:
        The trial; ``None`` if no busy one reaches ``sent``.
    """
    best = max(trial.utilization for trial in trials)
    busy = (trial for trial in trials if trial.utilization >= keep * best and trial.sent >= sent)
    return min(busy, key=lambda trial: trial.behind, default=None)


def sweep_table(trials: Sequence[Trial], timing: Timing) -> str:
    """Returns all trials as a table, followed by a recommendation."""
    choice = recommend(trials)
    rows = []
    for trial in trials:
        result = trial.plan
        assert result.updates is not None
        is_best = not any(other.beats(trial) for other in trials)
        rows.append(
            {
                "H": str(trial.local_steps),
                "K per worker": str(trial.updates_per_worker),
                "servers/region": str(trial.servers_per_region),
                "utilization": f"{trial.utilization:.1%}",
                "s/global step": f"{result.seconds_per_global_step:.3f}",
                "pushes": f"{result.pushes.mean:.2f} ({result.pushes.p95})",
                "updates": f"{result.updates.mean:.2f} ({result.updates.p95})",
                "behind": f"{trial.behind:.1f}",
                "sent": f"{trial.sent:.0%}",
                "GB": f"{trial.traffic:.3f}",
                "": ("*" if is_best else " ") + ("<" if trial is choice else " "),
            }
        )
    return (
        f"{describe_cluster(timing)}\n\n{align([list(rows[0]), *(list(row.values()) for row in rows)])}\n\n"
        "pushes, updates  staleness in versions, of pushes and of region updates: mean (95th percentile)\n"
        "behind           the same in global steps, both together, mean\n"
        "sent             pushes in updates to the global server; the others came while an exchange was under way\n"
        "GB               between regions, per global step\n"
        "*                no other setting is as good in utilization, behind and GB, and better in one\n"
        f"<                the least behind of those with at least {KEEP:.0%} of the best utilization\n"
        "This is about time, not about loss: only training can show how a setting changes the loss.\n\n"
        f"{_advice(trials)}\n"
    )


def _advice(trials: Sequence[Trial]) -> str:
    fresh, heard = recommend(trials), recommend(trials, sent=SENT)
    assert fresh is not None
    text = f"Busy workers at the least staleness:\n{_describe(fresh)}"
    if heard is None:
        return f"{text}\nNo busy setting sends {SENT:.0%} of the pushes to the global server."
    if heard is not fresh:
        text += f"\nThe same, with at least {SENT:.0%} of the pushes sent to the global server:\n{_describe(heard)}"
    return text


def _describe(trial: Trial) -> str:
    return (
        f"  local_steps={trial.local_steps}, servers_per_region={trial.servers_per_region}, accumulate_updates="
        f"{trial.updates_per_worker} for each worker of a server\n"
        f"  utilization {trial.utilization:.1%}, {trial.behind:.1f} global steps behind, {trial.sent:.0%} of the pushes"
        f" sent, {trial.traffic:.3f} GB between regions per global step"
    )
