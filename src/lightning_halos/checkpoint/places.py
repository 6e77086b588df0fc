"""Where things are: a ``.ckpt`` file, the folder of its shards, and the checkpoints beside it.

Rules of this room: it knows names and looks at folders, from which others may remove something meanwhile. It neither
opens nor changes anything.
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
    """The folder of a ``.ckpt`` file's shards: of the same name, beside it. Each save has one of its own in there."""
    return path.with_suffix("") if path.suffix == ".ckpt" else path.with_name(f"{path.name}.shards")


def save_folders(path: Path) -> list[Path]:
    """The folders of a ``.ckpt`` file's saves; what else is in the folder of its name is not ours."""
    names = glob.glob("*/", root_dir=folder_of(path))
    return [folder_of(path) / name for name in names if _SAVE.fullmatch(name.rstrip("/"))]


def is_last(path: Path) -> bool:
    """Whether ``ckpt_path="last"`` or Lightning in SLURM would choose a file of this name."""
    return path.match("last*.ckpt") or is_hpc(path)


def is_hpc(path: Path) -> bool:
    """Whether Lightning in SLURM would choose a file of this name, even if there is but a folder of that name."""
    return _HPC.fullmatch(path.name) is not None


def newest_whole(path: Path) -> Path | None:
    """The newest whole checkpoint beside a ``.ckpt`` file, ``None`` if there is none."""
    return next(iter(whole_ones(path)), None)


def whole_ones(path: Path) -> list[Path]:
    """The checkpoints beside a ``.ckpt`` file that have a manifest, the newest first."""
    times: dict[Path, float] = {}
    for manifest in glob.glob(f"*/*/{NAME}", root_dir=path.parent):
        file = path.with_name(f"{Path(manifest).parts[0]}.ckpt")
        with contextlib.suppress(FileNotFoundError):
            times[file] = max((path.parent / manifest).stat().st_mtime, times.get(file, 0.0))
    newest_first = sorted(times, key=lambda file: times[file], reverse=True)
    return [file for file in newest_first if file.is_file() and file.resolve() != path.resolve()]
