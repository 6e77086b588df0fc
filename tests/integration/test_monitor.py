"""HalosMonitor's metrics agree with the actions of workers and servers."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_halos import HalosMonitor
from tests.integration.conftest import Run
from tests.integration.harness import Result
from tests.integration.toys import LOCAL_STEPS, WORKERS, Toy, assert_trained, halos, loader, make_trainer, outcome


def monitored() -> Result:
    module, logger = Toy(), CSVLogger(".", name="logs", version="")
    strategy = halos(dynamic_local_steps=False)
    trainer = make_trainer(
        strategy=strategy, max_steps=40, logger=logger, log_every_n_steps=5, callbacks=[HalosMonitor()]
    )
    trainer.fit(module, loader())
    shown = [name for name in trainer.progress_bar_metrics if name.startswith("halos/")]
    return {**outcome(trainer, module), "shown": shown}


def test_the_monitor_logs_what_the_run_did(run: Run, tmp_path: Path) -> None:
    results = run(monitored)
    assert_trained(results, max_steps=40)
    scalars = ("global_step", "staleness", "updates", "merges", "bytes_within_regions", "bytes_between_regions")
    shares = [f"compute_share/rank_{rank}" for rank in range(WORKERS)]
    assert set(results[0]["shown"]) == {f"halos/{name}" for name in (*scalars, "round_seconds", *shares)}
    with (tmp_path / "logs" / "metrics.csv").open() as file:
        rows: list[dict[str, Any]] = [row for row in csv.DictReader(file) if row["halos/updates"]]
    steps = [float(row["halos/global_step"]) for row in rows]
    assert steps == sorted(steps)
    assert 0 < steps[-1] <= 40
    last = {name: float(value) for name, value in rows[-1].items() if name.startswith("halos/")}
    pushes = sum(result["optimizer_steps"] for result in results) / LOCAL_STEPS
    assert 0.5 * pushes < last["halos/updates"] <= pushes
    assert last["halos/rejected"] == 0
    # K is 4 here: a server exchanges after every 4 pushes at most, and merges what comes back.
    assert 0 < last["halos/merges"] <= last["halos/global_updates"] <= last["halos/updates"] / 4 + 1
    assert 0 <= last["halos/staleness"] <= last["halos/staleness_max"] <= last["halos/updates"]
    # Half of the workers push to the server of another process, and get a model back.
    vectors = 41 * 4
    assert last["halos/bytes_within_regions"] > 2 * vectors * (last["halos/updates"] / 2 - WORKERS)
    assert last["halos/bytes_between_regions"] > 0
    assert last["halos/round_seconds"] > 0
    for rank in range(WORKERS):
        assert 0 < last[f"halos/compute_share/rank_{rank}"] <= 1
    shares = [last[f"halos/compute_share/rank_{rank}"] for rank in range(WORKERS)]
    assert last["halos/compute_share_min"] == min(shares)


@pytest.mark.parametrize("workers", [8, 9])
def test_the_progress_bar_has_room_for_8_workers(workers: int) -> None:
    shares = {str(rank): 1 - rank / 10 for rank in range(workers)}
    counters = defaultdict(float, rejected_of={}, compute_share=shares)
    servers = SimpleNamespace(statistics=lambda: [counters], version=1)
    strategy = SimpleNamespace(servers=servers, round=SimpleNamespace(batches=0))
    trainer = SimpleNamespace(strategy=strategy, global_step=1, world_size=workers)
    shown: dict[str, float] = {}
    module = SimpleNamespace(log_dict=lambda values, prog_bar=False, **_: shown.update(values if prog_bar else {}))
    HalosMonitor().on_train_batch_start(trainer, module)  # type: ignore[arg-type]
    shown = {name: value for name, value in shown.items() if "compute_share" in name}
    each = {f"halos/compute_share/rank_{rank}": share for rank, share in shares.items()}
    assert shown == (each if workers == 8 else {"halos/compute_share_min": pytest.approx(0.2)})
