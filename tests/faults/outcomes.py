"""Runs a case, resumes from its checkpoints, and checks both against the documented behavior.

Every wait has a limit. Waits that users cannot configure are shortened here, because otherwise the cases would take
hours; the behavior at their end is the same.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_halos.checkpoint.manifest import NAME, Manifest
from lightning_halos.training import site, strategy
from lightning_halos.transport import alarm, collectives
from tests.faults.cases import CHECKPOINT, END, START, Case
from tests.faults.victim import FULL, MISTAKE, Victim
from tests.integration.harness import Result, end_workers, lightning_environments, load_results, run_workers
from tests.integration.toys import (
    BATCH,
    SAMPLES,
    WORKERS,
    Toy,
    assert_no_step_lost,
    assert_same_model,
    halos,
    loader,
    make_trainer,
    outcome,
)

SILENCE = 5.0  # HalosStrategy(timeout=...), where a process is stopped
LIMIT = 25.0  # seconds from a fault to the end of the run, at most
EPOCHS = 2
STEPS = EPOCHS * SAMPLES // BATCH  # of all workers
PREEMPTED = "last-preempted"

GOES_ON, SAVES, ENDS = "goes on", "saves and ends", "ends"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run.

    Attributes:
        kind: Whether it went on, saved and ended, or ended.
        seconds: From the fault until the last process had ended that was not stopped.
        resumed_from: Name of the checkpoint from which it resumed; "" if there was none.
    """

    kind: str
    seconds: float
    resumed_from: str


def expected(case: Case) -> str:
    """The promises of the documentation."""
    if (case.fault, case.moment) in (("exception", CHECKPOINT), ("SIGTERM", END)):
        return GOES_ON
    return SAVES if case.fault == "SIGTERM" and case.moment != START else ENDS


def observe(case: Case, folder: Path) -> Outcome:
    """Runs a case and resumes.

    Raises:
        AssertionError: If anything is not as documented.
    """
    kind, seconds = _run(case, folder)
    whole = _whole(folder / "checkpoints")
    done = {name: sum(stop - start for start, stop in manifest.done) for name, manifest in whole.items()}
    (folder / "resumed").mkdir()
    results = run_workers(
        resumed,
        folder / "checkpoints",
        folder=folder / "resumed",
        environments=lightning_environments(WORKERS),
        timeout=60,
    )
    came_from = {result["from"] for result in results}
    assert len(came_from) == 1
    name = came_from.pop()
    assert bool(name) == bool(whole) == (case.moment != START)
    assert done.get(name, 0) == max(done.values(), default=0)  # the newest
    assert (PREEMPTED in whole) == (kind == SAVES)
    _assert_adds_up(results, STEPS - done.get(name, 0))
    return Outcome(kind, seconds, name)


def _run(case: Case, folder: Path) -> tuple[str, float]:
    is_stopped = case.fault == "SIGSTOP"
    ends = end_workers(
        struck,
        case,
        folder,
        folder=folder,
        environments=lightning_environments(WORKERS),
        timeout=60,
        patience=LIMIT,
        stopped=[case.rank] if is_stopped else [],
    )
    logs = "\n".join(f"--- rank {rank}\n{end.log[-3000:]}" for rank, end in enumerate(ends))
    assert (folder / "struck").exists(), f"It did not come to the fault.\n{logs}"
    others = [end for rank, end in enumerate(ends) if rank != case.rank]
    seconds = max(end.at for end in (others if is_stopped else ends)) - float((folder / "struck").read_text())
    codes = [end.code for end in others]
    victim = ends[case.rank]
    kind = expected(case)
    name = f"rank {case.rank} (region {case.rank // 2})"
    assert not any(end.left for end in ends), logs
    if kind == GOES_ON:
        assert [*codes, victim.code] == [0] * WORKERS, logs
        results = load_results(folder, WORKERS)
        assert_no_step_lost(results)
        _assert_adds_up(results, STEPS)
        assert (FULL in ends[0].log) == (case.fault == "exception"), logs
    elif kind == SAVES:
        assert [*codes, victim.code] == [alarm.EXIT_CODE] * WORKERS, logs
    else:
        assert codes == [1] * len(others), logs
        assert victim.code == {"exception": 1, "SIGKILL": -9, "SIGSTOP": None, "SIGTERM": -15}[case.fault], logs
        assert (MISTAKE in victim.log) == (case.fault == "exception"), logs
        for end in others:
            assert re.search(rf"(PeerLostError|PeerFailedError).*{re.escape(name)}", end.log, re.DOTALL), logs
            assert case.fault != "SIGSTOP" or re.search(r"[Ll]ast heard of", end.log), logs
    return kind, seconds


def _assert_adds_up(results: list[Result], steps: int) -> None:
    used = Counter(index for result in results for index in result["trained_on"])
    assert sum(used.values()) == steps * BATCH
    assert max(used.values(), default=0) <= EPOCHS
    assert [result["global_step"] for result in results] == [STEPS // WORKERS] * WORKERS
    assert_same_model(results)


def _whole(checkpoints: Path) -> dict[str, Manifest]:
    """The manifests of all complete checkpoints, whose ``.ckpt`` file exists as well."""
    manifests = {path.parent.parent.name: path for path in checkpoints.glob(f"*/*/{NAME}")}
    there = {name: path for name, path in manifests.items() if (checkpoints / f"{name}.ckpt").is_file()}
    return {name: Manifest.read(path.read_text(), path) for name, path in there.items()}


def struck(case: Case, folder: Path) -> Result:
    silence = SILENCE if case.fault == "SIGSTOP" else 60.0
    alarm._GRACE = strategy._GOODBYE = 0.5
    collectives._ROLL_CALL = 1.0
    site.MIN_PATIENCE = silence
    return fitted(Victim(case, folder, folder / "checkpoints"), folder / "checkpoints", timeout=silence)


class Resumed(Toy):
    """Records the process it is in."""

    pause = 0.0
    came_from = ""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.came_from = Path(str(self.trainer.ckpt_path)).resolve().stem


def resumed(checkpoints: Path) -> Result:
    module = Resumed()
    return {**fitted(module, checkpoints, timeout=60.0), "from": module.came_from}


def fitted(module: Toy, checkpoints: Path, timeout: float) -> Result:
    """Starts or resumes, like a script that is started again."""
    saving = ModelCheckpoint(checkpoints, "{step}", every_n_train_steps=4, save_last="link")
    flags: dict[str, Any] = {"val_check_interval": 4, "check_val_every_n_epoch": None, "max_epochs": EPOCHS}
    trainer = make_trainer(
        halos(accumulate_updates=2, timeout=timeout), callbacks=saving, enable_checkpointing=True, **flags
    )
    trainer.fit(module, loader(shuffle=True), loader(16), ckpt_path="last")
    return outcome(trainer, module)
