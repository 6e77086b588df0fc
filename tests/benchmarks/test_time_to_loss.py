"""Time to loss: what its rows say, and what its tables make of results. Nothing is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    for folder in ("benchmarks", "examples"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    import time_to_loss

    return time_to_loss


COMPLETE = {
    "halos": {"local_steps", "accumulate_updates", "merge_weight", "local_optimizer", "global_optimizer"},
    "async_local_sgd": {"local_steps", "optimizer"},
    "diloco_dynamic": {"local_steps", "outer_optimizer"},
    "diloco": {"local_steps", "outer_optimizer"},
    "sync_sgd": set(),
}


def test_no_row_depends_on_the_defaults_of_a_strategy(bench: Any) -> None:
    for settings in [*bench.ROWS.values(), *bench.SEARCH]:
        assert settings.keys() >= COMPLETE[settings["algorithm"]]
        for name in settings.keys() & bench.OPTIMIZERS.keys():
            delay = set() if name == "outer_optimizer" else {"delay"}
            assert settings[name].keys() >= {"lr", "momentum"} | delay


def result(bench: Any, row: str, seed: int, curve: list[tuple[float, float]], **changes: Any) -> dict[str, Any]:
    hours, losses = zip(*curve, strict=True)
    return {
        "cluster": "paper.yaml",
        "settings": bench.ROWS[row],
        "model": bench.MODEL,
        "global_steps": 600,
        "seed": seed,
        "wall_seconds": 1.0,
        "virtual_hours": hours,
        "val_loss": losses,
        **changes,
    }


def test_only_the_same_row_counts_as_trained(bench: Any, tmp_path: Path) -> None:
    path = bench.path_of(tmp_path, "tuned", 1)
    wanted = {
        "cluster": "paper.yaml",
        "settings": bench.ROWS["tuned"],
        "model": bench.MODEL,
        "global_steps": 600,
        "seed": 1,
    }
    assert not bench.is_trained(path, wanted)
    bench.write(path, result(bench, "tuned", 1, [(1.0, 2.0)]))
    assert bench.is_trained(path, wanted)
    for changes in (
        {"cluster": "mine.yaml"},
        {"settings": bench.ROWS["halos"]},
        {"model": bench.LONG_MODEL},
        {"global_steps": 300},
        {"seed": 0},
    ):
        assert not bench.is_trained(path, wanted | changes), changes
    assert path != bench.path_of(tmp_path, "tuned", 0)


def test_a_table_compares_only_seeds_that_all_rows_have(bench: Any, tmp_path: Path) -> None:
    for row, seeds in {"tuned": (0, 1, 2), "sync_sgd": (0, 2)}.items():
        for seed in seeds:
            bench.write(bench.path_of(tmp_path, row, seed), result(bench, row, seed, [(1.0, 2.0)]))
    found = bench.read(tmp_path, ("tuned", "sync_sgd", "diloco"))
    assert {row: [one["seed"] for one in seeds] for row, seeds in found.items()} == {
        "tuned": [0, 2],
        "sync_sgd": [0, 2],
    }


def test_a_table_has_means_and_ranges_over_the_seeds(bench: Any) -> None:
    halos = [
        result(bench, "tuned", 0, [(0.0, 5.0), (1.0, 2.0)]),
        result(bench, "tuned", 1, [(0.0, 5.0), (1.0, 1.0), (2.0, 1.5)]),
    ]
    sync = [
        result(bench, "sync_sgd", 0, [(0.0, 5.0), (10.0, 2.0), (20.0, 1.0)]),
        result(bench, "sync_sgd", 1, [(0.0, 5.0), (30.0, 1.0)]),
    ]
    text, target = bench.table({"tuned": halos, "sync_sgd": sync}, "tuned")
    assert target == 2.0, "the worst row and seed at its best"
    _, _, first, second = text.splitlines()
    assert " ".join(first.split()[2:]) == "1.750 1.500 to 2.000 1.5000 0.8750 1.00 1.00 1.00 1.00 to 1.00"
    assert " ".join(second.split()[2:6]) == "1.000 1.000 to 1.000"
    assert second.endswith("10.00 to 30.00"), "each seed compared with itself"
    one_seed, _ = bench.table({"tuned": halos[:1], "sync_sgd": sync[:1]}, "tuned")
    assert "of the seeds" not in one_seed


def test_the_long_run_says_how_close_to_synchronous_sgd_each_row_ends(bench: Any, tmp_path: Path) -> None:
    curves = {"tuned": [(0.0, 5.0), (1.0, 2.02)], "sync_sgd": [(0.0, 5.0), (50.0, 2.02), (100.0, 2.0)]}
    for row, curve in curves.items():
        bench.write(bench.path_of(tmp_path, row, 0), result(bench, row, 0, curve))
    bench.long_report(tmp_path, bench.LONG[3000], " --steps 3000")
    text = (tmp_path / "table.txt").read_text()
    assert "time_to_loss.py --long --steps 3000 --plot-only" in text
    assert "1.0%" in text
    assert "50.00 times" in text, "synchronous SGD's time to the loss at which HALoS ended"
    assert (tmp_path / "time_to_loss.png").exists()
