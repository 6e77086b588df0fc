"""Handles SIGTERM, which announces that the machine is taken away: the run saves a checkpoint and ends.

A job that is one region of a run saves nothing: it gives its last rounds to the run and leaves, and the run goes on.

The signal handler only records the signal, because it may interrupt any code. The main thread reacts where it works or
waits, and tells all peers, so that the signal may be sent to any process.
"""

from __future__ import annotations

import mmap
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from lightning_halos.checkpoint.files import is_local, link, local_path
from lightning_halos.checkpoint.places import newest_complete
from lightning_halos.checkpoint.saves import Saves
from lightning_halos.training.compat import seed_dataloader_workers, set_received_sigterm
from lightning_halos.transport.alarm import EXIT_CODE, Alarm
from lightning_halos.transport.errors import PeerLostError, is_lost_connection

_over: tuple[int, mmap.mmap] | None = None
"""Process id, and a byte that the process shares with its DataLoader workers: 1 when their run is over."""
_LATER = 3.0  # extra seconds of the other processes, so that rank 0 can report missing shards first


class Preemption:
    """Handles SIGTERM in one process during one fit.

    Args:
        trainer: The Trainer.
        alarm: Passes the preemption on to the peers.
        grace_time: Seconds from the signal until rank 0 abandons the save. Other processes wait 3 seconds longer.
        saves: The record of saves; ``None`` on processes other than rank 0.
        takes_part: Whether this process takes part in saving: all processes of rank 0's worker do.
        is_together: Whether the worker has several processes, which act at the same moment; see :meth:`follow`.

    Attributes:
        saved: Path of the checkpoint of this preemption; ``None`` before it is saved.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        alarm: Alarm,
        grace_time: float,
        saves: Saves | None,
        takes_part: bool = False,
        is_together: bool = False,
    ) -> None:
        self.saved: str | None = None
        self._takes_part = takes_part
        self._has_saved = False
        self._agreed = (False, False) if is_together else None  # whether the run has to end, and whether this process
        self._trainer = trainer
        self._alarm = alarm
        self._grace_time = grace_time
        self._saves = saves
        self._signalled: float | None = None
        self._previous: Any = None
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.getsignal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, self._handle)

    @property
    def is_due(self) -> bool:
        """Whether the run has to end."""
        return self.is_known if self._agreed is None else self._agreed[0]

    @property
    def is_known(self) -> bool:
        """Whether this process knows that the run has to end, which others of its worker may not know yet."""
        return self._since is not None

    @property
    def leaves(self) -> bool:
        """Whether this worker has to push its last round, and to leave a run that goes on without its job."""
        return False

    @property
    def is_late(self) -> bool:
        """Whether the time for a save is over."""
        return self._since is not None and time.monotonic() - self._since > self._grace_time

    @property
    def _since(self) -> float | None:
        return self._alarm.preempted_since if self._signalled is None else self._signalled

    def check(self) -> None:
        """On rank 0, saves a checkpoint if the run has to end, and ends the process when it is complete.

        Other processes go on until rank 0 has ended, so that the save can be completed.

        Raises:
            SIGTERMException: To end the process, with the exit code of a preempted process.
        """
        if (since := self._since) is None:
            return
        self._alarm.preempt(since)
        if self._agreed is not None:  # only a process that cannot ask the others any more ends here
            if time.monotonic() - since > self._grace_time + 2 * _LATER:
                raise SIGTERMException(EXIT_CODE)
        elif self._alarm.is_over:  # the run has ended, so no save is needed
            self.end_if_late()
        elif self._saves is None:
            if self._is_over:
                raise SIGTERMException(EXIT_CODE)
        else:
            if not self._has_saved and not self.is_late:
                self._save()
            if self._is_over:
                self._end_save()
                raise SIGTERMException(EXIT_CODE)

    @contextmanager
    def ends_like_others(self) -> Iterator[None]:
        """Ends this process as preempted if it has heard of the signal and waits for another one that has ended.

        Raises:
            SIGTERMException: In place of the error that the other one is lost.
        """
        try:
            yield
        except RuntimeError as error:
            if self.is_known and (isinstance(error, PeerLostError) or is_lost_connection(error)):
                raise SIGTERMException(EXIT_CODE) from error
            raise

    def flags(self) -> list[bool]:
        """Returns what the processes of a worker tell each other for :meth:`follow`."""
        return [self.is_known, self.is_known and self._is_over]

    def follow(self, flags: Sequence[Sequence[bool]]) -> None:
        """Does the same as :meth:`check` from the next :meth:`act` on, given the flags of all processes of the worker.

        Args:
            flags: What :meth:`flags` returned in each of them. Nothing happens in a worker of one process.
        """
        if self._agreed is not None:
            self._agreed = any(due for due, _ in flags), any(over for _, over in flags)
            if self._agreed[0]:
                self._alarm.preempt(self._since)

    def act(self) -> None:
        """Saves or ends this process, as all processes of the worker do at this moment.

        Raises:
            SIGTERMException: To end the process, with the exit code of a preempted process.
        """
        if self._agreed is None or not self._agreed[0]:
            return
        if self._agreed[1]:
            self._end_save()
            raise SIGTERMException(EXIT_CODE)
        if self._takes_part and not self._has_saved and not self._alarm.is_over:
            self._save()

    @property
    def _is_over(self) -> bool:
        """Whether this process has nothing to wait for, when the run has to end."""
        if self._agreed is not None and self._alarm.is_over:
            return self._alarm.has_failed or self.is_late
        if self._saves is not None:
            return self.is_late or (self._has_saved and not self._saves.under_way)
        return self._since is not None and time.monotonic() - self._since > self._grace_time + _LATER

    def _end_save(self) -> None:
        """Gives up a save that takes too long."""
        if self._saves is not None and self.is_late:
            self._saves.give_up(self._grace_time)
            self._link_to_newest()

    def end_if_late(self) -> None:
        """Ends the process if the end of the run takes too long.

        Raises:
            SIGTERMException: If it does.
        """
        if self.is_late:
            raise SIGTERMException(EXIT_CODE)

    def release(self) -> None:
        """Restores the previous signal handler."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None
            if self._signalled is not None:
                set_received_sigterm(self._trainer, True)

    def remove_old_checkpoint(self) -> None:
        """Removes the checkpoint of an earlier preemption, after the run that resumed from it has ended by itself."""
        path, resumed = preemption_path(self._trainer), self._trainer.ckpt_path
        if self._saves is None or self.is_due or path is None or resumed is None:
            return
        if os.path.dirname(path) == str(local_path(resumed).parent) and os.path.exists(path):
            self._trainer.strategy.remove_checkpoint(path)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if callable(self._previous):
            self._previous(number, frame)  # Lightning passes the signal on to the processes that it launched
        # Otherwise Lightning would end this process at once, before other processes have written their shards.
        set_received_sigterm(self._trainer, False)
        if self._signalled is None:
            self._signalled = time.monotonic()

    def _link_to_newest(self) -> None:
        """Lets ``ckpt_path="last"`` find the newest complete checkpoint if this one did not become complete."""
        if self.saved is None or not is_local(self.saved) or os.path.exists(self.saved):
            return
        if newest := newest_complete(Path(self.saved)):
            link(newest, Path(self.saved))

    def _save(self) -> None:
        self._has_saved = True
        path = preemption_path(self._trainer)
        if path is None:
            rank_zero_info("SIGTERM: the run ends. Without a ModelCheckpoint nothing is saved.")
            return
        rank_zero_info(f'SIGTERM: the run saves {path} and ends. Resume with trainer.fit(..., ckpt_path="last").')
        self.saved = path
        self._trainer.save_checkpoint(path)


class Departure(Preemption):
    """Handles SIGTERM in one process of a job that is one region of a run.

    Every worker of the job ends its round and pushes it to the region's server, which sends its last update and leaves.
    The processes end when they have an answer, or when the grace time is over.

    Args:
        trainer: The Trainer.
        alarm: Passes the preemption on to the job's other processes.
        grace_time: Seconds from the signal until a process ends without an answer.
        is_together: As in :class:`Preemption`.
    """

    def __init__(self, trainer: pl.Trainer, alarm: Alarm, grace_time: float, is_together: bool = False) -> None:
        super().__init__(trainer, alarm, grace_time, None, is_together=is_together)

    @property
    def leaves(self) -> bool:
        return self.is_due

    def check(self) -> None:
        """Tells the job's other processes that the job has to leave.

        Raises:
            SIGTERMException: When the time for it is over.
        """
        if self._since is not None:
            self._alarm.preempt(self._since)
            self.end_if_late()


def preemption_path(trainer: pl.Trainer) -> str | None:
    """Returns a file in the folder of the first ``ModelCheckpoint``, which ``ckpt_path="last"`` finds."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            folder = str(callback.dirpath)
            if is_local(folder):
                folder = os.path.abspath(folder)
            return f"{folder}/{callback.CHECKPOINT_NAME_LAST}-preempted{callback.FILE_EXTENSION}"
    return None


def outlive_sigterm(loader: DataLoader[Any], rank: int, seconds: float) -> None:
    """Lets a loader's workers survive a SIGTERM that is sent to their complete process group, while a run goes on.

    Their training process needs more batches until the checkpoint is saved. When the run is over, SIGTERM ends a forked
    DataLoader worker at once; a worker that is not forked cannot know that.

    Args:
        loader: The loader, which an earlier fit may have had already.
        rank: Global rank of the training process.
        seconds: Seconds from SIGTERM until a DataLoader worker ends by itself.
    """
    global _over
    if _over is None or _over[0] != os.getpid():
        _over = os.getpid(), mmap.mmap(-1, 1)
    _over[1][0] = 0
    if not isinstance(loader.worker_init_fn, _OutlivingSigterm):
        seed_dataloader_workers(loader, rank)  # Lightning would skip it after the next line
        loader.worker_init_fn = _OutlivingSigterm(seconds, loader.worker_init_fn)


def let_data_workers_end() -> None:
    """Lets the DataLoader workers of this process end at the next SIGTERM, because the run is over."""
    if _over is not None:
        _over[1][0] = 1


@dataclass
class _OutlivingSigterm:
    """Replaces a loader's ``worker_init_fn``, which it runs. See :func:`outlive_sigterm`."""

    seconds: float
    worker_init_fn: Callable[[int], None] | None

    def __call__(self, worker: int) -> None:
        """Runs in the DataLoader worker when it starts."""
        signal.signal(signal.SIGTERM, self._handle)
        if self.worker_init_fn is not None:
            self.worker_init_fn(worker)

    def _handle(self, *_: object) -> None:
        if _over is not None and _over[1][0]:
            os._exit(0)
        end = threading.Timer(self.seconds, os._exit, (0,))
        end.daemon = True
        end.start()
