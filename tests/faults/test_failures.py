"""Failures name their cause in the log, and problems that a run can survive do not end it."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_halos import DilocoStrategy
from lightning_halos.transport import alarm
from tests.integration import script
from tests.integration.harness import End, Result, end_workers, ending, lightning_environments, load_results
from tests.integration.test_launch import SCRIPT, is_running, start, wait_until
from tests.integration.toys import SAMPLES, WORKERS, Toy, halos, loader, make_trainer, wait_for

LIMIT = 30.0  # seconds within which a failure has to have ended the whole run
SILENCE = 5.0  # HalosStrategy(timeout=...), for a peer that falls silent
ENDLESS = 100_000


class Misbehaving(Toy):
    """One rank misbehaves after a few steps: once or, with values that are too large, repeatedly.

    The others take no more than a part of the ordered steps before a rank whose values are bad has pushed some.
    """

    def __init__(self, folder: Path, rank: int, fault: str) -> None:
        super().__init__()
        self.started, self.pushed = folder / "started", folder / "pushed"
        self.rank = rank
        self.fault = fault

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        is_due = self.optimizer_steps == 20 or (self.optimizer_steps > 20 and self.fault == "huge")
        if self.global_rank == self.rank and is_due:
            self.misbehave()
        if self.fault in ("nan", "huge") and self.optimizer_steps >= 30:
            if self.global_rank == self.rank:
                self.pushed.touch()
            wait_for(self.pushed.exists, f"rank {self.rank} did not misbehave")
        return super().training_step(batch, batch_idx)

    def misbehave(self) -> None:
        self.started.touch()
        if self.fault == "raise":
            raise ValueError("a mistake in the user's code")
        if self.fault in ("nan", "huge"):
            with torch.no_grad():
                self.net[0].weight.fill_({"nan": float("nan"), "huge": 1e6}[self.fault])
        elif self.fault != "none":
            os.kill(os.getpid(), getattr(signal, self.fault))

    def configure_optimizers(self) -> Any:
        return self.counted(torch.optim.SGD(self.parameters(), lr=0.01))


def misbehaving(folder: Path, rank: int, fault: str, strategy: str, settings: dict[str, Any], steps: int) -> Result:
    log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)  # one of all processes, as on a terminal
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    alarm._GRACE = 1.0
    module = Misbehaving(folder, rank, fault)
    trainer = make_trainer({"halos": halos, "diloco": DilocoStrategy}[strategy](**settings), max_steps=steps)
    trainer.fit(module, loader(SAMPLES))
    is_sound = all(bool((parameter.abs() < 100).all()) for parameter in module.parameters())
    return {"global_step": trainer.global_step, "is_sound": is_sound}


def ends(
    folder: Path,
    rank: int,
    fault: str,
    strategy: str = "halos",
    steps: int = ENDLESS,
    environments: list[dict[str, str]] | None = None,
    stopped: tuple[int, ...] = (),
    meanwhile: Any = lambda pids: None,
    **settings: Any,
) -> tuple[list[End], str]:
    """Runs until all have ended. Returns how they did, and what they printed."""
    ended = end_workers(
        misbehaving,
        folder,
        rank,
        fault,
        strategy,
        settings,
        steps,
        folder=folder,
        environments=environments or lightning_environments(WORKERS),
        timeout=60,
        patience=LIMIT,
        stopped=stopped,
        meanwhile=meanwhile,
    )
    return ended, (folder / "log").read_text(errors="replace")


@pytest.mark.parametrize(
    ("rank", "environments", "settings"),
    [
        (0, None, {}),
        (2, None, {}),
        (3, None, {}),
        (3, [{}], {"start_method": "fork"}),
    ],
    ids=["rank 0", "the leader of a region", "a worker", "a forked worker"],
)
def test_an_error_in_one_worker_ends_the_run_with_its_traceback_first(
    tmp_path: Path, rank: int, environments: list[dict[str, str]] | None, settings: dict[str, Any]
) -> None:
    ended, text = ends(tmp_path, rank, "raise", environments=environments, **settings)
    assert [(end.code, end.left) for end in ended] == [(1, False)] * len(ended)
    mistake, others = text.find("ValueError: a mistake in the user's code"), text.find("PeerFailedError")
    assert mistake >= 0
    assert others == -1 or mistake < others
    assert "PeerLostError" not in text


@pytest.mark.parametrize(
    ("rank", "named"),
    [
        (2, r"Did not come, or has ended: rank 2 \(region 0\)\."),
        # Named by a collective, or by a wait for the store, whichever is under way.
        (0, r"rank 0 \(region 0\)(, whose process has the store,)? has ended or is stopped"),
    ],
    ids=["a worker", "rank 0"],
)
def test_a_peer_of_diloco_that_stops_without_a_word_is_named_within_the_time_limit(
    tmp_path: Path, rank: int, named: str
) -> None:
    ended, text = ends(tmp_path, rank, "SIGSTOP", "diloco", stopped=(rank,), local_steps=4, timeout=SILENCE)
    assert [end.code for end in ended] == [None if number == rank else 1 for number in range(WORKERS)]
    assert re.search(named, text)
    assert re.search(r"[Ll]ast heard of.* s ago, at \d\d:\d\d:\d\d", text)


def test_ctrl_c_ends_all_forked_processes(tmp_path: Path) -> None:
    interrupted: list[int] = []

    def interrupt(pids: list[int]) -> None:
        if (tmp_path / "started").exists() and not interrupted:
            os.killpg(pids[0], signal.SIGINT)
            interrupted.extend(pids)

    (end,), _ = ends(tmp_path, 0, "none", environments=[{}], meanwhile=interrupt, start_method="fork")
    assert interrupted
    assert (end.code, end.left) == (1, False)


@pytest.mark.slow
def test_ctrl_c_ends_all_processes(tmp_path: Path) -> None:
    with ending(start(*SCRIPT, tmp_path, "popen", ENDLESS, folder=tmp_path)) as process:
        files = [tmp_path / f"pid{rank}" for rank in range(script.WORKERS)]
        wait_until(lambda: all(path.exists() and path.read_text() for path in files))
        processes = [int(path.read_text()) for path in files]
        begin = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(LIMIT) == 1
        wait_until(lambda: not any(map(is_running, processes)), limit=begin + LIMIT - time.monotonic())


@pytest.mark.parametrize(
    ("fault", "settings", "warning"),
    [
        ("nan", {}, "The update of rank 1 (region 0) was rejected: it has NaN or infinite values."),
        (
            "huge",
            {"local_steps": 2, "accumulate_updates": 2, "max_norm_ratio": 10},
            "The last 3 updates of rank 1 (region 0) were all rejected, this one because its norm of ",
        ),
    ],
)
def test_a_poisonous_update_is_dropped_with_a_warning_and_the_run_goes_on(
    tmp_path: Path, fault: str, settings: dict[str, Any], warning: str
) -> None:
    ended, text = ends(tmp_path, 1, fault, steps=60, **settings)
    assert [end.code for end in ended] == [0] * WORKERS, text
    assert warning in text
    assert load_results(tmp_path, WORKERS) == [{"global_step": 60, "is_sound": True}] * WORKERS
