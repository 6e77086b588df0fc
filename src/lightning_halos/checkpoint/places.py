"""Finds the folder of a ``.ckpt`` file's shards, and other checkpoints in the same folder, by their names.

It neither opens nor changes files. Other processes may remove files at any time.
"""

from __future__ import annotations

import contextlib
import glob
import re
from pathlib import Path

from lightning_halos.checkpoint.manifest import NAME

_SAVE = re.compile("[0-9a-f]{12}")
_HPC = re.compile(r"hpc_ckpt_\d+\.ckpt")


def folder_of(path: Path) -> Path:
    """Returns the folder of a ``.ckpt`` file's shards, which has the same name. It has a folder for each save."""
    return path.with_suffix("") if path.suffix == ".ckpt" else path.with_name(f"{path.name}.shards")


def save_folders(path: Path) -> list[Path]:
    """Returns the folders of a ``.ckpt`` file's saves. Other files next to them belong to the user."""
    names = glob.glob("*/", root_dir=folder_of(path))
    return [folder_of(path) / name for name in names if _SAVE.fullmatch(name.rstrip("/"))]


def is_last(path: Path) -> bool:
    """Returns whether ``ckpt_path="last"`` would find a file of this name."""
    return path.match("last*.ckpt")


def is_hpc(path: Path) -> bool:
    """Returns whether Lightning in SLURM would choose a file of this name, even if only its folder exists."""
    return _HPC.fullmatch(path.name) is not None


def is_complete(path: Path) -> bool:
    """Returns whether a ``.ckpt`` file and its shards exist."""
    return path.is_file() and any((folder / NAME).is_file() for folder in save_folders(path))


def newest_complete(path: Path) -> Path | None:
    """Returns the newest other checkpoint with shards in the same folder; ``None`` if there is none."""
    times: dict[Path, float] = {}
    for manifest in glob.glob(f"*/*/{NAME}", root_dir=path.parent):
        file = path.with_name(f"{Path(manifest).parts[0]}.ckpt")
        with contextlib.suppress(FileNotFoundError):
            times[file] = max((path.parent / manifest).stat().st_mtime, times.get(file, 0.0))
    newest_first = sorted(times, key=lambda file: times[file], reverse=True)
    return next((file for file in newest_first if file.is_file() and file.resolve() != path.resolve()), None)
