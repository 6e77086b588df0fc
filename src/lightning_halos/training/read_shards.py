"""Reads the shards of a checkpoint, for the same or other workers, servers and data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_halos.checkpoint.errors import CheckpointError
from lightning_halos.checkpoint.manifest import GLOBAL_SHARD, NAME, Manifest, global_shard, server_shard, worker_shard
from lightning_halos.checkpoint.resume import KEY, CompleteCheckpoint, Resume, find
from lightning_halos.core.layout import Layout
from lightning_halos.core.reslicing import Reslicing
from lightning_halos.core.shadow import SHADOW
from lightning_halos.training.optimizer_shards import is_divided, join_pieces
from lightning_halos.training.site import Site
from lightning_halos.training.worker_state import clear_optimizers, put_own_data, put_worker_state, take_part_again

_OF_SLICES = ("memory", "model", "push", "pushed", "answer", "residual", SHADOW)
"""Names of what has slices of the vector in a worker's shard. Most of it is only in a simulation's."""


def load(
    site: Site,
    run: str,
    has_server_shards: bool,
    path: Path,
    checkpoint: dict[str, Any],
    max_epochs: int | None,
    joins_optimizers: bool,
) -> tuple[dict[str, Any], Resume | None]:
    """Reads the shards that belong to a ``.ckpt`` file, when all workers are in step.

    Args:
        site: This process's place and connections.
        run: Name of the algorithm, as in the manifest. Shards of other algorithms are not used.
        has_server_shards: Whether local servers have shards of their own. In a simulation one shard has all servers.
        path: The file.
        checkpoint: Its contents.
        max_epochs: Epochs of the run; ``None`` or -1 for no limit.
        joins_optimizers: Whether the contents get the complete states of optimizers, for Lightning to restore.

    Returns:
        The contents for this process, with this worker's own state instead of rank 0's; and the state from which the
        next fit resumes, ``None`` if it resumes from the contents alone.

    Raises:
        CheckpointError: On all ranks, if the checkpoint is incomplete or damaged.
    """
    collectives = site.collectives
    saves = collectives.gather_texts(str(checkpoint.get(KEY, {}).get("save", "")))
    if len(set(saves)) > 1:
        raise CheckpointError(f"{path} is not the same file on all ranks. Copy one file to all machines.")
    if not saves[0]:
        return checkpoint, None
    found, reason = None, ""
    if site.rank == 0:
        try:
            found = find(path, saves[0])
        except Exception as error:  # whatever it is, the other workers are told
            reason = _reason(error, f"the shards of {path}")
    told = [reason, *(["", ""] if found is None else [str(found.folder), found.manifest.text()])]
    reason, folder, text = collectives.broadcast_object(told)
    if reason:
        raise CheckpointError(reason)
    if not folder:
        rank_zero_warn(
            f"{path} has no folder of shards: the servers start from the global model, and the other workers'"
            " optimizers from scratch."
        )
        return checkpoint, None
    found = CompleteCheckpoint(Path(folder), Manifest.read(text, Path(folder) / NAME))
    resume = None
    try:
        resume = _read(site, run, has_server_shards, found)
    except Exception as error:  # whatever it is, the other workers are told
        reason = _reason(error, f"the shards in {folder}")
    if reasons := [text for text in collectives.gather_texts(reason) if text]:
        raise CheckpointError(" ".join(dict.fromkeys(reasons)))
    if resume is not None:
        _warn_of_missing(site, found, resume)
    if resume is not None and found.manifest.data_remains(max_epochs):
        take_part_again(checkpoint, max_epochs)
    if resume is not None and site.rank == 0:
        put_own_data(checkpoint, resume.worker, max_epochs)
    elif resume is not None:
        if resume.worker:
            if joins_optimizers and any(resume.optimizers):
                resume.worker["optimizer_states"] = [join_pieces(own) for own in zip(*resume.optimizers, strict=True)]
            elif not joins_optimizers:
                resume.worker.pop("optimizer_states", None)
            put_worker_state(checkpoint, resume.worker, max_epochs, shares_data=found.manifest.data is not None)
        elif site.rank >= found.manifest.workers:
            clear_optimizers(checkpoint)
    return checkpoint, resume


def _read(site: Site, run: str, has_server_shards: bool, found: CompleteCheckpoint) -> Resume | None:
    """Reads this process's shards."""
    rank, manifest, groups = site.rank, found.manifest, [list(group.ranks) for group in site.topology.groups]
    if manifest.algorithm != run:
        rank_zero_warn(
            f"{found.folder} was saved with {manifest.algorithm}, but this is {run}: only the global model and rank 0's"
            " optimizer are used."
        )
        return None
    resume = Resume(manifest, fits=manifest.groups == groups)
    resume.sliced = found if manifest.lanes > 1 or site.lanes > 1 else None
    if not has_server_shards and not (resume.fits and manifest.lanes == site.lanes):
        rank_zero_warn(
            f"{found.folder} was saved in a cluster with the workers {manifest.groups}, by local server, of"
            f" {manifest.lanes} process(es) each, but now they are {groups} of {site.lanes}: only the global model and"
            " rank 0's optimizer are used."
        )
        return None
    if resume.fits:
        _read_worker(found, site, resume)
        if resume.sliced is None:
            group = site.topology.group_of(rank)
            if rank == group.leader and has_server_shards:
                resume.server = found.read(server_shard(group.index))
            if rank == 0:
                resume.globals = found.read(GLOBAL_SHARD)
        return resume
    # If machines do not share a disk, this machine may not have all old shards.
    if all(found.has(worker_shard(rank, lane)) for lane in range(manifest.lanes)):
        _read_worker(found, site, resume)
    if rank == 0:
        indices = [i for i in range(len(manifest.groups)) if _has_server(found, i)]
        if resume.sliced is None:
            resume.globals = found.read(GLOBAL_SHARD)
            resume.servers = {index: found.read(server_shard(index)) for index in indices}
        if site.lane == 0:
            _warn(found, resume, groups, indices)
    return resume


def _read_worker(found: CompleteCheckpoint, site: Site, resume: Resume) -> None:
    """Reads this process's shard, or that of its worker's lane 0 if the checkpoint has no such lane."""
    rank, lanes = site.rank, found.manifest.lanes
    resume.worker = found.read(worker_shard(rank, site.lane if site.lane < lanes else 0))
    if lanes == 1:
        resume.optimizers = [resume.worker.get("optimizer_states", [])]
        return
    shards = [found.read(worker_shard(rank, lane), mapped=True) for lane in range(lanes)]
    if is_divided(shards[0].get("optimizer_states", [])):
        resume.optimizers = [shard["optimizer_states"] for shard in shards]
    else:  # all processes of the worker had the same, and lane 0 saved it
        resume.optimizers = [found.read(worker_shard(rank)).get("optimizer_states", [])]


def read_slices(site: Site, resume: Resume, layout: Layout, shapes: Sequence[torch.Size]) -> None:
    """Reads this lane's slices of the servers' and the worker's states, which may be cut otherwise in the checkpoint.

    All processes must call it together.

    Args:
        site: This process's place and connections.
        resume: What was read before; it gets the states.
        layout: The slices of this run.
        shapes: Shapes of the parameters in this lane.

    Raises:
        CheckpointError: On all ranks, if a shard is missing or damaged.
    """
    if resume.sliced is None:
        return
    found, reason = resume.sliced, ""
    manifest = found.manifest
    old = layout.undivided() if manifest.layout is None else Layout.from_plain(manifest.layout)

    def read(name: Callable[[int], str], part: Callable[[Any], Any] = lambda state: state) -> Any:
        reslicing = Reslicing(old, layout, site.lane, shapes)
        for lane in reslicing.lanes:
            reslicing.add(lane, part(found.read(name(lane), mapped=True)))
        return reslicing.state

    def of_slices(state: Mapping[str, Any]) -> Mapping[str, Any]:
        return {name: state[name] for name in _OF_SLICES if name in state}

    try:
        group = site.topology.group_of(site.rank)
        if site.carries and resume.fits and site.rank == group.leader and server_shard(group.index) in manifest.shards:
            resume.server = read(partial(server_shard, group.index))
        if site.carries and resume.worker and old != layout:
            resume.worker |= read(partial(worker_shard, site.rank), of_slices)
        if site.carries and site.rank == 0:
            resume.globals = read(global_shard)
            if not resume.fits:
                indices = [i for i in range(len(manifest.groups)) if _has_server(found, i)]
                resume.servers = {index: read(partial(server_shard, index)) for index in indices}
    except Exception as error:  # whatever it is, the other workers are told
        reason = _reason(error, f"the shards in {found.folder}")
    if reasons := [text for text in site.collectives.gather_texts(reason) if text]:
        raise CheckpointError(" ".join(dict.fromkeys(reasons)))
    resume.sliced = None


def _has_server(found: CompleteCheckpoint, index: int) -> bool:
    """Returns whether this machine can read all parts of a local server's shard."""
    return all(found.has(server_shard(index, lane)) for lane in range(found.manifest.lanes))


def _warn(found: CompleteCheckpoint, resume: Resume, groups: list[list[int]], indices: Sequence[int]) -> None:
    """Warns about the state that could not be kept with other workers or servers."""
    manifest, size = resume.manifest, sum(map(len, groups))
    lost = ["the local servers' momentum"]
    if manifest.workers < size:
        lost.append(f"the optimizers of the {size - manifest.workers} new worker(s), which start from scratch")
    if manifest.workers > size:
        gone = manifest.workers - size
        lost.append(f"the optimizers of the last {gone} worker(s)")
    if missing := sorted(set(range(len(manifest.groups))) - set(indices)):
        lost.append(f"the unsent updates of the local servers {missing}, whose shards are not in {found.folder}")
    rank_zero_warn(
        f"The checkpoint was saved with the workers {manifest.groups}, by local server, but now they are {groups}. The"
        f" global model, its server's momentum and the position in the data are kept. Not kept: {'; '.join(lost)}."
    )


def _warn_of_missing(site: Site, found: CompleteCheckpoint, resume: Resume) -> None:
    """Warns about old workers whose shards their new processes cannot reach."""
    is_missing = site.rank < found.manifest.workers and not resume.worker
    texts = site.collectives.gather_texts("missing" if is_missing else "")
    if missing := sorted({site.placement.worker_of(process) for process, text in enumerate(texts) if text}):
        rank_zero_warn(
            f"Not kept: the optimizers of the workers {missing}, whose shards"
            f" ({', '.join(map(worker_shard, missing))}) are not in {found.folder} on their machines. They start with"
            " rank 0's. Copy the shards there to keep them."
        )


def _reason(error: Exception, what: str) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{what} could not be read: {error!r}"
