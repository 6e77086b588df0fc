"""Draws a run from the log that ``HalosMonitor`` and a ``CSVLogger`` have written. It needs no Trainer."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_halos.extras import picture_package

_SECONDS = "halos/seconds"
_MB = 1e6
_MOST_LINES = 8  # of workers in one panel


def draw(log: Path, picture: str | Path | None) -> Any:
    """Returns the figure of :meth:`~lightning_halos.HalosMonitor.plot`."""
    path = log / "metrics.csv" if log.is_dir() else log
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Give the metrics.csv of a CSVLogger, or its folder.")
    columns = _read(path)
    figure = picture_package("matplotlib.figure").Figure(figsize=(9, 10), layout="constrained")
    axes = figure.subplots(4, sharex=True)

    def lines(axis: Any, title: str, names: dict[str, str], scale: float = 1.0) -> None:
        names = {name: label for name, label in names.items() if name in columns}  # a short run may have no shares
        for name, label in names.items():
            times, values = columns[name]
            color = "black" if name == "halos/staleness" else None
            axis.plot(times, values / scale, ".-", markersize=4, label=label, color=color)
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        axis.margins(x=0.01)
        if names:
            axis.legend(fontsize="small", loc="best", ncols=2 if len(names) > 4 else 1)

    lines(axes[0], "loss", {name: name for name in columns if "loss" in name})
    lines(
        axes[1], "staleness (versions)", {**_workers(columns, "halos/staleness_of/"), "halos/staleness": "all workers"}
    )
    lines(
        axes[2],
        "compute share",
        _workers(columns, "halos/compute_share/") or {"halos/compute_share_min": "the smallest"},
    )
    axes[2].set_ylim(-0.02, 1.02)
    traffic = {"halos/bytes_between_regions": "between regions", "halos/bytes_within_regions": "inside regions"}
    lines(axes[3], "traffic so far (MB)", traffic, _MB)
    axes[3].set_ylim(bottom=0)
    axes[3].set_xlabel("virtual time (s)" if "virtual_seconds" in columns else "time since the start of the fit (s)")
    if picture is not None:
        figure.savefig(picture, dpi=120)
    return figure


def _read(path: Path) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """The times and values of each column that is drawn. A row without a time, as of a loss, has that of its step.

    With a fit the seconds begin anew, and perhaps the steps, too. Its time goes on from the last one before.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or ()
        rows = [row for row in reader if row["step"]] if {"step", _SECONDS} <= set(columns) else []
    fits: list[list[tuple[float, float]]] = []  # steps and times
    drawn: list[tuple[int, dict[str, str]]] = []  # rows, and to which fit they belong
    begin, last = 0.0, (math.inf, math.inf)
    for row in rows:
        if text := row[_SECONDS]:
            step, seconds = now = float(row["step"]), float(text)
            if step < last[0] or seconds < last[1]:
                begin += last[1] if fits else 0.0
                fits.append([])
            fits[-1].append((step, begin + seconds))
            last = now
        drawn.append((max(0, len(fits) - 1), row))
    if not fits:
        raise ValueError(f"{path} is not the log of a run with HalosMonitor: it has no steps with {_SECONDS}.")
    points = [np.array(fit).T for fit in fits]
    found: dict[str, list[tuple[float, float]]] = {}
    for fit, row in drawn:
        time = float(np.interp(float(row["step"]), *points[fit]))
        for name in columns:
            if _is_drawn(name) and (text := row[name]):
                found.setdefault(name, []).append((time, float(text)))
    return {name: (np.array(pairs)[:, 0], np.array(pairs)[:, 1]) for name, pairs in found.items()}


def _is_drawn(name: str) -> bool:
    return "loss" in name or name.startswith("halos/") or name == "virtual_seconds"


def _workers(columns: dict[str, Any], prefix: str) -> dict[str, str]:
    """The columns of the workers and their labels; none if there are too many for one panel."""
    ranks = sorted(int(name.removeprefix(f"{prefix}rank_")) for name in columns if name.startswith(prefix))
    return {f"{prefix}rank_{rank}": f"rank {rank}" for rank in ranks} if len(ranks) <= _MOST_LINES else {}
