"""Draws a run from the log that ``HalosMonitor`` and a ``CSVLogger`` have written. It needs no Trainer."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_halos.extras import picture_package

_MB = 1e6
_MOST_LINES = 8  # of workers in one panel


def draw(log: Path, picture: str | Path | None) -> Any:
    """Returns the figure of :meth:`~lightning_halos.HalosMonitor.plot`."""
    path = log / "metrics.csv" if log.is_dir() else log
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Give the metrics.csv of a CSVLogger, or its folder.")
    columns = _read(path)
    if "halos/seconds" not in columns:
        raise ValueError(f"{path} is not the log of a run with HalosMonitor: it has no column halos/seconds.")
    seconds = columns["halos/seconds"]
    figure = picture_package("matplotlib.figure").Figure(figsize=(9, 10), layout="constrained")
    axes = figure.subplots(4, sharex=True)

    def lines(axis: Any, title: str, names: dict[str, str], scale: float = 1.0) -> None:
        for name, label in names.items():
            steps, values = columns[name]
            color = "black" if name == "halos/staleness" else None
            # A loss may have rows of its own, without a time.
            axis.plot(np.interp(steps, *seconds), values / scale, ".-", markersize=4, label=label, color=color)
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
    """The steps and values of each column."""
    found: dict[str, list[tuple[float, float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                if text and name not in ("step", "epoch"):
                    found.setdefault(name, []).append((float(row["step"]), float(text)))
    return {name: (np.array(pairs)[:, 0], np.array(pairs)[:, 1]) for name, pairs in found.items()}


def _workers(columns: dict[str, Any], prefix: str) -> dict[str, str]:
    """The columns of the workers and their labels; none if there are too many for one panel."""
    ranks = sorted(int(name.removeprefix(f"{prefix}rank_")) for name in columns if name.startswith(prefix))
    return {f"{prefix}rank_{rank}": f"rank {rank}" for rank in ranks} if len(ranks) <= _MOST_LINES else {}
