"""A process that is killed is missed at once, though its DataLoader's processes live on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset

from tests.integration.harness import Result, end_workers, lightning_environments
from tests.integration.toys import WORKERS, Toy, halos, loader, make_trainer, samples

SLEEP = 60.0  # seconds that the DataLoader's processes are busy when their training process is killed
LIMIT = 25.0  # seconds within which the others have ended: they notice it in 0.1 s, and leave its traceback 3 s


class SleepingData(Dataset[Any]):
    """Samples of which each DataLoader process of one rank can give a few, and then sleeps."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.data = samples(4096)  # so many that others never take all before the sleepers have had theirs
        self.folder = folder
        self.rank = rank
        self.given = 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        self.given += 1
        if os.environ["LOCAL_RANK"] == str(self.rank) and self.given > 8:
            (self.folder / f"sleeps{os.getpid()}").touch()
            time.sleep(SLEEP)
        return self.data[index]


class Killed(Toy):
    """One rank is killed in a training or validation step, when its DataLoader's processes sleep."""

    def __init__(self, folder: Path, rank: int, stage: str) -> None:
        super().__init__()
        self.folder = folder
        self.rank = rank
        self.stage = stage

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.stage == "fit" and batch_idx == 2:
            self.strike()
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.stage == "validate" and batch_idx == 2:
            self.strike()
        super().validation_step(batch, batch_idx)

    def strike(self) -> None:
        if self.global_rank == self.rank:
            deadline = time.monotonic() + 30
            while len(list(self.folder.glob("sleeps*"))) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            (self.folder / "killed").write_text(str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL)


def killed(folder: Path, rank: int, stage: str) -> Result:
    sleeping = DataLoader(
        SleepingData(folder, rank), batch_size=4, num_workers=2, persistent_workers=stage == "validate"
    )
    train, validation = (sleeping, None) if stage == "fit" else (loader(), sleeping)
    flags: dict[str, Any] = {"val_check_interval": 4, "check_val_every_n_epoch": None} if validation else {}
    make_trainer(halos(), max_steps=100_000, **flags).fit(Killed(folder, rank, stage), train, validation)
    return {}


@pytest.mark.parametrize(("rank", "stage"), [(3, "fit"), (2, "fit"), (0, "validate")])
def test_a_killed_process_is_missed_though_its_data_workers_live(tmp_path: Path, rank: int, stage: str) -> None:
    ended = end_workers(
        killed,
        tmp_path,
        rank,
        stage,
        folder=tmp_path,
        environments=lightning_environments(WORKERS),
        patience=30,
    )
    logs = "\n".join(end.log[-3000:] for end in ended)
    assert (tmp_path / "killed").exists(), logs
    since = float((tmp_path / "killed").read_text())
    others = [end for number, end in enumerate(ended) if number != rank]
    assert [end.code for end in others] == [1] * len(others), logs
    assert "PeerLostError" in logs
    assert max(end.at for end in others) - since < LIMIT, logs
