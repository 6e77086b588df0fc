"""What may be read: finds the shards of a ``.ckpt`` file and says what is wrong with them.

Rules of this room: it reads and never writes. What is half-written or damaged is refused, with an error that names the
file and says what to do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_halos.checkpoint.errors import CheckpointError
from lightning_halos.checkpoint.files import read_state
from lightning_halos.checkpoint.manifest import NAME, Manifest
from lightning_halos.checkpoint.places import folder_of, newest_whole

KEY = "lightning_halos"
"""What a ``.ckpt`` file with shards has in addition: ``{"save": ..., "version": ...}``."""

_WHAT_TO_DO = "Resume from another checkpoint, or remove that folder to go on from the global model alone."


@dataclass(frozen=True)
class Found:
    """A whole checkpoint.

    Attributes:
        folder: Where its shards are.
        manifest: What belongs to it.
    """

    folder: Path
    manifest: Manifest

    def read(self, name: str) -> Any:
        """Reads a shard.

        Raises:
            CheckpointError: If it is missing or damaged.
        """
        if name not in self.manifest.shards:
            raise CheckpointError(f"{self.folder / NAME} does not name {name}. {_WHAT_TO_DO}")
        try:
            return read_state(self.folder / name, self.manifest.shards[name])
        except CheckpointError as error:
            raise CheckpointError(f"{error} {_WHAT_TO_DO}") from None


@dataclass
class Resume:
    """What one process goes on from.

    Attributes:
        manifest: What belongs to the checkpoint.
        fits: Whether there are the same workers and servers as before.
        worker: This worker's shard; empty if it has none.
        server: Of a leader, its local server's shard; ``None`` if it begins anew.
        globals: On rank 0, the global server's shard, or that of the simulated world.
        servers: On rank 0, if the servers begin anew: the shards of the old ones, by index, as far as they are there.
    """

    manifest: Manifest
    fits: bool
    worker: dict[str, Any] = field(default_factory=dict)
    server: dict[str, Any] | None = None
    globals: dict[str, Any] | None = None
    servers: dict[int, dict[str, Any]] = field(default_factory=dict)


def find(path: Path, save: str) -> Found | None:
    """Finds the shards of a ``.ckpt`` file.

    Args:
        path: The file.
        save: What it says of them.

    Returns:
        The shards, ``None`` if there is no folder of them: the file was taken elsewhere without it.

    Raises:
        CheckpointError: If the checkpoint is half-written, or its manifest cannot be read.
    """
    folder = folder_of(path.resolve()) / save
    if not folder.exists():
        # A file may have been renamed or copied beside its shards, as ModelCheckpoint(save_last="link") may do.
        elsewhere = sorted(path.resolve().parent.glob(f"*/{save}"))
        if not elsewhere and not folder.parent.exists():
            return None
        folder = elsewhere[0] if elsewhere else folder
    manifest = folder / NAME
    if not manifest.is_file():
        whole = newest_whole(path)
        instead = f"The newest whole checkpoint there is {whole}. " if whole else ""
        raise CheckpointError(
            f"{path} is half-written: {manifest} is missing, since its save was interrupted or failed."
            f" {instead}{_WHAT_TO_DO.replace('that folder', str(folder.parent))}"
        )
    found = Manifest.read(manifest.read_text(errors="replace"), manifest)
    if found.save != save:
        raise CheckpointError(f"{manifest} belongs to another save ({found.save}) than {path} ({save}). {_WHAT_TO_DO}")
    return Found(folder, found)
