"""SIGTERM: the run saves a checkpoint, ends with exit code 143, and resumes from there."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_halos import DilocoStrategy
from lightning_halos.checkpoint.manifest import NAME, Manifest
from lightning_halos.checkpoint.places import newest_complete
from lightning_halos.training.fit import Fit
from lightning_halos.transport.errors import PeerLostError
from tests.integration.conftest import Run
from tests.integration.harness import Result, load_results, torchrun
from tests.integration.script import WORKERS, Script
from tests.integration.test_launch import ending, start
from tests.integration.toys import Toy, assert_same_model, halos, loader, make_trainer, meet, outcome, wait_for

PREEMPTED = "last-preempted.ckpt"
AGAIN = ["--standalone", f"--nproc_per_node={WORKERS}", "--max-restarts=1"]


class Terminated(Toy):
    """Its process gets SIGTERM in the middle of the run. The others wait for that before they take all the data.

    Attributes:
        victim: Rank of the process, ``None`` if there is none.
        where: The hook in which the signal comes.
    """

    waits_at = 24  # batches: those of all workers together are half of an epoch less than there are

    def __init__(self, victim: int | None, where: str = "training_step") -> None:
        super().__init__()
        self.victim = victim
        self.where = where

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.strike("training_step")
        if self.victim is not None and self.global_rank != self.victim and self.optimizer_steps >= self.waits_at:
            wait_for(Path("struck").exists, "nobody got the signal")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.strike("validation_step")
        super().validation_step(batch, batch_idx)

    def strike(self, where: str) -> None:
        if self.global_rank == self.victim and self.optimizer_steps >= 9 and where == self.where:
            self.terminate()

    def terminate(self) -> None:
        Path("struck").touch()
        os.kill(os.getpid(), signal.SIGTERM)
        self.victim = None


def preempted(
    module: Terminated, folder: Path, strategy: dict[str, Any], flags: dict[str, Any], num_workers: int = 0
) -> Result:
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
    callbacks = [saving, *flags.pop("callbacks", [])]
    trainer = make_trainer(halos(**strategy), callbacks=callbacks, enable_checkpointing=True, max_epochs=3, **flags)
    begin = time.monotonic()
    try:
        trainer.fit(module, loader(shuffle=True, num_workers=num_workers), loader(16))
    except SystemExit as end:
        seconds = time.monotonic() - begin
        return {"code": end.code, "status": trainer.state.status.value, "seconds": seconds}
    return {}


def resumed(folder: Path, flags: dict[str, Any]) -> Result:
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
    module, trainer = Toy(), make_trainer(callbacks=saving, enable_checkpointing=True, max_epochs=3, **flags)
    trainer.fit(module, loader(shuffle=True), loader(16), ckpt_path="last")
    return outcome(trainer, module)


def manifest_of(path: Path) -> Manifest:
    (folder,) = path.with_suffix("").iterdir()
    return Manifest.read((folder / NAME).read_text(), folder / NAME)


def is_whole(path: Path) -> bool:
    if not path.exists():
        return False
    save = torch.load(path, weights_only=True)["lightning_halos"]["save"]
    return (path.with_suffix("") / save / NAME).exists()


def assert_goes_on(run: Run, folder: Path, **flags: Any) -> None:
    """The run resumes from the checkpoint, and every sample is used the right number of times."""
    done = sum(stop - start for start, stop in manifest_of(folder / PREEMPTED).done)
    results = run(resumed, folder, flags)
    used = Counter(index for result in results for index in result["trained_on"])
    assert done > 0
    assert sum(used.values()) == 4 * (3 * 64 - done)
    assert [result["global_step"] for result in results] == [48] * 4
    assert_same_model(results)
    assert not (folder / PREEMPTED).exists()


# Rank 0 has the global server, rank 2 a local one, rank 3 none.
@pytest.mark.parametrize("victim", [0, 2, 3])
def test_sigterm_to_any_process_saves_and_ends_all(run: Run, tmp_path: Path, victim: int) -> None:
    results = run(preempted, Terminated(victim), tmp_path, {}, {})
    assert [(result["code"], result["status"]) for result in results] == [(143, "interrupted")] * 4
    assert_goes_on(run, tmp_path)


def test_while_rank_0_validates(run: Run, tmp_path: Path) -> None:
    flags = {"val_check_interval": 4, "check_val_every_n_epoch": None}
    results = run(preempted, Terminated(0, "validation_step"), tmp_path, {}, dict(flags))
    assert [result["code"] for result in results] == [143] * 4
    assert_goes_on(run, tmp_path, **flags)


class Last(Terminated):
    """Its process sleeps in the last epoch until the others have used all data, and then gets SIGTERM."""

    waits_at = 1000

    def strike(self, where: str) -> None:
        if self.victim is None or self.current_epoch < 2:
            return
        if self.global_rank != self.victim:
            wait_for(Path("is last").exists, "the victim did not come to the last epoch")
            return
        Path("is last").touch()
        time.sleep(3)
        self.terminate()


def test_while_the_others_have_finished_and_wait(run: Run, tmp_path: Path) -> None:
    results = run(preempted, Last(1), tmp_path, {}, {})
    assert [result["code"] for result in results] == [143] * 4
    assert_goes_on(run, tmp_path)


def left_at_the_end() -> Result:
    """All get the signal at the end of training. Rank 0 ends, while the others wait for it."""
    module, trainer = Toy(), make_trainer(max_epochs=1)

    def get_signal(fit: Fit) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        meet("the signal", trainer.global_rank, trainer.world_size)
        if trainer.global_rank == 0:
            raise SIGTERMException(143)
        share(fit)

    share = Fit.share_final_model
    Fit.share_final_model = get_signal  # type: ignore[method-assign]
    try:
        trainer.fit(module, loader())
    except SystemExit as end:
        return {"code": end.code}
    return {}


def test_at_the_end_of_training_the_others_end_as_preempted_too(run: Run) -> None:
    assert [result["code"] for result in run(left_at_the_end)] == [143] * 4


class Group(Terminated):
    """All processes of the victim's group get the signal, as from torchrun: its DataLoader's workers, too."""

    def strike(self, where: str) -> None:
        if self.global_rank == self.victim and self.optimizer_steps == 9:
            Path("struck").touch()
            os.killpg(os.getpid(), signal.SIGTERM)
            self.victim = None


def test_with_dataloader_workers_that_get_the_signal_too(run: Run, tmp_path: Path) -> None:
    results = run(preempted, Group(0), tmp_path, {}, {}, 1)
    assert [result["code"] for result in results] == [143] * 4
    assert_goes_on(run, tmp_path)


class Late(Terminated):
    """Rank 0 gets the signal when all have finished, and validates the final model for longer than the grace time."""

    waits_at = 1000

    def strike(self, where: str) -> None:
        if where == "validation_step" and self.trainer.global_step == 48:
            super().strike(where)
            time.sleep(1)


def test_when_all_have_finished(run: Run, tmp_path: Path) -> None:
    results = run(late, tmp_path)
    assert results[0]["code"] == 143
    assert results[0]["seconds"] < 50  # with the fit before it; `timeout` is 60


def late(folder: Path) -> Result:
    module = Late(0, "validation_step")
    trainer = make_trainer(halos(grace_time=1.5), max_epochs=3, check_val_every_n_epoch=3)
    begin = time.monotonic()
    try:
        trainer.fit(module, loader(), loader(16))
    except (SystemExit, PeerLostError) as end:
        return {"code": getattr(end, "code", 1), "seconds": time.monotonic() - begin}
    return {}


def test_what_callbacks_save_does_not_stand_in_the_way(run: Run, tmp_path: Path) -> None:
    flags = {"callbacks": [OnExceptionCheckpoint(tmp_path)]}
    run(preempted, Terminated(3), tmp_path, {}, flags)
    assert not (tmp_path / "on_exception.ckpt").exists()
    assert_goes_on(run, tmp_path)


class Asleep(Terminated):
    """Rank 1 is in a batch that lasts longer than the grace time when the victim gets the signal."""

    waits_at = 1000

    def __init__(self, victim: int, folder: Path) -> None:
        super().__init__(victim)
        self.folder = folder
        self.sign = folder / "asleep"

    def strike(self, where: str) -> None:
        if self.sign.exists():
            super().strike(where)
            if self.global_rank not in (1, self.victim):
                wait_for(Path("struck").exists, "nobody got the signal")
        elif self.global_rank != 1:
            time.sleep(0.5 if self.optimizer_steps >= 12 else 0.0)  # so that data is left until it sleeps
        elif self.trainer.global_step >= 12 and newest_complete(self.folder / "another.ckpt") is not None:
            self.sign.touch()
            wait_for(Path("struck").exists, "nobody got the signal")
            time.sleep(8)


@pytest.mark.parametrize("victim", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_no_longer_than_the_grace_time(run: Run, tmp_path: Path, victim: int) -> None:
    results = run(preempted, Asleep(victim, tmp_path), tmp_path, {"grace_time": 2.0}, {})
    assert [result["code"] for result in results] == [143] * 4
    assert results[0]["seconds"] < 50  # with the fit before the signal; `timeout` is 60
    assert "worker-1.pt did not arrive within 2 s" in (tmp_path / "log0").read_text()
    older = newest_complete(tmp_path / "another.ckpt")
    assert older is not None
    assert (tmp_path / PREEMPTED).resolve() == older  # which ckpt_path="last" finds
    results = run(resumed, tmp_path, {})
    assert f"Restoring states from the checkpoint path at {tmp_path / PREEMPTED}" in (tmp_path / "log0").read_text()
    assert not (tmp_path / PREEMPTED).is_symlink()
    assert_same_model(results)


def preempted_diloco(folder: Path) -> Result:
    trainer = make_trainer(
        DilocoStrategy(local_steps=4, timeout=60),
        devices=2,
        callbacks=ModelCheckpoint(folder),
        enable_checkpointing=True,
        max_epochs=3,
    )
    try:
        trainer.fit(Terminated(0), loader())
    except (SystemExit, PeerLostError) as end:
        return {"code": getattr(end, "code", 1)}
    return {}


def test_diloco_saves_what_rank_0_has(run: Run, tmp_path: Path) -> None:
    assert run(preempted_diloco, tmp_path, workers=2)[0]["code"] == 143
    saved = torch.load(tmp_path / PREEMPTED, weights_only=True)
    assert saved["global_step"] > 0
    assert saved["state_dict"].keys() == Toy().state_dict().keys()


def unsaved(victim: int) -> Result:
    trainer = make_trainer(max_steps=100_000)
    try:
        trainer.fit(Terminated(victim), loader())
    except SystemExit as end:
        return {"code": end.code}
    return {}


def test_without_checkpoints_the_run_just_ends(run: Run, tmp_path: Path) -> None:
    assert [result["code"] for result in run(unsaved, 3)] == [143] * 4
    assert not list(tmp_path.glob("**/*.ckpt"))


def test_torchrun_starts_again_and_the_run_goes_on(run: Run, tmp_path: Path) -> None:
    (tmp_path / "workers").mkdir()
    run(torchrun, *AGAIN, __file__, str(tmp_path / "workers"), "SIGKILL", environments=[{}])
    assert_went_on(tmp_path / "workers", tmp_path / "log0")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["SIGKILL", "SIGTERM"])
def test_so_it_does_for_a_script(tmp_path: Path, fault: str) -> None:
    arguments = ["-m", "torch.distributed.run", *AGAIN, "-m", "tests.integration.test_preemption", tmp_path, fault]
    with ending(start(*arguments, folder=tmp_path)) as process:
        assert process.wait(240) == 0, (tmp_path / "log").read_text()[-4000:]
    assert_went_on(tmp_path, tmp_path / "log")


def assert_went_on(folder: Path, log: Path) -> None:
    results = load_results(folder, WORKERS)
    used = sum(len(result["trained_on"]) for result in results)
    assert 0 < used < 4 * 3 * 64  # the second part of the run
    assert [result["global_step"] for result in results] == [96] * WORKERS
    final = manifest_of(folder / "last.ckpt")
    assert (final.total, final.done) == (3 * 64, [[0, 3 * 64]])
    assert_same_model(results)
    assert "Restoring states from the checkpoint path" in log.read_text()


class Restarted(Script):
    """Rank 1 gets a signal in the middle of the first start, after the first complete checkpoint."""

    def __init__(self, folder: Path, fault: str) -> None:
        super().__init__(folder)
        self.fault = fault

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if is_first and self.optimizer_steps >= 24:
            if self.global_rank == 1 and is_whole(self.folder / "last.ckpt"):
                os.kill(os.getpid(), getattr(signal, self.fault))
                self.fault = "SIGCHLD"  # which nobody minds
            time.sleep(0.1)
        return super().training_step(batch, batch_idx)


def main(folder: str, fault: str) -> None:
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_last=True)
    trainer = make_trainer(callbacks=saving, devices=WORKERS, enable_checkpointing=True, max_epochs=3)
    trainer.fit(Restarted(Path(folder), fault), loader(shuffle=True), ckpt_path="last")


if __name__ == "__main__":
    main(*sys.argv[1:])
