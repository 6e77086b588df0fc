"""The table and the picture of the race."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_halos.tuning.goal import time_to_reach
from race.cases import CONTESTANTS, Case
from race.rows import Result

GOAL_DDP, GOAL_TORCHFT = 5.0, 2.0  # times as fast as these to the loss that all reach, at 100 Mbit/s
PREDICTED_WITHIN = 0.25
BUSY = 1.1  # times the pace: a machine whose batches take longer is too busy
PICTURE = "![Validation loss over time, a panel for each network](network/loss.png)"
BEGIN, END = "<!-- python benchmarks/network.py -->\n", "<!-- end -->\n"

Rows = Sequence[Result]


def time_to(result: Result, target: float) -> float:
    """Seconds until the loss is down at a target: interpolated on the running minimum; nan if it never is."""
    _, seconds, losses = zip(*result["curve"], strict=True)
    return time_to_reach(target, seconds, losses)


def over_the_run(result: Result) -> float:
    """Samples per second until the last model, which HALoS writes after its last exchange."""
    if result["settings"]["software"] != "halos":
        return float(result["samples_per_second"])
    _, seconds, _ = result["curve"][-1]
    return float(result["samples"] / seconds) if seconds else 0.0


def common_loss(rows: Rows) -> float:
    """The lowest loss that all rows reach."""
    return max(min(loss for _, _, loss in row["curve"]) for row in rows)


def by_case(results: Rows) -> dict[str, list[Result]]:
    """The rows of each case, the fastest link first."""
    order = [contestant.software for contestant in CONTESTANTS.values()]
    cases = sorted({Case.parse(row["case"]) for row in results}, key=lambda case: (-case.mbit, case.has_slow_worker))
    ordered = sorted(results, key=lambda row: order.index(row["settings"]["software"]))
    return {case.name: [row for row in ordered if row["case"] == case.name] for case in cases}


def tables(results: Rows) -> str:
    """Returns a table for each case, in Markdown, and a sentence on each goal."""
    texts = []
    for name, rows in by_case(results).items():
        texts.append(f"**{Case.parse(name).title}**\n\n{_table(rows)}")
    return "\n\n".join([*texts, *_machine(results), *_goals(results)]) + "\n"


def _table(rows: Rows) -> str:
    targets = [common_loss(rows)]
    without_ddp = [row for row in rows if row["settings"]["software"] != "ddp"]
    if 0 < len(without_ddp) < len(rows) and common_loss(without_ddp) < targets[0] - 0.02:
        targets.append(common_loss(without_ddp))
    first = next((row for row in rows if row["settings"]["software"] == "halos"), rows[0])
    heads = [
        "",
        "settings",
        "samples/s in training",
        "predicted",
        "over the run",
        *(f"seconds to {target:.2f}" for target in targets),
        "last loss",
        "after",
    ]
    lines = []
    for row in rows:
        times = []
        for target in targets:
            seconds, best = time_to(row, target), time_to(first, target)
            times.append("not reached" if np.isnan(seconds) else f"{seconds:.0f} ({seconds / best:.1f}x)")
        off = row["predicted_samples_per_second"] / row["samples_per_second"] - 1 if row["samples_per_second"] else None
        step, seconds, loss = row["curve"][-1]
        predicted = f"{row['predicted_samples_per_second']:.2f}" + ("" if off is None else f" ({off:+.0%})")
        lines.append(
            [
                row["contestant"],
                _settings(row["settings"]),
                f"{row['samples_per_second']:.2f}",
                predicted,
                f"{over_the_run(row):.2f}",
                *times,
                f"{loss:.2f}",
                f"{step} steps, {seconds:.0f} s" + (", ended" if row["is_ended"] else ""),
            ]
        )
    rule = ["---", "---", *["---:"] * (len(heads) - 3), "---"]
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, rule, *lines])


def _settings(settings: dict[str, Any]) -> str:
    if settings["software"] == "ddp":
        return ""
    if settings["software"] == "halos":
        return f"H {settings['local_steps']}, K {settings['accumulate_updates']}"
    return f"H {settings['local_steps']}"


def _machine(results: Rows) -> list[str]:
    """What says whether the machine kept the pace."""
    loads = [result["load_average"] for result in results]
    computed = [result["computed_seconds"] for result in results]
    lines = [
        f"Machine: {', '.join(sorted({result['machine'] for result in results}))}. Its load average was"
        f" {min(loads):.0f} to {max(loads):.0f}, and a batch was computed in {min(computed):.2f} to"
        f" {max(computed):.2f} s (medians of the rows)."
    ]
    late = [
        f"{Case.parse(row['case']).title}, {row['contestant']}"
        for row in results
        if row["computed_seconds"] > BUSY * min(row["settings"]["seconds"])
    ]
    if late:
        lines.append(f"The machine was too busy to keep the devices' pace in: {'; '.join(late)}.")
    return lines


def _goals(results: Rows) -> list[str]:
    """Says which goals are reached, and which predictions are wrong."""
    lines = []
    for name, rows in by_case(results).items():
        case = Case.parse(name)
        halos = next((row for row in rows if row["contestant"] == "HALoS"), None)
        if case.mbit == 100 and halos is not None:
            for software, goal in (("ddp", GOAL_DDP), ("torchft", GOAL_TORCHFT)):
                for row in rows:
                    if row["settings"]["software"] == software:
                        target = common_loss([halos, row])
                        ratio = time_to(row, target) / time_to(halos, target)
                        verdict = "reached" if ratio >= goal else "not reached"
                        lines.append(
                            f"Goal at {case.title}: {goal:g} times as fast as {row['contestant']}, to the lowest loss"
                            f" that both reach ({target:.2f}): {ratio:.1f} times, {verdict}."
                        )
    wrong = [
        f"{Case.parse(row['case']).title}, {row['contestant']}"
        for row in results
        if row["samples_per_second"]
        and abs(row["predicted_samples_per_second"] / row["samples_per_second"] - 1) > PREDICTED_WITHIN
    ]
    if wrong:
        lines.append(f"The planner is more than {PREDICTED_WITHIN:.0%} off in: {'; '.join(wrong)}.")
    else:
        lines.append(f"The planner is within {PREDICTED_WITHIN:.0%} of the samples/s in training in every row.")
    return lines


def put(page: Path, text: str) -> None:
    """Puts the picture and the tables on a page, in the place of the old ones."""
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{PICTURE}\n\n{text}\n{END}{rest.split(END, 1)[1]}")


def plot(results: Rows, path: Path) -> None:
    """Draws the loss over time, a panel for each case."""
    from matplotlib.figure import Figure

    cases = by_case(results)
    figure = Figure(figsize=(5.5 * min(2, len(cases)), 4.2 * -(-len(cases) // 2)), layout="constrained")
    panels = figure.subplots(-(-len(cases) // 2), min(2, len(cases)), squeeze=False, sharey=True).flatten()
    colors: dict[str, str] = {}
    lines = {}
    for axes, (name, rows) in zip(panels, cases.items(), strict=False):
        for row in rows:
            _, seconds, losses = zip(*row["curve"], strict=True)
            label = row["contestant"]
            color = colors.setdefault(label, f"C{len(colors)}")
            (lines[label],) = axes.plot(seconds, losses, marker=".", label=label, color=color)
        axes.set_title("Two regions, " + Case.parse(name).title)
        axes.set_xlabel("seconds since the first batch")
        axes.set_ylabel("validation loss (nats per byte)")
        axes.set_ylim(top=4.5)
        axes.grid(alpha=0.3)
    for axes in panels[len(cases) :]:
        axes.set_visible(False)
    figure.legend(handles=list(lines.values()), loc="outside lower center", ncols=3)  # inside, it would hide a curve
    figure.savefig(path, dpi=120)
