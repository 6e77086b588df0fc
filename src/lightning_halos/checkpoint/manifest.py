"""The manifest of a checkpoint: plain values, as JSON, that say which shards belong together.

It is written when all shards are on the disk, so shards with a manifest are complete. It holds what every worker must
know to resume; what only one worker must know is in that worker's shard.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_halos.checkpoint.errors import CheckpointError
from lightning_halos.checkpoint.files import Written, write

FORMAT = 2
"""Version of the manifest and of what is in the shards. It changes when an older package could not read them."""

NAME = "manifest.json"
GLOBAL = "global.pt"


def worker_shard(rank: int) -> str:
    """Name of a worker's shard."""
    return f"worker-{rank}.pt"


def server_shard(index: int) -> str:
    """Name of a local server's shard."""
    return f"server-{index}.pt"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        save: Identifies the save. The ``.ckpt`` file has the same.
        version: Version of the package that wrote it.
        algorithm: Which algorithm, in which world.
        groups: Global ranks of each local server's workers.
        model: Number of elements that travel of the model, how many of them are parameters, and their dtype.
        total: Local steps that all workers had finished.
        data: What identifies the training data, ``None`` if the workers do not share any.
        done: The data that was trained on; see :class:`~lightning_halos.core.cursor.Spans`.
        plateaus: What the plateau schedulers of rank 0 were stepped with.
        metrics: The metrics of rank 0.
        world: Of a simulation, its clock and rounds.
        shards: The files.
    """

    save: str
    version: str
    algorithm: str
    groups: list[list[int]]
    model: dict[str, Any]
    total: int
    data: dict[str, Any] | None
    done: list[tuple[int, int]]
    plateaus: list[tuple[int, float]]
    metrics: dict[str, float]
    world: dict[str, Any] | None
    shards: dict[str, Written] = field(default_factory=dict)

    @property
    def workers(self) -> int:
        """Number of workers."""
        return sum(map(len, self.groups))

    def data_remains(self, max_epochs: int | None) -> bool:
        """Whether some data of the first ``max_epochs`` epochs (``None`` or -1: no limit) was not trained on yet."""
        if self.data is None or max_epochs in (None, -1):
            return False
        return sum(stop - start for start, stop in self.done) < int(max_epochs * self.data["steps_per_epoch"])

    def write(self, folder: Path) -> None:
        """Writes it, atomically.

        Raises:
            OSError: If it cannot be written.
        """
        text = json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1)
        write(folder / NAME, lambda file: file.write(text.encode()))

    @classmethod
    def read(cls, text: str, path: Path) -> Manifest:
        """Reads what :meth:`write` wrote.

        Args:
            text: The content.
            path: Where it is from, for error messages.

        Raises:
            CheckpointError: If it is damaged, or of a format that this version of the package does not know.
        """
        try:
            fields = json.loads(text)
            found = fields.pop("format")
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged: it is not the manifest of a checkpoint ({error!r}).") from None
        if found != FORMAT:
            raise CheckpointError(
                f"{path} has format {found}, written by lightning-halos {fields.get('version', '?')}; this version"
                f" reads format {FORMAT}. Resume with that version of lightning-halos, or remove the folder to go on"
                " from the global model alone."
            )
        try:
            shards = {name: Written(**shard) for name, shard in fields.pop("shards").items()}
            return cls(**fields, shards=shards)
        except (TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged: it is not the manifest of a checkpoint ({error!r}).") from None
