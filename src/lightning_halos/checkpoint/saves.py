"""The saves that are under way: rank 0's book of them.

Rules of this room: a save is whole when its manifest is written, and that happens when all shards are. Until then what
was there before stays: a file of the same name is not replaced, and an older checkpoint that is to be removed is kept.
A save that fails is a warning and never ends the run.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_halos.checkpoint import files
from lightning_halos.checkpoint.files import Written
from lightning_halos.checkpoint.manifest import NAME, Manifest
from lightning_halos.checkpoint.writer import Writer
from lightning_halos.core.messages import Marker, ShardWritten

_SAVE = re.compile("[0-9a-f]{12}")


def folder_of(path: Path) -> Path:
    """The folder of a ``.ckpt`` file's shards: of the same name, beside it. Each save has one of its own in there."""
    return path.with_suffix("") if path.suffix == ".ckpt" else path.with_name(f"{path.name}.shards")


@dataclass
class Save:
    """A save under way.

    Attributes:
        path: The ``.ckpt`` file.
        written_to: Where it is until the save is whole: the file itself, unless it was there before.
        marker: Which save, and where its shards are.
        manifest: What the manifest will be.
        expected: Names of the shards that are not written yet.
        shards: Those that are.
        is_known: Whether the manifest says how far the run was.
        failed: Whether something went wrong.
        removals: What to remove when it is whole.
    """

    path: Path
    written_to: Path
    marker: Marker
    manifest: Manifest
    expected: set[str]
    shards: dict[str, Written] = field(default_factory=dict)
    is_known: bool = False
    failed: bool = False
    removals: list[Path] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Folder of the shards."""
        return Path(self.marker.folder)


class Saves:
    """Knows which saves are under way, completes them, and removes what they replace.

    Attributes:
        writer: What this process writes in the background.
    """

    def __init__(self) -> None:
        self.writer = Writer()
        self._lock = threading.RLock()  # a signal's handler may save while the main thread does
        self._saves: dict[str, Save] = {}
        self._kept: list[Path] = []
        self._last_failed = False

    def begin(self, path: Path, manifest: Manifest, expected: set[str]) -> Save:
        """Begins a save.

        Args:
            path: The ``.ckpt`` file.
            manifest: What is known by now. The save gets a name of its own.
            expected: Names of the shards that belong to it.

        Raises:
            OSError: If its folder cannot be made.
        """
        path = path.absolute()
        number = uuid.uuid4().hex[:12]
        folder = folder_of(path) / number
        try:
            folder.mkdir(parents=True)
        except OSError:
            self._last_failed = True
            raise
        written_to = folder / path.name if path.exists() else path
        manifest = replace(manifest, save=number, shards={})
        save = Save(path, written_to, Marker(number, str(folder)), manifest, set(expected))
        with self._lock:
            for other in list(self._saves.values()):
                other.removals = [old for old in other.removals if old != path]
            self._kept = [old for old in self._kept if old != path]
            self._saves[number] = save
        return save

    def know(self, number: str, **facts: Any) -> None:
        """Takes what the manifest of a save did not say when it began."""
        with self._lock:
            save = self._saves.get(number)
            if save is not None:
                save.manifest = replace(save.manifest, **facts)
                save.is_known = True
        self._complete(number)

    def written(self, message: ShardWritten) -> None:
        """Takes note of a shard."""
        if message.error:
            self.fail(message.save, message.error)
        with self._lock:
            save = self._saves.get(message.save)
            if save is None:
                return
            save.expected.discard(message.name)
            save.shards[message.name] = Written(message.size, message.sha256)
        self._complete(message.save)

    def fail(self, number: str, reason: str) -> None:
        """Gives a save up, with a warning. What was there before stays."""
        with self._lock:
            save = self._saves.get(number)
            if save is None or save.failed:
                return
            save.failed = True
        rank_zero_warn(
            f"The checkpoint {save.path} is not whole: {reason}. Training goes on, and older checkpoints are kept."
        )

    def remove(self, path: Path, remove_file: Callable[[], None]) -> None:
        """Removes a checkpoint, as soon as the save that replaces it is whole.

        Args:
            path: The ``.ckpt`` file.
            remove_file: Removes it.
        """
        path = path.absolute()
        with self._lock:
            newest = next(reversed(self._saves.values()), None)
            if newest is not None and newest.path != path:
                newest.removals.append(path)
                return
            if newest is None and self._last_failed:
                self._kept.append(path)
                return
        remove_file()
        remove_shards(path)

    def flush(self, timeout: float, but: Sequence[Save] = ()) -> None:
        """Waits until saves are whole, or have failed; warns of those that are not within ``timeout`` seconds.

        Args:
            timeout: Seconds.
            but: Saves that are not waited for.
        """
        deadline = time.monotonic() + timeout
        while any(not save.failed for _, save in self._open(but)) and time.monotonic() < deadline:
            time.sleep(0.01)
        self.give_up(timeout, but)

    @property
    def under_way(self) -> bool:
        """Whether there is a save that is not whole yet and may become so."""
        return any(not save.failed for _, save in self._open())

    def give_up(self, timeout: float, but: Sequence[Save] = ()) -> None:
        """Ends all saves that are not whole, with a warning.

        Args:
            timeout: Seconds that was waited for them, for the warning.
            but: Saves that go on.
        """
        for number, save in self._open(but):
            self.fail(number, f"{', '.join(sorted(save.expected)) or NAME} did not come within {timeout:g} s")
            self._end(number)

    def _open(self, but: Sequence[Save] = ()) -> list[tuple[str, Save]]:
        with self._lock:
            return [(number, save) for number, save in self._saves.items() if save not in but]

    def _complete(self, number: str) -> None:
        with self._lock:
            save = self._saves.get(number)
            if save is None or save.expected or not (save.is_known or save.failed):
                return
            if save.failed:
                self._end(number)
                return
        if not self.writer.submit(lambda: self._finish(number, save)):
            self.fail(number, "the disk is slower than the saves: save less often")
            self._end(number)

    def _finish(self, number: str, save: Save) -> None:
        with self._lock:
            if number not in self._saves:  # a newer one of the same name was whole first
                files.remove_folder(save.folder)
                return
            same = [name for name, other in self._saves.items() if other.path == save.path]
            newer = same[same.index(number) + 1 :]
        try:
            finish(save, but=newer)
        except OSError as error:
            self.fail(number, str(error))
            self._end(number)
            return
        with self._lock:
            removals = self._kept + save.removals
            self._kept = []
            for older in same[: same.index(number)]:
                removals += self._saves.pop(older).removals if older in self._saves else []
        for path in removals:
            with contextlib.suppress(OSError):
                path.unlink()
            remove_shards(path)
        self._end(number)

    def _end(self, number: str) -> None:
        with self._lock:
            save = self._saves.pop(number, None)
            if save is None:
                return
            self._last_failed = save.failed
            if save.failed:
                self._kept += save.removals


def finish(save: Save, but: Sequence[str] = ()) -> None:
    """Makes a save whole: writes its manifest, and puts its ``.ckpt`` file in the place of an older one.

    Args:
        save: The save.
        but: Names of newer saves of the same file, which stay. The shards of older ones are removed.

    Raises:
        OSError: If that cannot be written.
    """
    replace(save.manifest, shards=save.shards).write(save.folder)
    if save.written_to != save.path:
        os.replace(save.written_to, save.path)
        files.bring_to_disk(save.path.parent)
    for other in _save_folders(save.path):
        if other != save.folder and other.name not in but:
            files.remove_folder(other)


def remove_shards(path: Path) -> None:
    """Removes the shards of a ``.ckpt`` file, if it has any and is not just another name of one."""
    if path.is_symlink():
        return
    for folder in _save_folders(path):
        files.remove_folder(folder)
    with contextlib.suppress(OSError):  # it is not there, or holds something else
        folder_of(path).rmdir()


def _save_folders(path: Path) -> list[Path]:
    """The folders of a ``.ckpt`` file's saves; what else is in the folder of its name is not ours."""
    return [folder for folder in folder_of(path).glob("*") if _SAVE.fullmatch(folder.name) and folder.is_dir()]
