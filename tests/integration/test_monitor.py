"""HalosMonitor's metrics agree with the actions of workers and servers, in every logger and on the progress bar."""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_halos import HalosMonitor
from tests.integration.conftest import Run
from tests.integration.harness import Result
from tests.integration.toys import (
    LOCAL_STEPS,
    WORKERS,
    Toy,
    assert_trained,
    halos,
    loader,
    make_trainer,
    meet,
    outcome,
)


class Losing(Toy):
    """Logs its loss. All workers have pushed a round before one has trained on two."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.optimizer_steps == LOCAL_STEPS:
            meet("pushed", self.global_rank, WORKERS)
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss


class Recorded(TQDMProgressBar):
    """Records what it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, str]] = []

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        self.seen.append({name: str(value) for name, value in self.get_metrics(self.trainer, args[1]).items()})


def installed_loggers() -> list[Logger]:
    """The loggers whose packages are installed, none of which needs the network."""
    loggers: list[Logger] = [CSVLogger(".", name="logs", version="")]
    if find_spec("tensorboard"):
        loggers.append(TensorBoardLogger(".", name="tensorboard", version=""))
    if find_spec("mlflow"):
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
        loggers.append(MLFlowLogger("experiment", tracking_uri="file:./mlruns"))
    if find_spec("wandb"):
        loggers.append(WandbLogger("run", save_dir=".", project="project", offline=True))
    return loggers


def monitored() -> Result:
    module, bar = Losing(), Recorded()
    trainer = make_trainer(
        halos(dynamic_local_steps=False),
        max_steps=40,
        logger=installed_loggers(),
        log_every_n_steps=5,
        callbacks=[HalosMonitor(), bar],
        enable_progress_bar=True,
    )
    trainer.fit(module, loader())
    after = bar.get_metrics(trainer, module)
    wandb = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
    summary = {}
    if wandb and trainer.is_global_zero:
        summary = {name: float(wandb[0].experiment.summary[name]) for name in ("trainer/global_step", "halos/updates")}
    return {**outcome(trainer, module), "seen": bar.seen, "after": sorted(after), "wandb": summary}


def test_the_monitor_logs_what_the_run_did(run: Run, tmp_path: Path) -> None:
    results = run(monitored)
    assert_trained(results, max_steps=40)
    with (tmp_path / "logs" / "metrics.csv").open() as file:
        rows: list[dict[str, Any]] = [row for row in csv.DictReader(file) if row["halos/updates"]]
    steps = [float(row["halos/global_step"]) for row in rows]
    assert steps == sorted(steps)
    assert 0 < steps[-1] <= 40
    last = {name: float(value) for name, value in rows[-1].items() if name.startswith("halos/")}
    pushes = sum(result["optimizer_steps"] for result in results) / LOCAL_STEPS
    assert 0.5 * steps[-1] < last["halos/updates"] <= pushes  # a round of each worker is a few global steps
    assert last["halos/rejected"] == 0
    # K is 4 here: a server exchanges after every 4 pushes at most, and merges what comes back.
    assert 0 < last["halos/merges"] <= last["halos/global_updates"] <= last["halos/updates"] / 4 + 1
    assert 0 <= last["halos/staleness"] <= last["halos/staleness_max"] <= last["halos/updates"]
    # Ranks 1 and 3 push to the server of another process, and get a model back.
    vectors, elsewhere = 41 * 4, last["halos/rounds/rank_1"] + last["halos/rounds/rank_3"]
    assert last["halos/bytes_within_regions"] > 2 * vectors * (elsewhere - WORKERS)
    assert last["halos/bytes_between_regions"] > 0
    assert last["halos/round_seconds"] > 0
    assert last["halos/seconds"] > 0
    for rank in range(WORKERS):
        assert 0 < last[f"halos/compute_share/rank_{rank}"] <= 1
        assert last[f"halos/rounds/rank_{rank}"] > 0
    rounds = [last[f"halos/rounds/rank_{rank}"] for rank in range(WORKERS)]
    assert sum(rounds) == last["halos/updates"]
    staleness = [last[f"halos/staleness_of/rank_{rank}"] for rank in range(WORKERS)]
    total = sum(count * mean for count, mean in zip(rounds, staleness, strict=True))
    assert total / sum(rounds) == pytest.approx(last["halos/staleness"])
    shares = [last[f"halos/compute_share/rank_{rank}"] for rank in range(WORKERS)]
    assert last["halos/compute_share_min"] == min(shares)

    assert_on_the_progress_bar(results[0], sum(rounds))
    assert_a_picture(tmp_path)
    assert_one_run_in_each_logger(tmp_path, results[0]["wandb"], [int(row["step"]) for row in rows], last)


def assert_on_the_progress_bar(result: Result, rounds: float) -> None:
    """The rounds and staleness of all workers, which never go away once they are known: that would flicker."""
    first = next(index for index, shown in enumerate(result["seen"]) if "rounds" in shown)
    for shown in result["seen"][first:]:
        assert [len(shown[name].split("/")) for name in ("rounds", "staleness")] == [WORKERS, WORKERS]
    counts = [sum(map(int, shown["rounds"].split("/"))) for shown in result["seen"][first:]]
    assert counts == sorted(counts)
    assert counts[-1] >= rounds
    assert "rounds" not in result["after"]


def assert_a_picture(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = HalosMonitor.plot(folder / "logs", folder / "run.png")
    assert (folder / "run.png").stat().st_size > 10_000
    lines = {axis.get_ylabel(): [line.get_label() for line in axis.get_lines()] for axis in figure.axes}
    each = [f"rank {rank}" for rank in range(WORKERS)]
    assert lines == {
        "loss": ["train_loss"],
        "staleness (versions)": [*each, "all workers"],
        "compute share": each,
        "traffic so far (MB)": ["between regions", "inside regions"],
    }
    for axis in figure.axes:
        for line in axis.get_lines():
            assert list(line.get_xdata()) == sorted(line.get_xdata())


def assert_one_run_in_each_logger(folder: Path, wandb: Result, steps: list[int], last: dict[str, float]) -> None:
    """Each logger has one run of the job, with the figures of all workers at the same global steps as the CSV file."""
    assert all(step % 5 == 4 for step in steps)  # as under DDP: Lightning counts from 0
    if find_spec("tensorboard"):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (events,) = (folder / "tensorboard").glob("events*")
        found = EventAccumulator(str(events)).Reload()
        scalars = found.Scalars("halos/rounds/rank_3")
        assert [scalar.step for scalar in scalars] == steps
        assert scalars[-1].value == last["halos/rounds/rank_3"]
    if find_spec("mlflow"):
        (path,) = folder.glob("mlruns/*/*/metrics/halos/rounds/rank_3")
        lines = [line.split() for line in path.read_text().splitlines()]
        assert [int(step) for _, _, step in lines] == steps
        assert float(lines[-1][1]) == last["halos/rounds/rank_3"]
    if find_spec("wandb"):
        assert len(list((folder / "wandb").glob("offline-run-*"))) == 1
        assert wandb == {"trainer/global_step": steps[-1], "halos/updates": last["halos/updates"]}


def test_no_metric_is_the_folder_of_another() -> None:
    """MLflow's files cannot hold both halos/rejected and halos/rejected/rank_0."""
    names = set(logged(workers=3))
    assert not [name for name in names for other in names if other.startswith(f"{name}/")]


def logged(workers: int, bar: Any = None) -> dict[str, float]:
    """What the callback logs at the start of a round, if rank 1 is slow and one of its pushes was rejected."""
    of_workers = {"rounds": {rank: 30 + rank for rank in range(workers)}, "rejected_of": {1: 1}}
    of_workers |= {
        "staleness_of": dict.fromkeys(range(workers), 1.5),
        "compute_share": dict.fromkeys(range(workers), 0.5),
    }
    servers = SimpleNamespace(statistics=lambda: [defaultdict(float, of_workers)], version=1, clock=lambda: 7.0)
    site = SimpleNamespace(size=workers)
    strategy = SimpleNamespace(servers=servers, round=SimpleNamespace(batches=0), site=site)
    trainer: Any = SimpleNamespace(
        strategy=strategy,
        global_step=1,
        progress_bar_callback=bar or SimpleNamespace(get_metrics=dict),
    )
    metrics: dict[str, float] = {}
    module: Any = SimpleNamespace(log_dict=lambda values, **_: metrics.update(values))
    monitor = HalosMonitor()
    monitor.on_train_start(trainer, module)
    monitor.on_train_batch_start(trainer, module)
    return metrics


@pytest.mark.parametrize(
    ("workers", "rounds", "staleness"),
    [(4, "30/31/32/33", "1.5/1.5/1.5/1.5"), (5, "160 (30 to 34)", "0.0 (1.5 to 1.5)")],
)
def test_the_progress_bar_has_room_for_4_workers(workers: int, rounds: str, staleness: str) -> None:
    bar = SimpleNamespace(get_metrics=lambda trainer, module: {"loss": 1.0})
    logged(workers, bar)
    assert bar.get_metrics(None, None) == {"loss": 1.0, "rounds": rounds, "staleness": staleness}


def test_a_log_that_is_missing_has_no_picture(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.csv does not exist"):
        HalosMonitor.plot(tmp_path)


@pytest.mark.parametrize(
    "text", ["step,loss\n1,2\n", "name,loss\nfirst,bad\n", "", "step,halos/seconds\n", "halos/seconds\n1\n"]
)
def test_a_log_without_the_monitor_has_no_picture(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(ValueError, match="not the log of a run with HalosMonitor"):
        HalosMonitor.plot(tmp_path)


def drawn(tmp_path: Path, *rows: str) -> dict[str, list[float]]:
    """The times at which the lines of a picture have points, by the lines' names."""
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.csv").write_text("\n".join(rows))
    figure = HalosMonitor.plot(tmp_path)
    return {line.get_label(): list(line.get_xdata()) for axis in figure.axes for line in axis.get_lines()}


def test_a_run_in_which_no_round_was_reported_has_a_picture(tmp_path: Path) -> None:
    names = "step,halos/seconds,halos/staleness,halos/bytes_between_regions,halos/bytes_within_regions"
    assert drawn(tmp_path, names, "0,1,0,0,0") == {
        "all workers": [1],
        "between regions": [1],
        "inside regions": [1],
    }


@pytest.mark.parametrize("steps", [(4, 8, 8, 12, 12, 16), (4, 8, 8, 0, 4, 8), (4, 8, 8, 6, 6, 12), (4, 4, 4, 4, 4, 4)])
def test_the_time_of_a_second_fit_in_a_log_goes_on_from_the_first(tmp_path: Path, steps: tuple[int, ...]) -> None:
    cells = ("1,5,", "3,4,", ",,3.5", "0.5,3,", ",,2.5", "2.5,2,")
    rows = [f"{step},{row}" for step, row in zip(steps, cells, strict=True)]
    times = drawn(tmp_path, "step,halos/seconds,train_loss,val_loss", *rows)
    if len(set(steps)) > 1:
        assert times["train_loss"] == [1, 3, 3.5, 5.5]
    for line in times.values():
        assert line == sorted(line)
