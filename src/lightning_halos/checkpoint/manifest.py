"""The manifest of a checkpoint: plain values, as JSON, with the list of its shards.

It is written when all shards are on disk, so shards with a manifest are complete. It contains the state that all
workers need to resume; a worker's shard contains the state that only this worker needs.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_halos.checkpoint.errors import CheckpointError
from lightning_halos.checkpoint.files import WrittenFile, write
from lightning_halos.core.layout import Layout

FORMAT = 3
"""Version of the manifest and the shards. It changes when older versions of the package could not read them."""
FORMAT_OF_LANES = 4
"""The version if the model is cut into slices, which versions before this one could not read."""

NAME = "manifest.json"
GLOBAL_SHARD = "global.pt"


def worker_shard(rank: int, lane: int = 0) -> str:
    """Returns the name of a worker's shard, or of that of another one of its lanes."""
    return f"worker-{rank}.lane-{lane}.pt" if lane else f"worker-{rank}.pt"


def server_shard(index: int, lane: int = 0) -> str:
    """Returns the name of a local server's shard, or of another lane's part of it."""
    return f"server-{index}.lane-{lane}.pt" if lane else f"server-{index}.pt"


def global_shard(lane: int = 0) -> str:
    """Returns the name of the global server's shard, or of another lane's part of it."""
    return f"global.lane-{lane}.pt" if lane else GLOBAL_SHARD


@dataclass(frozen=True)
class Manifest:
    """The contents of a checkpoint."""

    save: str  # identity of the save; the .ckpt file has it, too
    version: str  # of the package that wrote it
    algorithm: str  # its name, and whether it was simulated
    groups: list[list[int]]  # global ranks of each local server's workers
    model: dict[str, Any]  # number of elements of the model's vector, number of parameters among them, and their dtype
    total: int  # local steps that all workers together had finished
    data: dict[str, Any] | None  # identity of the training data; None if the workers do not share data
    done: list[tuple[int, int]]  # the data that was trained on; see core.cursor.Spans
    plateau_steps: list[tuple[int, float]]  # of rank 0's plateau schedulers
    metrics: dict[str, float]  # of rank 0
    world: dict[str, Any] | None  # of a simulation: its clock and rounds
    shards: dict[str, WrittenFile] = field(default_factory=dict)
    teachers: list[str] = field(default_factory=list)  # what is averaged because of its values at the start of the run
    # The slices of the lanes, as in core.layout.Layout.to_plain; None if there is one lane.
    layout: dict[str, Any] | None = None
    # The length for which the servers' default settings were chosen when the run began. None: an earlier version wrote
    # it, when the defaults were the published ones whatever the length.
    global_steps: int | None = None

    @property
    def lanes(self) -> int:
        """Number of lanes."""
        return 1 if self.layout is None else Layout.from_plain(self.layout).lanes

    @property
    def workers(self) -> int:
        """Number of workers."""
        return sum(map(len, self.groups))

    def data_remains(self, max_epochs: int | None) -> bool:
        """Returns whether data of the first ``max_epochs`` epochs (``None`` or -1: no limit) was not trained on yet."""
        if self.data is None or max_epochs in (None, -1):
            return False
        return sum(stop - start for start, stop in self.done) < int(max_epochs * self.data["steps_per_epoch"])

    def write(self, folder: Path) -> None:
        """Writes the manifest atomically."""
        write(folder / NAME, lambda file: file.write(self.text().encode()))

    def text(self) -> str:
        """Returns the manifest as JSON."""
        fields = dataclasses.asdict(self)
        if self.layout is None:
            del fields["layout"]
        return json.dumps({"format": FORMAT if self.layout is None else FORMAT_OF_LANES, **fields}, indent=1)

    @classmethod
    def read(cls, text: str | bytes, path: Path) -> Manifest:
        """Reads the contents of the file at ``path``.

        Raises:
            CheckpointError: If it is damaged, or has a format that this version of the package does not support.
        """
        try:
            fields = json.loads(text)
            found = fields.pop("format")
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged: it is not the manifest of a checkpoint ({error!r}).") from None
        if found not in (FORMAT, FORMAT_OF_LANES):
            raise CheckpointError(
                f"{path} has format {found}, written by lightning-halos {fields.get('version', '?')}; this version"
                f" reads formats {FORMAT} and {FORMAT_OF_LANES}. Resume with that version of lightning-halos, or remove"
                " the folder to resume from the global model alone."
            )
        try:
            shards = {name: WrittenFile(**shard) for name, shard in fields.pop("shards").items()}
            return cls(**fields, shards=shards)
        except (TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged: it is not the manifest of a checkpoint ({error!r}).") from None
