"""The Trainer's checkpoints and their shards.

This file connects Lightning's saving and loading with ``checkpoint`` and with the servers. While training, rank 0 saves
alone and the other workers train on; when all workers are in step, all of them save together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_halos.checkpoint.errors import CheckpointError
from lightning_halos.checkpoint.files import is_local
from lightning_halos.checkpoint.manifest import GLOBAL, NAME, Manifest, server_shard, worker_shard
from lightning_halos.checkpoint.places import is_hpc, is_last
from lightning_halos.checkpoint.resume import KEY, CompleteCheckpoint, Resume, find
from lightning_halos.checkpoint.saves import Save, Saves, State
from lightning_halos.checkpoint.writer import write_shard
from lightning_halos.core.algorithms import ServerAlgorithm
from lightning_halos.core.messages import Marker, RegionUpdate, ShardWritten
from lightning_halos.core.servers import unsent
from lightning_halos.simulation.process import SimulatedProcess
from lightning_halos.training.compat import replace_link_checkpoint
from lightning_halos.training.worker_state import (
    forget_optimizers,
    put_worker_state,
    random_state,
    take_part_again,
    worker_state,
)
from lightning_halos.transport.process import Process
from lightning_halos.version import __version__

if TYPE_CHECKING:
    from lightning_halos.training.strategy import AlgorithmStrategy

Write = Callable[[dict[str, Any], Path], None]

_END = "the end of the fit"


class Shards:
    """What one process does about checkpoints.

    Args:
        strategy: The strategy.

    Attributes:
        resume: What the next fit goes on from.
        ended: What is left of the last fit: its servers, and where its schedulers were.
    """

    def __init__(self, strategy: AlgorithmStrategy) -> None:
        self.resume: Resume | None = None
        self.ended: tuple[Process | SimulatedProcess, dict[str, Any], Manifest] | None = None
        self._strategy = strategy
        self._at_end: list[Save] = []

    def start_fit(self) -> Resume | None:
        """Forgets what an earlier fit has left, if that failed. Returns what to go on from."""
        resume, self.resume, self.ended = self.resume, None, None
        self._at_end = []
        vars(self).pop("saves", None)
        return resume

    # ------------------------------------------------------------------ saving

    @cached_property
    def saves(self) -> Saves:
        """The saves under way: made in the process that trains, since locks cannot be sent to it."""
        return Saves()

    def belong_to(self, checkpoint: dict[str, Any], path: Any, storage_options: Any) -> bool:
        """Whether a checkpoint is to have shards: not if it has the weights only, or is not on a disk."""
        return "optimizer_states" in checkpoint and storage_options is None and is_local(path)

    def link_when_complete(self, callbacks: Iterable[pl.Callback]) -> None:
        """Lets the links of ``ModelCheckpoint(save_last="link")`` lead to complete checkpoints only, in this fit."""
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint) and not callback.save_weights_only:
                replace_link_checkpoint(callback, self.saves.link)

    def save_while_training(self, checkpoint: dict[str, Any], path: Path, write: Write) -> None:
        """Saves on rank 0, while the others train on. An error is a warning.

        One save at a time: while an earlier one is in flight, a checkpoint is left out, unless it was asked for because
        the run is about to end. If its name is free, its ``.ckpt`` file is written without shards: it has the model.
        """
        preemption = self._strategy._preemption
        is_urgent = is_hpc(path) or (preemption is not None and preemption.saved == str(path))
        manifest = self._manifest()
        progress = [checkpoint["loops"]["fit_loop"][name] for name in ("epoch_progress", "epoch_loop.batch_progress")]
        moment = repr((progress, manifest))
        pending = self.saves.pending(moment)
        if pending is None and self.saves.in_flight and not is_urgent:
            self.saves.leave_out(path)
            if not path.exists() and not is_last(path):
                checkpoint[KEY] = {"save": "without shards", "version": __version__}
                with _warning(path):
                    write(checkpoint, path)
        elif save := self._begin(checkpoint, path, manifest, moment):
            if save is not pending:
                self._keep_states(save.marker)
            self._write(save, checkpoint, path, write)

    def save_at_end(self, checkpoint: dict[str, Any], path: Path, write: Write) -> None:
        """Saves on rank 0, when its training is over: the shards follow when all workers are in step."""
        pending = self.saves.pending(_END)
        if pending is None:
            self.saves.flush(self._strategy._timeout, self._strategy._check_interrupted)
        if save := self._begin(checkpoint, path, self._manifest(), _END):
            self._write(save, checkpoint, path, write)
            if save is not pending and save.state is not State.FAILED:
                self._at_end.append(save)

    def save_together(self, checkpoint: dict[str, Any], path: Path, write: Write) -> None:
        """Saves when all workers are in step, after the fit.

        Raises:
            OSError: If it cannot be written; on all ranks.
        """
        save, reason = None, ""
        if self._strategy.is_global_zero:
            try:
                assert self.ended is not None
                save = self.saves.begin(path, self.ended[2], self._names())
                checkpoint[KEY] = {"save": save.marker.save, "version": save.manifest.version}
                write(checkpoint, save.hidden[path.absolute()])
                self.saves.file_written(save.marker.save, path)
            except OSError as error:
                reason = f"{path} could not be written: {error}"
        reason = self._write_together(save, reason)
        if reason:
            raise OSError(reason)

    def remove(self, path: str | PathLike[str], remove_file: Callable[[], None]) -> None:
        """Removes a checkpoint with its shards, as soon as its successor is complete."""
        if not is_local(path) or Path(path).is_symlink():
            remove_file()
        else:
            self.saves.remove(Path(path), remove_file)

    def write_own(self, marker: Marker, state: dict[str, Any]) -> None:
        """Writes this worker's shard of a save, in the background."""
        process = self._strategy._process
        assert isinstance(process, Process | SimulatedProcess)
        self.saves.writer.shard(marker, worker_shard(self._strategy.global_rank), state, process.client.tell)

    def end_fit(self, timeout: float) -> None:
        """Completes all checkpoints of a fit, when all workers are in step and the servers still exist."""
        strategy = self._strategy
        process, loop = strategy._process, strategy._loop
        assert isinstance(process, Process | SimulatedProcess)
        assert loop is not None
        assert strategy._collectives is not None
        if strategy.is_global_zero and not self._at_end:
            self.saves.flush(timeout, strategy._check_interrupted)
        process.settle(loop.vector.read(loop.vector.new()))
        self.ended = process, {"schedulers": loop.schedulers.state_dict()}, self._manifest()
        for _ in range(strategy._collectives.broadcast_object(len(self._at_end))):
            save = self._at_end.pop(0) if self._at_end else None
            if reason := self._write_together(save, ""):
                rank_zero_warn(f"A checkpoint is not complete: {reason}. Older checkpoints are kept.")

    def _keep_states(self, marker: Marker) -> None:
        """Asks everybody for their shards, and writes rank 0's."""
        process, loop = self._strategy._process, self._strategy._loop
        assert isinstance(process, Process | SimulatedProcess)
        assert loop is not None
        state = loop.own_state()
        if isinstance(process, SimulatedProcess):
            own = self._strategy._worker_model
            state["model"] = loop.vector.read(loop.vector.new()) if own is None else own.clone()
        process.save(marker)
        self.saves.writer.shard(marker, worker_shard(0), state, self.saves.written)

    def _begin(self, checkpoint: dict[str, Any], path: Path, manifest: Manifest, moment: str) -> Save | None:
        with _warning(path):
            save = self.saves.begin(path, manifest, self._names(), moment)
            checkpoint[KEY] = {"save": save.marker.save, "version": save.manifest.version}
            return save
        return None

    def _write(self, save: Save, checkpoint: dict[str, Any], path: Path, write: Write) -> None:
        try:
            write(checkpoint, save.hidden[path.absolute()])
        except Exception as error:  # a save must not end the run, whatever an object raises while it is written
            self.saves.fail(save.marker.save, f"{path} could not be written: {error}")
        else:
            self.saves.file_written(save.marker.save, path)

    def _write_together(self, save: Save | None, reason: str) -> str:
        """All workers write their shards of a save of rank 0's. Returns what went wrong, on all ranks."""
        strategy = self._strategy
        assert strategy._collectives is not None
        told = strategy._collectives.broadcast_object(
            [reason, save.marker.save, save.marker.folder] if save is not None else [reason, "", ""]
        )
        if not told[0]:
            mine = [vars(message) for message in self._write_ended(Marker(*told[1:]))]
            texts = strategy._collectives.gather_texts(json.dumps(mine))
            if save is not None:
                assert self.ended is not None
                for message in (ShardWritten(**fields) for text in texts for fields in json.loads(text)):
                    reason = reason or message.error
                    self.saves.written(message)
                process, _, manifest = self.ended
                progress = {"metrics": manifest.metrics, "plateaus": manifest.plateaus, **process.progress()}
                self.saves.know(save.marker.save, **progress)
                self.saves.flush(strategy._timeout, strategy._check_interrupted)
                if save.state is not State.COMPLETE:
                    reason = reason or f"{' and '.join(map(str, save.hidden))} could not be written"
        elif save is not None:
            self.saves.fail(save.marker.save, reason)
            self.saves.give_up(0.0)
        return str(strategy._collectives.broadcast_object(reason))

    def _write_ended(self, marker: Marker) -> list[ShardWritten]:
        """Writes what this process has, after the fit."""
        assert self.ended is not None
        process, worker, _ = self.ended
        strategy = self._strategy
        state = {**worker_state(_trainer(strategy)), **worker, "random": random_state()}
        # All are where rank 0 is, which the .ckpt file tells.
        del state["loops"]
        server, globals_ = process.state()
        parts = {worker_shard(strategy.global_rank): state}
        if server is not None:
            parts[server_shard(strategy.topology.group_of(strategy.global_rank).index)] = server
        if globals_ is not None:
            parts[GLOBAL] = globals_
        return [write_shard(marker, name, part) for name, part in parts.items()]

    def _names(self) -> set[str]:
        groups = self._strategy.topology.groups
        workers = [worker_shard(rank) for group in groups for rank in group.ranks]
        if self._strategy._cluster is not None:
            return {GLOBAL, *workers}
        return {GLOBAL, *workers, *(server_shard(group.index) for group in groups)}

    def _manifest(self) -> Manifest:
        strategy = self._strategy
        loop = strategy._loop
        assert loop is not None
        metrics = {name: float(value) for name, value in _trainer(strategy).callback_metrics.items()}
        return Manifest(
            save="",
            version=__version__,
            algorithm=strategy._algorithm_name,
            groups=_groups(strategy),
            model=loop.vector.identity,
            total=0,
            data=loop.data_identity,
            done=[],
            plateaus=list(loop.schedulers.history),
            metrics=metrics,
            world=None,
        )

    # ------------------------------------------------------------------ loading

    def load(self, path: Path, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Reads the shards that belong to a ``.ckpt`` file, when all workers are in step.

        Args:
            path: The file.
            checkpoint: Its content.

        Returns:
            The content for this process: what is this worker's own is in the place of rank 0's.

        Raises:
            CheckpointError: If the checkpoint is incomplete or damaged; on all ranks.
        """
        strategy = self._strategy
        collectives = strategy._collectives
        assert collectives is not None
        saves = collectives.gather_texts(_save_of(checkpoint))
        if len(set(saves)) > 1:
            raise CheckpointError(f"{path} is not the same file for all ranks: copy one to all machines.")
        if not saves[0]:
            return checkpoint
        found, reason = None, ""
        if strategy.is_global_zero:
            try:
                found = find(path, saves[0])
            except CheckpointError as error:
                reason = str(error)
        text = "" if found is None else (found.folder / NAME).read_text()
        where = [reason, "" if found is None else str(found.folder), text]
        reason, folder, text = collectives.broadcast_object(where)
        if reason:
            raise CheckpointError(reason)
        if not folder:
            rank_zero_warn(
                f"{path} has no folder of shards beside it: the servers and the other workers' optimizers begin anew,"
                " from the global model."
            )
            return checkpoint
        found = CompleteCheckpoint(Path(folder), Manifest.read(text, Path(folder) / NAME))
        reason = ""
        try:
            self.resume = self._read(found)
        except CheckpointError as error:
            reason = str(error)
        if reasons := [text for text in collectives.gather_texts(reason) if text]:
            raise CheckpointError(" ".join(dict.fromkeys(reasons)))
        max_epochs = _trainer(strategy).max_epochs
        if self.resume is not None and found.manifest.data_remains(max_epochs):
            take_part_again(checkpoint, max_epochs)
        if self.resume is not None and strategy.global_rank > 0:
            if self.resume.worker:
                put_worker_state(checkpoint, self.resume.worker, max_epochs)
            elif strategy.global_rank >= found.manifest.workers:
                forget_optimizers(checkpoint)
        return checkpoint

    def _read(self, found: CompleteCheckpoint) -> Resume | None:
        """Reads what is this process's."""
        strategy, manifest = self._strategy, found.manifest
        if manifest.algorithm != strategy._algorithm_name:
            rank_zero_warn(
                f"{found.folder} was saved with {manifest.algorithm}, and this is {strategy._algorithm_name}: only the"
                " global model and rank 0's optimizer are used."
            )
            return None
        rank = strategy.global_rank
        resume = Resume(manifest, fits=manifest.groups == _groups(strategy))
        if strategy._cluster is not None and not resume.fits:
            rank_zero_warn(
                f"{found.folder} was saved in a cluster of the workers {manifest.groups}, by local server, and now"
                f" there are {_groups(strategy)}: only the global model and rank 0's optimizer are used."
            )
            return None
        if resume.fits:
            resume.worker = found.read(worker_shard(rank))
            group = strategy.topology.group_of(rank)
            if rank == group.leader and strategy._cluster is None:
                resume.server = found.read(server_shard(group.index))
            if rank == 0:
                resume.globals = found.read(GLOBAL)
            return resume
        # Where machines do not share a disk, some of the old shards may be out of reach.
        if found.has(worker_shard(rank)):
            resume.worker = found.read(worker_shard(rank))
        if rank == 0:
            resume.globals = found.read(GLOBAL)
            names = {index: server_shard(index) for index in range(len(manifest.groups))}
            resume.servers = {i: found.read(name) for i, name in names.items() if found.has(name)}
            self._warn(found, resume)
        return resume

    def _warn(self, found: CompleteCheckpoint, resume: Resume) -> None:
        """Says what could not be kept, since there are other workers or servers now."""
        manifest, strategy = resume.manifest, self._strategy
        lost = ["the local servers' momentum"]
        if manifest.workers < strategy.world_size:
            lost.append(f"anything of the {strategy.world_size - manifest.workers} new worker(s), which begin afresh")
        if manifest.workers > strategy.world_size:
            gone = manifest.workers - strategy.world_size
            lost.append(f"the optimizers of the last {gone} worker(s)")
        if missing := sorted(set(range(len(manifest.groups))) - resume.servers.keys()):
            lost.append(f"what the local servers {missing} had not sent, whose shards are not in {found.folder}")
        rank_zero_warn(
            f"The checkpoint was saved with the workers {manifest.groups}, by local server, and now there are"
            f" {_groups(strategy)}: the global model, its server's momentum and the position in the data are kept; not"
            f" kept: {'; '.join(lost)}."
        )


def rebuild(
    resume: Resume, memory: Tensor, shapes: Sequence[torch.Size], algorithm: ServerAlgorithm, servers: int, total: int
) -> None:
    """Ends the old servers as at the end of a fit, on rank 0, so that new ones can begin from the global model.

    What was on its way to the global server, and what the local servers had not sent yet, goes into the global model.

    Args:
        resume: What to go on from. Its global state becomes that after the end, its server state that of the
            only server, if there was one.
        memory: Becomes the global model.
        shapes: Shapes of the parameters in it.
        algorithm: The algorithm.
        servers: Number of local servers of the new run.
        total: Local steps that the new run begins with.
    """
    assert resume.globals is not None
    had_one, has_one = len(resume.manifest.groups) == 1, servers == 1
    fresh: dict[str, Any] = {"server": None, "applied": total, "updates": [], "received": {}, "counters": {}}
    if had_one:
        only = resume.servers[0]
        memory.copy_(only["server"]["model"])
        if has_one:
            resume.server = {**only, "server": {**only["server"], "steps": 0}}
        resume.globals = fresh if has_one else None
        return
    server = algorithm.global_server(len(resume.manifest.groups), memory.clone(), shapes)
    assert server is not None
    server.load_state_dict(resume.globals["server"])
    for update in resume.globals["updates"]:
        server.receive(RegionUpdate(**update))
    for index, state in resume.servers.items():
        if (update := unsent(index, state["server"])).steps:
            server.receive(update)
    memory.copy_(server.model)
    resume.globals = fresh if has_one else {**fresh, "server": server.state_dict()}


@contextmanager
def _warning(path: Path) -> Iterator[None]:
    """A save must not end the run, whatever an object raises while it is written."""
    try:
        yield
    except Exception as error:
        rank_zero_warn(f"The checkpoint {path} could not be written: {error}. Training goes on.")


def _groups(strategy: AlgorithmStrategy) -> list[list[int]]:
    return [list(group.ranks) for group in strategy.topology.groups]


def _save_of(checkpoint: dict[str, Any]) -> str:
    return str(checkpoint.get(KEY, {}).get("save", ""))


def _trainer(strategy: AlgorithmStrategy) -> pl.Trainer:
    assert strategy.lightning_module is not None
    return strategy.lightning_module.trainer
