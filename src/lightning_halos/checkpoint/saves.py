"""The saves that are under way: rank 0's book of them.

Rules of this room: a save is whole when its manifest is written, and that happens when all shards are. Until then what
was there before stays: a file of the same name is not replaced, and an older checkpoint that is to be removed is kept.
A save that fails is a warning and never ends the run.
"""

from __future__ import annotations

import contextlib
import os
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
from lightning_halos.checkpoint.places import folder_of, is_hpc, newest_whole, save_folders
from lightning_halos.checkpoint.writer import Writer
from lightning_halos.core.messages import Marker, ShardWritten

_MOST = 8  # saves under way at once, whose shards may all wait for a disk
_WAITING = 12  # writes of rank 0 that may wait: each holds a copy of its state in memory


@dataclass
class Save:
    """A save under way.

    Attributes:
        path: The ``.ckpt`` file.
        written_to: Where it is until the save is whole: the file itself, if its name is free and it may be seen
            half-written.
        marker: Which save, and where its shards are.
        manifest: What the manifest will be.
        expected: Names of the shards that are not written yet.
        shards: Those that are.
        is_written: Whether the file is.
        is_known: Whether the manifest says how far the run was.
        is_finishing: Whether all is there that makes it whole.
        failed: Whether something went wrong.
        older: Folders of older saves of this name, which are removed when it is whole.
        removals: Other checkpoints that are.
    """

    path: Path
    written_to: Path
    marker: Marker
    manifest: Manifest
    expected: set[str]
    older: list[Path]
    shards: dict[str, Written] = field(default_factory=dict)
    is_written: bool = False
    is_known: bool = False
    is_finishing: bool = False
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
        self._lacks_newest = False
        self._folders_with_whole_ones: set[Path] = set()

    @property
    def is_full(self) -> bool:
        """Whether as many saves are under way as may be: rounds or a disk take longer than the time between saves."""
        with self._lock:
            return len(self._saves) >= _MOST or self.writer.waiting >= _WAITING

    def begin(self, path: Path, manifest: Manifest, expected: set[str]) -> Save:
        """Begins a save.

        Args:
            path: The ``.ckpt`` file.
            manifest: What is known by now. The save gets a name of its own.
            expected: Names of the shards that are to come; none of a save that fails at once.

        Raises:
            OSError: If its folder cannot be made.
        """
        path = path.absolute()
        number = uuid.uuid4().hex[:12]
        folder = folder_of(path) / number
        try:
            older = save_folders(path)
            folder.mkdir(parents=True)
            # If the first one were seen half-written, a run could neither go on from it nor begin anew.
            is_hidden = path.exists() or (bool(expected) and not is_hpc(path) and not self._has_whole_one(path))
        except OSError:
            self._lacks_newest = True
            raise
        written_to = folder / path.name if is_hidden else path
        manifest = replace(manifest, save=number, shards={})
        save = Save(path, written_to, Marker(number, str(folder)), manifest, set(expected), older)
        with self._lock:
            for other in list(self._saves.values()):
                other.removals = [old for old in other.removals if old != path]
            save.removals = [old for old in self._kept if old != path]
            self._kept, self._lacks_newest = [], False
            self._saves[number] = save
        return save

    def file_written(self, number: str) -> None:
        """Takes note that the ``.ckpt`` file of a save is on the disk."""
        with self._lock:
            if save := self._saves.get(number):
                save.is_written = True
                self._show(save)
        self._complete(number)

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
        self._complete(number)

    def remove(self, path: Path, remove_file: Callable[[], None]) -> None:
        """Removes a checkpoint, as soon as the save that replaces it is whole.

        Args:
            path: The ``.ckpt`` file.
            remove_file: Removes it.
        """
        path = path.absolute()
        with self._lock:
            newest = next(reversed(self._saves.values()), None)
            if self._lacks_newest:
                self._kept.append(path)
                return
            if newest is not None and newest.path != path:
                newest.removals.append(path)
                return
        remove_file()
        remove_shards(path)

    def flush(self, timeout: float, but: Sequence[Save] = (), interrupted: Callable[[], None] = lambda: None) -> None:
        """Waits until saves are whole, or have failed; warns of those that are not within ``timeout`` seconds.

        Args:
            timeout: Seconds.
            but: Saves that are not waited for.
            interrupted: Called many times a second meanwhile; may raise.
        """
        deadline = time.monotonic() + timeout
        while any(not save.failed for _, save in self._open(but)) and time.monotonic() < deadline:
            interrupted()
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
            missing = sorted(save.expected) or [NAME if save.is_written else save.path.name]
            self.fail(number, f"{', '.join(missing)} did not come within {timeout:g} s")
            self._end(number)

    def _open(self, but: Sequence[Save] = ()) -> list[tuple[str, Save]]:
        with self._lock:
            return [(number, save) for number, save in self._saves.items() if save not in but]

    def _complete(self, number: str) -> None:
        with self._lock:
            save = self._saves.get(number)
            if save is None or save.expected:
                return
            if save.failed:
                self._end(number)
            elif save.is_written and save.is_known and not save.is_finishing:
                save.is_finishing = True
                self.writer.submit(lambda: self._finish(number, save))

    def _has_whole_one(self, path: Path) -> bool:
        """Whether there is a whole checkpoint in the folder of a ``.ckpt`` file."""
        if path.parent not in self._folders_with_whole_ones and newest_whole(path) is not None:
            self._folders_with_whole_ones.add(path.parent)
        return path.parent in self._folders_with_whole_ones

    def _show(self, save: Save) -> None:
        """Lets a file be seen before its save is whole: if there is another to go on from, or it never will be."""
        is_due = save.failed or save.path.parent in self._folders_with_whole_ones
        is_hidden = save.is_written and save.written_to != save.path and not save.path.exists()
        if is_due and is_hidden:
            with contextlib.suppress(OSError):
                os.replace(save.written_to, save.path)
                save.written_to = save.path

    def _finish(self, number: str, save: Save) -> None:
        with self._lock:
            if number not in self._saves:  # a newer one of the same name was whole first
                files.remove_folder(save.folder)
                return
        try:
            finish(save)
        except OSError as error:
            self.fail(number, str(error))
            return
        with self._lock:
            self._folders_with_whole_ones.add(save.path.parent)
            for other in self._saves.values():
                if other.path.parent == save.path.parent:
                    self._show(other)
        while removals := self._take_removals(save):
            for path in removals:
                with contextlib.suppress(OSError):
                    path.unlink()
                remove_shards(path)
        self._end(number)

    def _take_removals(self, save: Save) -> list[Path]:
        """Takes what is to be removed now that a save is whole. Older saves of the same name end with that."""
        with self._lock:
            same = [number for number, other in self._saves.items() if other.path == save.path]
            number = save.marker.save
            older = same[: same.index(number)] if number in same else []  # it may have been given up meanwhile
            removals = [path for one in (save, *map(self._saves.pop, older)) for path in one.removals]
            save.removals = []
            return removals

    def _end(self, number: str) -> None:
        with self._lock:
            newest = next(reversed(self._saves), None)
            save = self._saves.pop(number, None)
            if save is None or not save.failed:
                return
            self._show(save)
            if newest == number:
                self._lacks_newest = True
                self._kept += save.removals
            elif newest is not None:
                self._saves[newest].removals += save.removals


def finish(save: Save) -> None:
    """Makes a save whole: writes its manifest, puts its ``.ckpt`` file in the place of an older one, and removes that.

    Raises:
        OSError: If that cannot be written.
    """
    replace(save.manifest, shards=save.shards).write(save.folder)
    if save.written_to != save.path:
        os.replace(save.written_to, save.path)
        files.bring_to_disk(save.path.parent)
    for folder in save.older:
        files.remove_folder(folder)


def remove_shards(path: Path) -> None:
    """Removes the shards of a ``.ckpt`` file, if it has any and is not just another name of one."""
    if path.is_symlink():
        return
    for folder in save_folders(path):
        files.remove_folder(folder)
    with contextlib.suppress(OSError):  # it is not there, or holds something else
        folder_of(path).rmdir()
