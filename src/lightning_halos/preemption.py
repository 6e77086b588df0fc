"""SIGTERM: a scheduler or a spot market takes the machine away, and the run saves a checkpoint before it ends.

Rules of this room: the signal's handler only takes note. What follows happens where the main thread works or waits, and
whoever learns of it tells all peers, so that the signal may come to any process.
"""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_halos.checkpoint.saves import Saves
from lightning_halos.transport.alarm import EXIT_CODE, Alarm

_NAME = "last-preempted.ckpt"  # so that ckpt_path="last" finds it


class Preemption:
    """What one process does about SIGTERM during one fit.

    Args:
        trainer: The Trainer.
        alarm: Passes the news on to the peers.
        grace_time: Seconds from the signal to the end of the process, at most.
        saves: The saves under way; ``None`` if this process does not begin any.

    Attributes:
        saved: The checkpoint of this preemption.
    """

    def __init__(self, trainer: pl.Trainer, alarm: Alarm, grace_time: float, saves: Saves | None) -> None:
        self.saved: Path | None = None
        self._trainer = trainer
        self._alarm = alarm
        self._grace_time = grace_time
        self._saves = saves
        self._signalled = False
        self._previous: Any = None
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.getsignal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, self._handle)

    @property
    def is_due(self) -> bool:
        """Whether the run is to end."""
        return self._signalled or self._alarm.preempted_since is not None

    def check(self) -> None:
        """Saves, if the run is to end and this process begins saves; ends the process once the save is whole.

        The others go on until they hear that this process has ended, so that the save can become whole.

        Raises:
            SIGTERMException: With the exit code of a process that SIGTERM has ended.
        """
        if self._signalled:
            self._alarm.preempt()
        if (since := self._alarm.preempted_since) is None:
            return
        is_late = time.monotonic() > since + self._grace_time
        if self._saves is not None:
            if self.saved is None and not is_late:
                self._save()
            if is_late:
                self._saves.give_up(self._grace_time)
            if not self._saves.under_way:
                raise SIGTERMException(EXIT_CODE)
        elif is_late:
            raise SIGTERMException(EXIT_CODE)

    def release(self) -> None:
        """Gives the signal back to whoever had it."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def forget(self) -> None:
        """Removes what was saved when an earlier run was preempted, now that the run has ended by itself."""
        path = preemption_path(self._trainer)
        if self._saves is not None and not self.is_due and path is not None and path.exists():
            self._trainer.strategy.remove_checkpoint(path)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if callable(self._previous):
            self._previous(number, frame)  # Lightning passes the signal on to the processes that it launched
        # Lightning would end this process at once, before the others have written their shards.
        self._trainer._signal_connector.received_sigterm = False
        self._signalled = True

    def _save(self) -> None:
        path = preemption_path(self._trainer)
        if path is None:
            rank_zero_info("SIGTERM: the run ends. Without a ModelCheckpoint nothing is saved.")
            return
        rank_zero_info(f'SIGTERM: the run saves {path} and ends. Go on with trainer.fit(..., ckpt_path="last").')
        self.saved = path
        self._trainer.save_checkpoint(path)


def preemption_path(trainer: pl.Trainer) -> Path | None:
    """Where a checkpoint is saved when the run is preempted.

    Args:
        trainer: The Trainer.

    Returns:
        A file beside those of the first ``ModelCheckpoint``; ``None`` if the Trainer has none.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            return Path(callback.dirpath).absolute() / _NAME
    return None
