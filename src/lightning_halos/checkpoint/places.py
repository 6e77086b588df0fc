"""Where things are: a ``.ckpt`` file, the folder of its shards, and the checkpoints beside it.

Rules of this room: it knows names and looks at folders. It neither opens nor changes anything.
"""

from __future__ import annotations

import re
from pathlib import Path

from lightning_halos.checkpoint.manifest import NAME

_SAVE = re.compile("[0-9a-f]{12}")
_LAST = re.compile(r"(last.*|hpc_ckpt_\d+)\.ckpt")


def folder_of(path: Path) -> Path:
    """The folder of a ``.ckpt`` file's shards: of the same name, beside it. Each save has one of its own in there."""
    return path.with_suffix("") if path.suffix == ".ckpt" else path.with_name(f"{path.name}.shards")


def save_folders(path: Path) -> list[Path]:
    """The folders of a ``.ckpt`` file's saves; what else is in the folder of its name is not ours."""
    return [folder for folder in folder_of(path).glob("*") if _SAVE.fullmatch(folder.name) and folder.is_dir()]


def is_last(path: Path) -> bool:
    """Whether ``ckpt_path="last"`` or Lightning in SLURM would choose a file of this name."""
    return _LAST.fullmatch(path.name) is not None


def newest_whole(path: Path) -> Path | None:
    """The newest whole checkpoint beside a ``.ckpt`` file, ``None`` if there is none."""
    return next(iter(whole_ones(path)), None)


def whole_ones(path: Path) -> list[Path]:
    """The checkpoints beside a ``.ckpt`` file that have a manifest, the newest first."""
    manifests = sorted(path.parent.glob(f"*/*/{NAME}"), key=lambda one: one.stat().st_mtime, reverse=True)
    files = [one.parent.parent.with_name(f"{one.parent.parent.name}.ckpt") for one in manifests]
    return [file for file in files if file.is_file() and file.resolve() != path.resolve()]
