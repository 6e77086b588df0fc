"""Finds and reads the shards of a ``.ckpt`` file.

It never writes. An incomplete or damaged checkpoint is refused, with an error that names the file and says what to do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_halos.checkpoint.errors import CheckpointError
from lightning_halos.checkpoint.files import read_state
from lightning_halos.checkpoint.manifest import NAME, Manifest
from lightning_halos.checkpoint.places import folder_of, is_hpc, newest_complete

KEY = "lightning_halos"
"""A ``.ckpt`` file with shards has this key in addition: ``{"save": ..., "version": ...}``."""

_WHAT_TO_DO = "Resume from another checkpoint, or remove that folder to resume from the global model alone."


@dataclass(frozen=True)
class CompleteCheckpoint:
    """A complete checkpoint, with the folder of its shards."""

    folder: Path
    manifest: Manifest

    def read(self, name: str, mapped: bool = False) -> Any:
        """Reads a shard; see :func:`read_state`.

        Raises:
            CheckpointError: If it is missing or damaged.
        """
        if name not in self.manifest.shards:
            raise CheckpointError(f"{self.folder / NAME} does not name {name}. {_WHAT_TO_DO}")
        try:
            return read_state(self._path(name), self.manifest.shards[name], mapped)
        except CheckpointError as error:
            raise CheckpointError(f"{error} {_WHAT_TO_DO}") from None

    def has(self, name: str) -> bool:
        """Returns whether this machine can read a shard."""
        return self._path(name).is_file()

    def _path(self, name: str) -> Path:
        # A machine with a disk of its own has a shared shard only in the folder of the first .ckpt file.
        others = self.folder.parent.parent.glob(f"*/{self.folder.name}/{name}")
        return next((path for path in [self.folder / name, *others] if path.is_file()), self.folder / name)


@dataclass
class Resume:
    """The state from which one process resumes."""

    manifest: Manifest
    fits: bool  # whether the workers and servers are the same as in the checkpoint
    worker: dict[str, Any] = field(default_factory=dict)  # this worker's shard; empty if it has none
    # By lane of the checkpoint, the states of this worker's optimizers, if its model was divided among its processes.
    optimizers: list[list[dict[str, Any]]] = field(default_factory=list)
    server: dict[str, Any] | None = None  # on a leader: None if its local server starts from the global model
    globals: dict[str, Any] | None = None  # on rank 0: of the global server or of the simulation
    # If the model was cut into slices, or is now: the checkpoint. The states of the servers are read from it when the
    # slices are known.
    sliced: CompleteCheckpoint | None = None
    servers: dict[int, dict[str, Any]] = field(default_factory=dict)  # on rank 0 unless it fits: of the old servers


def available(path: Path) -> Path:
    """Returns the file to read for a path that Lightning chose.

    In SLURM, Lightning chooses by the name of a folder. If the save was interrupted, the file does not exist.

    Raises:
        CheckpointError: If the folder has no other complete checkpoint.
    """
    if path.exists() or not is_hpc(path):
        return path
    other = newest_complete(path)
    if other is None:
        raise CheckpointError(
            f"{path} was never completed, because its save was interrupted, and there is no other checkpoint beside it."
            f" Remove {folder_of(path)} to start from scratch."
        )
    rank_zero_warn(f"{path} was never completed, because its save was interrupted: {other} is used instead.")
    return other


def find(path: Path, save: str) -> CompleteCheckpoint | None:
    """Finds the shards of a ``.ckpt`` file by the identity of its save.

    Returns:
        The shards; ``None`` if they have no folder, because the file was saved or copied without them.

    Raises:
        CheckpointError: If the manifest is missing or cannot be read.
    """
    # The file may have been renamed or copied next to its shards.
    own, beside = folder_of(path.resolve()) / save, path.resolve().parent.glob(f"*/{save}")
    folder = next((folder for folder in [own, *sorted(beside)] if folder.exists()), None)
    if folder is None:
        return None
    manifest = folder / NAME
    if not manifest.is_file():
        other = newest_complete(path)
        instead = f"The newest complete checkpoint there is {other}. " if other else ""
        raise CheckpointError(
            f"{path} is incomplete: {manifest} is missing."
            f" {instead}{_WHAT_TO_DO.replace('that folder', str(folder.parent))}"
        )
    found = Manifest.read(manifest.read_bytes(), manifest)
    if found.save != save:
        raise CheckpointError(f"{manifest} belongs to another save ({found.save}) than {path} ({save}). {_WHAT_TO_DO}")
    return CompleteCheckpoint(folder, found)
