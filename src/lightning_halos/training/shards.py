"""Saves the Trainer's checkpoints with their shards.

This file connects Lightning's saving with ``checkpoint`` and with the servers. During training, rank 0 saves alone
while the other workers go on training; when all workers are in step, all of them save together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_halos.checkpoint.files import is_local
from lightning_halos.checkpoint.manifest import Manifest, global_shard, server_shard, worker_shard
from lightning_halos.checkpoint.places import is_hpc, is_last
from lightning_halos.checkpoint.resume import KEY, Resume
from lightning_halos.checkpoint.saves import Save, Saves, State
from lightning_halos.checkpoint.writer import write_shard
from lightning_halos.core.messages import Marker, ShardWritten
from lightning_halos.training.compat import replace_link_checkpoint
from lightning_halos.training.first_metrics import numbers
from lightning_halos.training.fit import Fit
from lightning_halos.training.read_shards import load
from lightning_halos.training.site import Site
from lightning_halos.training.worker_state import ended_worker_state, random_state
from lightning_halos.training.worlds import CheckpointedWorld
from lightning_halos.version import __version__

Write = Callable[[dict[str, Any], Path], None]

_END = "the end of the fit"


@dataclass(frozen=True)
class Ended:
    """The state of an ended fit, for later checkpoints.

    Attributes:
        world: The world with its servers.
        schedulers: State of the learning-rate schedulers.
        manifest: The manifest at its end.
    """

    world: CheckpointedWorld
    schedulers: dict[str, Any]
    manifest: Manifest


class Shards:
    """Saves and loads the checkpoints of one process.

    Args:
        site: This process's place and connections.
        run: Name of the algorithm, for the manifest.
        has_server_shards: Whether local servers have shards of their own. In a simulation one shard has all servers.

    Attributes:
        resume: The state from which the next fit resumes.
        ended: The state of the last fit; ``None`` if there was none, or it failed.
        saves: The record of saves.
    """

    def __init__(self, site: Site, run: str, has_server_shards: bool) -> None:
        self.resume: Resume | None = None
        self.ended: Ended | None = None
        self.saves = Saves()
        self._site = site
        self._run = run
        self._has_server_shards = has_server_shards
        self._at_end: list[Save] = []
        self._loggers: list[Logger] = []
        self._untold: list[Callable[[], None]] = []

    def start_fit(self) -> Resume | None:
        """Clears the state of an earlier fit. Returns the state from which this fit resumes."""
        resume, self.resume, self.ended = self.resume, None, None
        self._at_end = []
        self.saves = Saves()
        return resume

    def load(
        self, path: Path, checkpoint: dict[str, Any], max_epochs: int | None, joins_optimizers: bool
    ) -> dict[str, Any]:
        """Reads the shards of a ``.ckpt`` file, from which the next fit resumes; see :func:`load`."""
        content, self.resume = load(
            self._site, self._run, self._has_server_shards, path, checkpoint, max_epochs, joins_optimizers
        )
        return content

    def link_when_complete(self, callbacks: Iterable[pl.Callback]) -> None:
        """Makes the links of ``ModelCheckpoint(save_last="link")`` point only to complete checkpoints in this fit."""
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint) and not callback.save_weights_only:
                replace_link_checkpoint(callback, self.saves.link)

    def hold_loggers(self, loggers: Iterable[Logger]) -> None:
        """Holds back what loggers are told about checkpoints in this fit, until :meth:`tell_loggers`."""
        self._loggers = list(loggers)
        for logger in self._loggers:
            vars(logger)["after_save_checkpoint"] = partial(self._hold, logger.after_save_checkpoint)

    def _hold(self, tell: Callable[[ModelCheckpoint], None], callback: ModelCheckpoint) -> None:
        self._untold.append(partial(tell, callback))

    def tell_loggers(self) -> None:
        """Tells loggers about the checkpoints of this fit, if all of them are complete: the files are there then."""
        if self._untold and not self.saves.under_way:
            untold, self._untold = self._untold, []
            for tell in untold:
                tell()

    def release_loggers(self) -> None:
        """Undoes :meth:`hold_loggers`. What they were not told, as the fit has failed, they are never told."""
        for logger in self._loggers:
            del vars(logger)["after_save_checkpoint"]
        self._loggers, self._untold = [], []

    def save_while_training(self, fit: Fit, checkpoint: dict[str, Any], path: Path, write: Write) -> None:
        """Saves on rank 0 during training; the other processes of its worker follow. An error becomes a warning.

        While an earlier save is in flight, the checkpoint is left out, unless it was requested because the run is about
        to end. If its name is free, its ``.ckpt`` file with the model is still written, without shards.
        A simulation waits for the earlier save instead, which takes no virtual time: what it saves must not depend on
        the speed of this machine.
        """
        is_urgent = is_hpc(path) or fit.preemption.saved == str(path)
        manifest = self._manifest(fit)
        progress = [checkpoint["loops"]["fit_loop"][name] for name in ("epoch_progress", "epoch_loop.batch_progress")]
        moment = repr((progress, manifest))
        save, pending = None, self.saves.pending(moment)
        if pending is None and fit.world.is_simulated:
            self.saves.flush(self._site.timeout, fit.world.alarm.check)
        if pending is None and self.saves.in_flight and not is_urgent:
            self.saves.leave_out(path)
            if not path.exists() and not is_last(path):
                checkpoint[KEY] = {"save": "without shards", "version": __version__}
                with _warning(path):
                    write(checkpoint, path)
        else:
            save = self._begin(checkpoint, path, manifest, moment)
        self.follow_snapshot(fit, None if save is None or save is pending else save.marker)
        if save is not None:
            self._write(save, checkpoint, path, write)

    def follow_snapshot(self, fit: Fit, marker: Marker | None = None) -> None:
        """Starts a snapshot in all processes of rank 0's worker in step, if its lane 0 has the marker of a new one."""
        marker = fit.told_snapshot(marker)
        if marker is not None and self._site.carries:
            self._start_snapshot(fit, marker)

    def save_at_end(self, fit: Fit, checkpoint: dict[str, Any], path: Path, write: Write) -> None:
        """Saves on rank 0 after its training. The shards follow when all workers are in step."""
        pending = self.saves.pending(_END)
        if pending is None:
            self.saves.flush(self._site.timeout, self._site.interrupted)
        if save := self._begin(checkpoint, path, self._manifest(fit), _END):
            self._write(save, checkpoint, path, write)
            if save is not pending and save.state is not State.FAILED:
                self._at_end.append(save)

    def save_together(self, trainer: pl.Trainer, checkpoint: dict[str, Any], path: Path, write: Write) -> None:
        """Saves on all workers together, after the fit.

        Raises:
            OSError: On all ranks, if the checkpoint cannot be written.
        """
        save, reason = None, ""
        if self._site.process == 0:
            try:
                assert self.ended is not None
                save = self.saves.begin(path, self.ended.manifest, self._names())
                checkpoint[KEY] = {"save": save.marker.save, "version": save.manifest.version}
                write(checkpoint, save.hidden[path.absolute()])
                self.saves.file_written(save.marker.save, path)
            except Exception as error:  # whatever it is, the other workers are told
                reason = f"{path} could not be written: {error}"
        if reason := self._write_together(trainer, save, reason):
            raise OSError(reason)

    def remove(self, path: str | PathLike[str], remove_file: Callable[[], None]) -> None:
        """Removes a checkpoint with its shards as soon as its successor is complete."""
        if not is_local(path) or Path(path).is_symlink():
            remove_file()
        else:
            self.saves.remove(Path(path), remove_file)

    def end_fit(self, fit: Fit) -> None:
        """Completes all checkpoints of a fit, when all workers are in step and the servers still exist."""
        world, model = fit.world.checkpointed, fit.loop.final_model
        assert world is not None
        assert model is not None
        if self._site.process == 0 and not self._at_end:
            self.saves.flush(self._site.timeout, self._site.interrupted)
        world.adopt_final_model(model)
        self.ended = Ended(world, fit.lightning.schedulers.state_dict(), self._manifest(fit))
        for _ in range(self._site.collectives.broadcast_object(len(self._at_end))):
            save = self._at_end.pop(0) if self._at_end else None
            if reason := self._write_together(fit.trainer, save, ""):
                rank_zero_warn(f"A checkpoint is not complete: {reason}. Older checkpoints are kept.")

    def _start_snapshot(self, fit: Fit, marker: Marker) -> None:
        """Starts the snapshot of all servers and workers. In a simulation it also writes this process's shard."""
        world, vector = fit.world.checkpointed, fit.start.vector
        assert world is not None
        state = fit.loop.own_state()
        if not fit.world.is_simulated:
            fit.loop.save_after_round(marker.save, state)
            world.start_snapshot(marker)
            return
        own = fit.worker_model
        state["model"] = vector.read(vector.new()) if own is None else own.clone()
        world.start_snapshot(marker)
        self.saves.writer.shard(marker, worker_shard(0, self._site.lane), state, world.tell)

    def _begin(self, checkpoint: dict[str, Any], path: Path, manifest: Manifest, moment: str) -> Save | None:
        with _warning(path):
            save = self.saves.begin(path, manifest, self._names(), moment)
            checkpoint[KEY] = {"save": save.marker.save, "version": save.manifest.version}
            return save
        return None

    def _write(self, save: Save, checkpoint: dict[str, Any], path: Path, write: Write) -> None:
        try:
            write(checkpoint, save.hidden[path.absolute()])
        except Exception as error:  # writing an object may raise anything, and a checkpoint must not end the run
            self.saves.fail(save.marker.save, f"{path} could not be written: {error}")
        else:
            self.saves.show(save, path)
            self.saves.file_written(save.marker.save, path)

    def _write_together(self, trainer: pl.Trainer, save: Save | None, reason: str) -> str:
        """Writes the shards of all workers for a save of rank 0. Returns the error, or "", on all ranks."""
        site = self._site
        told = site.collectives.broadcast_object(
            [reason, save.marker.save, save.marker.folder] if save is not None else [reason, "", ""]
        )
        if not told[0]:
            mine = [vars(message) for message in self._write_ended(trainer, Marker(*told[1:]))]
            texts = site.collectives.gather_texts(json.dumps(mine))
            if save is not None:
                assert self.ended is not None
                for message in (ShardWritten(**fields) for text in texts for fields in json.loads(text)):
                    reason = reason or message.error
                    self.saves.written(message)
                manifest = self.ended.manifest
                progress = {
                    "metrics": manifest.metrics,
                    "plateau_steps": manifest.plateau_steps,
                    **self.ended.world.progress(),
                }
                self.saves.complete_manifest(save.marker.save, **progress)
                self.saves.flush(site.timeout, site.interrupted)
                if save.state is not State.COMPLETE:
                    reason = reason or f"{' and '.join(map(str, save.hidden))} could not be written"
        elif save is not None:
            self.saves.fail(save.marker.save, reason)
            self.saves.give_up(0.0)
        return str(site.collectives.broadcast_object(reason))

    def _write_ended(self, trainer: pl.Trainer, marker: Marker) -> list[ShardWritten]:
        """Writes the shards of this process after the fit. Any error is in what it returns."""
        assert self.ended is not None
        site, name = self._site, worker_shard(self._site.rank, self._site.lane)
        if not site.carries:
            return []
        try:
            state = ended_worker_state(trainer, shares_data=self.ended.manifest.data is not None)
            state |= {"schedulers": self.ended.schedulers, "random": random_state()}
            server, globals_ = self.ended.world.state()
        except Exception as error:  # whatever it is, the other workers are told
            return [ShardWritten(marker.save, name, error=f"{name} could not be written: {error}")]
        parts = {name: state}
        if server is not None:
            parts[server_shard(site.topology.group_of(site.rank).index, site.lane)] = server
        if globals_ is not None:
            parts[global_shard(site.lane)] = globals_
        return [write_shard(marker, name, part) for name, part in parts.items()]

    def _names(self) -> set[str]:
        groups, lanes = self._site.topology.groups, range(self._site.lanes)
        workers = [worker_shard(rank, lane) for group in groups for rank in group.ranks for lane in lanes]
        servers = [server_shard(group.index, lane) for group in groups for lane in lanes]
        return {*map(global_shard, lanes), *workers, *(servers if self._has_server_shards else [])}

    def _manifest(self, fit: Fit) -> Manifest:
        metrics = numbers(fit.trainer.callback_metrics)
        data = fit.start.data
        return Manifest(
            save="",
            version=__version__,
            algorithm=self._run,
            groups=[list(group.ranks) for group in self._site.topology.groups],
            model=fit.start.vector.identity,
            total=0,
            data=None if data is None else data.identity,
            done=[],
            plateau_steps=list(fit.lightning.schedulers.history),
            metrics=metrics,
            world=None,
            layout=None if self._site.lanes == 1 else fit.start.vector.layout.to_plain(),
            teachers=list(fit.start.vector.teachers),
            global_steps=fit.start.algorithm.global_steps,
        )


@contextmanager
def _warning(path: Path) -> Iterator[None]:
    """Turns any error into a warning, because a checkpoint must not end the run."""
    try:
        yield
    except Exception as error:
        rank_zero_warn(f"The checkpoint {path} could not be written: {error}. Training goes on.")
