"""Muon against AdamW: how the rate is tuned, and what the report says of rows that are there. Nothing is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    for folder in ("benchmarks", "examples"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    import muon

    return muon


def row(optimizer: str, rate: float, steps: int, seed: int, loss: float) -> dict[str, Any]:
    return {
        "algorithm": "halos",
        "optimizer": optimizer,
        "lr": rate,
        "global_steps": steps,
        "seed": seed,
        "virtual_hours": [1.0],
        "val_loss": [loss],
    }


def rows(bench: Any, folder: Path, *some: dict[str, Any]) -> Any:
    bench.write(folder / "rows.json", list(some))
    return bench.Rows(folder / "rows.json", None)


TUNING = {0.0015: 2.3, 0.003: 2.2, 0.006: 2.1, 0.012: 2.2}


def test_the_best_rate_has_two_neighbors_that_are_worse(bench: Any, tmp_path: Path) -> None:
    tuned = rows(bench, tmp_path, *(row("AdamW", rate, 300, 0, loss) for rate, loss in TUNING.items()))
    assert tuned.tune("halos", "AdamW", 300) == (0.006, TUNING)


def test_a_rate_is_not_tuned_while_a_neighbor_of_the_best_is_missing(bench: Any, tmp_path: Path) -> None:
    some = [row("AdamW", rate, 300, 0, loss) for rate, loss in TUNING.items() if rate < 0.012]
    best, losses = rows(bench, tmp_path, *some).tune("halos", "AdamW", 300)
    assert best is None
    assert len(losses) == 3


def test_the_report_has_what_is_there(bench: Any, tmp_path: Path) -> None:
    tuning = [row("AdamW", rate, 300, 0, loss) for rate, loss in TUNING.items()]
    final = [row("AdamW", 0.006, 600, seed, 1.7 + seed / 100) for seed in (0, 1)]
    text = bench.report(rows(bench, tmp_path, *tuning, *final), ["halos"], 600, 3)
    assert "1.705    0.010    1.0000   1.710   1.700 1.710" in text, "hours to the lowest loss that all rows reach"
    assert "0.006: 2.100" in text
