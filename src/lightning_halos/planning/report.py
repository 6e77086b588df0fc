"""Writes plans as a table, as JSON and as a picture.

It only formats the numbers of plans, which are all on one cluster, that of the timing, and computes no new ones.
matplotlib is imported where a picture is drawn, so that a table does not need it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_halos.extras import picture_package
from lightning_halos.planning.planner import ACTIVITIES, MS_PER_HOUR, Floats, Ints, Plan
from lightning_halos.simulation.timing import Timing
from lightning_halos.text_tables import align

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = ("#2f7d4f", "#e0a030", "#b9bec6")
_MOST_ROWS = 32  # with more workers, a table breaks the time down by region
_MOST_BARS = 128  # with more workers, a panel of the picture shows regions


def describe_cluster(timing: Timing) -> str:
    """Returns a line with the size of the cluster, the size of the model and the step time."""
    cluster = timing.cluster
    devices = cluster.devices_per_worker or 1
    workers = count_workers(cluster.num_workers)
    kind = workers if devices == 1 else f"{workers} of {devices} devices"
    each = "" if devices == 1 else f" ({timing.message_bytes / 1e6 / devices:,.1f} MB per device)"
    sizes = {"inside": timing.bytes_within, "between": timing.bytes_between}
    narrow = [f"{size / 1e6:,.1f} MB {where} regions" for where, size in sizes.items() if size != timing.message_bytes]
    rounded = f" (with servers, {' and '.join(narrow)})" if narrow else ""
    regions = "1 region" if len(cluster.regions) == 1 else f"{len(cluster.regions)} regions"
    return (
        f"{kind} in {regions}, {timing.message_bytes / 1e6:,.1f} MB per model on a"
        f" link{each}{rounded}, {cluster.step_ms:g} ms per local step of the fastest worker"
    )


def table(plans: Sequence[Plan], timing: Timing) -> str:
    """Returns the plans as a table, with a column for each plan."""
    fastest = min(plan.seconds_per_global_step for plan in plans)
    columns = [_measures(plan, fastest) for plan in plans]
    rows = [["", *(plan.algorithm for plan in plans)]]
    rows += [[cells[0][0], *(value for _, value in cells)] for cells in zip(*columns, strict=True)]
    text = f"{describe_cluster(timing)}\n\n{align(rows)}"
    kind, names, groups = _breakdown(timing, _MOST_ROWS)
    if len(groups) > _MOST_ROWS:
        return f"{text}\n"
    rows = [[kind, *(plan.algorithm for plan in plans)]]
    rows += [
        [name, *(" / ".join(f"{share:3.0%}" for share in plan.worker_shares[ranks].mean(axis=0)) for plan in plans)]
        for name, ranks in zip(names, groups, strict=True)
    ]
    return f"{text}\n\nThe time of each {kind}, {' / '.join(ACTIVITIES)}:\n\n{align(rows)}\n"


def _measures(plan: Plan, fastest: float) -> Iterator[tuple[str, str]]:
    """Yields the names and values of a plan's column; ``fastest`` is the least time per global step of all plans."""
    yield "local steps per round", span(plan.local_steps)
    yield "pushes per exchange (K)", span(plan.accumulate_updates)
    yield "simulated hours", f"{plan.elapsed_ms / MS_PER_HOUR:.3f}"
    yield "", ""
    yield "seconds per global step", f"{plan.seconds_per_global_step:.3f}"
    yield "  times the fastest here", f"{plan.seconds_per_global_step / fastest:.2f}"
    yield "", ""
    for title, shares in (("share of all workers' time", plan.shares), ("share of a mean round", plan.round_shares)):
        for activity, share in zip(ACTIVITIES, shares, strict=True):
            yield f"{title}: {activity}" if activity == ACTIVITIES[0] else f"  {activity}", f"{share:.1%}"
    yield "", ""
    for where, size in (("inside", plan.bytes_inside), ("between", plan.bytes_between)):
        yield f"GB {where} regions", f"{size / 1e9:,.1f}"
        yield "  per global step", f"{size / 1e9 / plan.global_steps:.3f}"
    yield "", ""
    for sender, staleness in (("pushes", plan.pushes), ("region updates", plan.updates)):
        values = ["-"] * 3
        if staleness is not None and staleness.count:
            values = [f"{staleness.mean:.2f}", str(staleness.p95), str(staleness.maximum)]
        yield from zip((f"staleness of {sender}: mean", "  95th percentile", "  maximum"), values, strict=True)
    yield "pushes in region updates", "-" if plan.sent_share is None else f"{plan.sent_share:.0%}"
    yield "global updates per second", f"{plan.updates_per_second:.4f}"


def as_json(plans: Sequence[Plan], timing: Timing) -> dict[str, Any]:
    """Returns the plans as values that JSON can represent. Names end in their unit."""
    return {"cluster": {**asdict(timing.cluster), "message_bytes": timing.message_bytes}} | {
        "plans": {plan.algorithm: _plan_as_json(plan, timing) for plan in plans}
    }


def _plan_as_json(plan: Plan, timing: Timing) -> dict[str, Any]:
    return {
        "simulated_seconds": plan.elapsed_ms / 1e3,
        "global_steps": plan.global_steps,
        "seconds_per_global_step": plan.seconds_per_global_step,
        "share_of_worker_time": _by_activity(plan.shares),
        "share_of_round_time": _by_activity(plan.round_shares),
        "bytes_inside_regions": plan.bytes_inside,
        "bytes_between_regions": plan.bytes_between,
        "staleness_of_pushes": asdict(plan.pushes),
        "staleness_of_region_updates": None if plan.updates is None else asdict(plan.updates),
        "global_updates": plan.global_updates,
        "global_updates_per_second": plan.updates_per_second,
        "share_of_pushes_in_region_updates": plan.sent_share,
        "accumulate_updates": list(plan.accumulate_updates),
        "workers": [
            {
                "rank": rank,
                "region": timing.cluster.names[region],
                "rounds": int(plan.rounds[rank]),
                "local_steps_per_round": int(plan.local_steps[rank]),
                **{f"{name}_ms_per_round": ms for name, ms in _by_activity(plan.round_ms[rank]).items()},
            }
            for rank, region in enumerate(timing.cluster.region_of)
        ],
    }


def save_picture(plans: Sequence[Plan], timing: Timing, path: Path) -> None:
    """Draws how the time is spent under each plan, over all workers and for each worker.

    The file's suffix determines the format.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    kind, names, groups = _breakdown(timing, _MOST_BARS)
    is_detailed = len(groups) <= _MOST_BARS
    heights = [0.5 * len(plans) + 0.8] + [1.5] * (len(plans) if is_detailed else 0)
    figure = picture_package("matplotlib.figure").Figure(figsize=(11, sum(heights) + 1.2), layout="constrained")
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    _draw_overview(plans, axes[0])
    figure.suptitle(f"Where the workers' time goes\n{describe_cluster(timing)}", fontsize=11)
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=3, loc="outside lower center", frameon=False)
    for plan, panel in zip(plans, axes[1:], strict=False):
        _draw_groups(plan, timing, kind, groups, panel)
    if is_detailed:
        _name_bars(axes[-1], kind, names, timing)
    figure.savefig(path, dpi=130)


def _stack(draw: Callable[..., object], shares: Floats, thickness: float) -> Floats:
    """Draws a bar for each row, with ``axes.bar`` or ``axes.barh``. Returns where its parts start."""
    starts: Floats = np.cumsum(shares, axis=1) - shares
    for name, color, lengths, start in zip(ACTIVITIES, _COLORS, shares.T, starts.T, strict=True):
        draw(range(len(shares)), lengths, thickness, start, color=color, label=name)
    return starts


def _draw_overview(plans: Sequence[Plan], axes: Axes) -> None:
    shares = np.array([plan.shares for plan in plans]) * 100
    starts = _stack(axes.barh, shares, 0.7)
    for row, plan in enumerate(plans):
        for index in np.flatnonzero(shares[row] >= 4):
            middle, ink = starts[row, index] + shares[row, index] / 2, "black" if index else "white"
            axes.text(middle, row, f"{shares[row, index]:.0f} %", ha="center", va="center", color=ink)
        axes.text(101, row, f"{plan.seconds_per_global_step:.3g} s per global step", va="center")
    axes.set_yticks(range(len(plans)), [plan.title for plan in plans])
    axes.invert_yaxis()
    axes.set_xlim(0, 124)
    axes.set_xticks(range(0, 101, 20), [f"{share} %" for share in range(0, 101, 20)])
    axes.set_title("All workers", fontsize=10, loc="left")
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _draw_groups(plan: Plan, timing: Timing, kind: str, groups: Sequence[Sequence[int]], axes: Axes) -> None:
    _stack(axes.bar, np.array([plan.worker_shares[ranks].mean(axis=0) for ranks in groups]) * 100, 0.86)
    axes.set_title(f"{plan.title}, each {kind}", fontsize=10, loc="left", pad=3)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylim(0, 100)
    axes.set_yticks([0, 50, 100], ["0 %", "50 %", "100 %"])
    axes.set_xticks([])
    axes.spines[["top", "right"]].set_visible(False)
    if len(groups) == timing.cluster.num_workers:
        for ranks in timing.cluster.regions[1:]:
            axes.axvline(ranks[0] - 0.5, color="#333333", linewidth=1.2)


def _name_bars(axes: Axes, kind: str, names: Sequence[str], timing: Timing) -> None:
    every = -(-len(names) // _MOST_ROWS)
    axes.set_xticks(range(0, len(names), every), list(names)[::every], fontsize=8)
    regions = timing.cluster.names
    listed = f" (lines separate the regions {', '.join(regions)})" if kind == "worker" and len(regions) > 1 else ""
    axes.set_xlabel(f"{kind}{listed}")


def _breakdown(timing: Timing, most: int) -> tuple[str, list[str], list[list[int]]]:
    """The rows of a breakdown: workers, or regions if there are more than ``most`` workers; with names and ranks."""
    cluster, ranks = timing.cluster, range(timing.cluster.num_workers)
    if len(ranks) > most:
        return "region", list(cluster.names), cluster.regions
    return "worker", [str(rank) for rank in ranks], [[rank] for rank in ranks]


def count_workers(number: int) -> str:
    """Returns a number of workers in words."""
    return "1 worker" if number == 1 else f"{number} workers"


def span(values: Sequence[int] | Ints) -> str:
    """Returns the least and the largest of some numbers as a text; ``"-"`` if there are none."""
    if not len(values):
        return "-"
    least, most = min(values), max(values)
    return f"{least}" if least == most else f"{least} to {most}"


def _by_activity(shares: Floats) -> dict[str, float]:
    return dict(zip(ACTIVITIES, shares.tolist(), strict=True))
