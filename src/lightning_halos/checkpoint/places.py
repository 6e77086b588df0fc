"""Where a ``.ckpt`` file, the folder of its shards, and the checkpoints beside it are.

This file knows names and looks at folders. It neither opens nor changes anything, and other processes may remove files
at any time.
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
    """The folder of a ``.ckpt`` file's shards: of the same name, beside it. Each save has a folder of its own in it."""
    return path.with_suffix("") if path.suffix == ".ckpt" else path.with_name(f"{path.name}.shards")


def save_folders(path: Path) -> list[Path]:
    """The folders of a ``.ckpt`` file's saves. Whatever else is in the folder of its name belongs to the user."""
    names = glob.glob("*/", root_dir=folder_of(path))
    return [folder_of(path) / name for name in names if _SAVE.fullmatch(name.rstrip("/"))]


def is_last(path: Path) -> bool:
    """Whether ``ckpt_path="last"`` would find a file of this name."""
    return path.match("last*.ckpt")


def is_hpc(path: Path) -> bool:
    """Whether Lightning in SLURM would choose a file of this name, even if only a folder of that name exists."""
    return _HPC.fullmatch(path.name) is not None


def is_complete(path: Path) -> bool:
    """Whether a ``.ckpt`` file and its shards exist."""
    return path.is_file() and any((folder / NAME).is_file() for folder in save_folders(path))


def newest_complete(path: Path) -> Path | None:
    """The newest other checkpoint with shards beside a ``.ckpt`` file; ``None`` if there is none."""
    times: dict[Path, float] = {}
    for manifest in glob.glob(f"*/*/{NAME}", root_dir=path.parent):
        file = path.with_name(f"{Path(manifest).parts[0]}.ckpt")
        with contextlib.suppress(FileNotFoundError):
            times[file] = max((path.parent / manifest).stat().st_mtime, times.get(file, 0.0))
    newest_first = sorted(times, key=lambda file: times[file], reverse=True)
    return next((file for file in newest_first if file.is_file() and file.resolve() != path.resolve()), None)
