"""Makes a fault happen once, in one process of a run, at the moment that a case names.

It runs in the worker processes. If the victim itself does not go through that moment, another process does, and waits
there until the fault has happened. No fault happens before the first checkpoint is complete.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from lightning_halos.checkpoint.files import _Checked
from lightning_halos.core.messages import GlobalModel, RegionUpdate
from lightning_halos.transport.hosts import Host, RegionHost
from tests.faults.cases import CHECKPOINT, END, EXCHANGE, ROUND, START, VALIDATION, Case
from tests.integration.toys import Toy

MISTAKE = "a mistake in the user's code"
FULL = "no room for the checkpoint"

_LIMIT = 5.0  # seconds that another process waits for the fault


class Victim(Toy):
    """The usual module, in whose process a fault may happen.

    Args:
        case: What happens. All processes know, and only that of its rank is struck.
        folder: Where the processes leave notes for each other and for the test.
        checkpoints: Where the checkpoints are.
    """

    pause = 0.01

    def __init__(self, case: Case, folder: Path, checkpoints: Path) -> None:
        super().__init__()
        self.case = case
        self.checkpoints = checkpoints
        self._struck = folder / "struck"
        self._now = folder / "now"
        if case.moment == EXCHANGE:
            _before(Host, "_on_message", self._on_update)
            _before(RegionHost, "_on_message", self._on_model)
        elif case.moment == CHECKPOINT:
            _before(_Checked, "write", self._on_write)

    def setup(self, stage: str) -> None:
        if self.case.moment == START:
            self.strike()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self._now.exists() or (self.case.moment == ROUND and self._is_inside_a_round):
            self.strike()
        # On a busy machine, too, a checkpoint becomes whole before the data is used up.
        if (self.optimizer_steps >= 8 and not self._is_ready) or self._struck.exists():
            time.sleep(0.1)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.case.moment == VALIDATION:
            self._at_this_moment(here=0)
        super().validation_step(batch, batch_idx)

    def on_train_end(self) -> None:
        super().on_train_end()
        if self.case.moment == END:
            self.strike()

    @property
    def _is_inside_a_round(self) -> bool:
        strategy: Any = self.trainer.strategy
        return bool(strategy.round.batches == 2)

    def _on_update(self, host: Host[Any], channel: int, message: object, *_: Any) -> None:
        """Region 1's update is on its way to rank 0."""
        if self.case.rank == 0 and isinstance(message, RegionUpdate) and message.server == 1:
            self.strike()

    def _on_model(self, host: RegionHost, channel: int, message: object, *_: Any) -> None:
        """The global model is on its way to region 1."""
        if self.case.rank > 0 and self.global_rank == 2 and isinstance(message, GlobalModel) and not message.final:
            self._at_this_moment(here=2)

    def _on_write(self, checked: _Checked, data: Any) -> None:
        if not isinstance(checked.file, _Disk) and checked.size > 0:
            checked.file = _Disk(checked.file, self.strike)  # type: ignore[assignment]

    def _at_this_moment(self, here: int) -> None:
        """Makes the fault happen in this process, or in another one while this one waits."""
        if self.case.rank == here:
            self.strike()
        elif self._is_ready and not self._struck.exists():
            self._now.touch()
            deadline = time.monotonic() + _LIMIT
            while not self._struck.exists() and time.monotonic() < deadline:
                time.sleep(0.005)

    @property
    def _is_ready(self) -> bool:
        """Whether ``ckpt_path="last"`` would find a checkpoint: its link comes last, after all files are complete."""
        return self.case.moment == START or (self.checkpoints / "last.ckpt").exists()

    def strike(self) -> None:
        if self.global_rank != self.case.rank or self._struck.exists() or not self._is_ready:
            return
        try:
            with self._struck.open("x") as file:
                file.write(str(time.monotonic()))
        except FileExistsError:  # another thread was faster
            return
        if self.case.fault != "exception":
            os.kill(os.getpid(), getattr(signal, self.case.fault))
        elif self.case.moment == CHECKPOINT:
            raise OSError(errno.ENOSPC, FULL)
        else:
            raise ValueError(MISTAKE)


def _before(owner: type, name: str, do: Callable[..., None]) -> None:
    original = getattr(owner, name)

    def method(*args: Any) -> Any:
        do(*args)
        return original(*args)

    setattr(owner, name, method)


class _Disk:
    """A file half-way through its writing."""

    def __init__(self, file: IO[bytes], strike: Callable[[], None]) -> None:
        self._file = file
        self._strike = strike

    def write(self, data: Any) -> int:
        self._strike()
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
