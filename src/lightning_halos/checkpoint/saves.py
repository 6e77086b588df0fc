"""The saves of a run, from the request to the complete checkpoint. Rank 0 keeps this record.

Whoever finds a checkpoint can use it, because it is invisible until it is complete:

    PENDING    its files are being written, hidden: <path without .ckpt>/<save>/
       |       all of them are on the disk
    WRITTEN    the manifest is written; then the .ckpt file is renamed to its path, as the last act
       |
    COMPLETE   what it replaces is removed

    FAILED     from PENDING or WRITTEN: a warning; its files are removed, and what it would have replaced stays

A crash at any moment leaves the checkpoints that were complete before it. ``writer`` writes the files, in the
background. Which states belong to a save is decided elsewhere.
"""

from __future__ import annotations

import contextlib
import enum
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_halos.checkpoint import files
from lightning_halos.checkpoint.files import Written
from lightning_halos.checkpoint.manifest import NAME, Manifest
from lightning_halos.checkpoint.places import folder_of, is_complete, save_folders
from lightning_halos.checkpoint.writer import Writer
from lightning_halos.core.messages import Marker, ShardWritten


class State(enum.Enum):
    """How far a save is; see the top of this file."""

    PENDING = enum.auto()
    WRITTEN = enum.auto()
    COMPLETE = enum.auto()
    FAILED = enum.auto()


@dataclass
class Save:
    """One save: the shards of one moment, and one or more ``.ckpt`` files of that moment.

    Attributes:
        marker: Identifies the save, and says where its shards are written.
        manifest: What the manifest will say.
        moment: When the states were taken. A request at the same moment joins this save.
        hidden: Where each ``.ckpt`` file is until it is renamed to its path.
        missing: What is not on the disk yet: shards, ``.ckpt`` files, and the manifest while its content is unknown.
        shards: The shards that are on the disk.
        links: Symbolic links to be made to the ``.ckpt`` files.
        state: How far it is.
    """

    marker: Marker
    manifest: Manifest
    moment: str
    missing: set[str]
    hidden: dict[Path, Path] = field(default_factory=dict)
    shards: dict[str, Written] = field(default_factory=dict)
    links: dict[Path, Path] = field(default_factory=dict)
    state: State = State.PENDING

    @property
    def folder(self) -> Path:
        """Folder of the shards."""
        return Path(self.marker.folder)

    def add(self, path: Path) -> None:
        """Adds a ``.ckpt`` file."""
        folder = folder_of(path) / self.marker.save
        folder.mkdir(parents=True, exist_ok=True)
        self.hidden[path] = folder / path.name
        self.missing.add(str(path))


class Saves:
    """Completes saves and removes the checkpoints that they replace.

    Attributes:
        writer: What this process writes in the background.
    """

    def __init__(self) -> None:
        self.writer = Writer()
        self._lock = threading.RLock()  # a signal's handler may save while the main thread does
        self._open: dict[str, Save] = {}
        self._latest = ""  # the save that was asked for last; nothing is removed until it is complete
        self._latest_is_complete = True
        self._removals: dict[Path, Callable[[], None]] = {}

    @property
    def in_flight(self) -> bool:
        """Whether a process may still hold memory for a save: not all of its files are on the disk."""
        with self._lock:
            return any(save.state in (State.PENDING, State.FAILED) for save in self._open.values())

    @property
    def under_way(self) -> bool:
        """Whether there is a save that may still become complete, or whose predecessors are being removed."""
        with self._lock:
            return any(save.state is not State.FAILED for save in self._open.values())

    def begin(self, path: Path, manifest: Manifest, shards: set[str], moment: str = "") -> Save:
        """Begins a save, or joins the pending one of the same moment, whose shards then serve both ``.ckpt`` files.

        Args:
            path: The ``.ckpt`` file.
            manifest: What is known by now. The save gets an identity of its own.
            shards: Names of the shards that will be written.
            moment: See :class:`Save`; empty if no other may join.

        Raises:
            OSError: If its folder cannot be made.
        """
        path, number = path.absolute(), uuid.uuid4().hex[:12]
        with self._lock:
            save = self.pending(moment)
            if save is None:
                self._latest, self._latest_is_complete = number, False
                marker = Marker(number, str(folder_of(path) / number))
                save = Save(marker, replace(manifest, save=number, shards={}), moment, {NAME, *shards})
            save.add(path)
            self._open[save.marker.save] = save
            self._removals.pop(path, None)
        return save

    def pending(self, moment: str) -> Save | None:
        """The save that a request at this moment would join."""
        with self._lock:
            same = (save for save in self._open.values() if save.moment == moment != "")
            return next((save for save in same if save.state is State.PENDING), None)

    def leave_out(self, path: Path) -> None:
        """Takes note of a request that is not met, with a warning."""
        with self._lock:
            self._latest, self._latest_is_complete = "", False
        reason = "an earlier one is not yet, since rounds or a disk take longer than the time between saves"
        _warn(str(path), f"{reason}. It is left out")

    def file_written(self, number: str, path: Path) -> None:
        """Takes note that a ``.ckpt`` file is on the disk."""
        self._note(number, str(path.absolute()))

    def know(self, number: str, **facts: Any) -> None:
        """Takes what the manifest of a save did not say when it began."""
        with self._lock:
            if save := self._open.get(number):
                save.manifest = replace(save.manifest, **facts)
        self._note(number, NAME)

    def written(self, message: ShardWritten) -> None:
        """Takes note of a shard."""
        if message.error:
            self.fail(message.save, message.error)
        with self._lock:
            if save := self._open.get(message.save):
                save.shards[message.name] = Written(message.size, message.crc32)
        self._note(message.save, message.name)

    def fail(self, number: str, reason: str) -> None:
        """Gives a save up, with a warning."""
        with self._lock:
            save = self._open.get(number)
            if save is None or save.state not in (State.PENDING, State.WRITTEN):
                return
            save.state = State.FAILED
            save.missing -= {NAME, *map(str, save.hidden)}  # it stays in flight until all shards are written
        self._note(number)
        _warn(" and ".join(map(str, save.hidden)), reason)

    def remove(self, path: Path, remove_file: Callable[[], None]) -> None:
        """Removes a checkpoint, as soon as the save that was asked for last is complete.

        Args:
            path: The ``.ckpt`` file.
            remove_file: Removes it.
        """
        with self._lock:
            self._removals[path.absolute()] = remove_file
        self._remove_replaced()

    def link(self, path: Path, link: Path) -> None:
        """Makes a symbolic link to a ``.ckpt`` file once that is complete. Until then an older link stays."""
        path = path.absolute()
        with self._lock:
            for save in self._open.values():
                if path in save.hidden:
                    save.links[link] = path
                    return
        if is_complete(path):
            files.link(path, link)

    def flush(self, timeout: float, interrupted: Callable[[], None] = lambda: None) -> None:
        """Waits until all saves are complete or have failed; gives up those that are not within ``timeout`` seconds.

        Args:
            timeout: Seconds.
            interrupted: Called many times a second meanwhile; may raise.
        """
        deadline = time.monotonic() + timeout
        while self.under_way and time.monotonic() < deadline:
            interrupted()
            time.sleep(0.01)
        self.give_up(timeout)

    def give_up(self, timeout: float) -> None:
        """Ends all saves that are not complete, with a warning that they were waited for ``timeout`` seconds."""
        with self._lock:
            saves = dict(self._open)
        for number, save in saves.items():
            missing = sorted(save.missing - {NAME}) or [NAME]
            self.fail(number, f"{', '.join(missing)} did not come within {timeout:g} s")
            self._note(number, *save.missing)

    def _note(self, number: str, *names: str) -> None:
        """Takes note of what is not missing any more. When nothing is, the save is finished."""
        with self._lock:
            save = self._open.get(number)
            if save is None or save.state not in (State.PENDING, State.FAILED):
                return
            save.missing -= set(names)
            if save.missing:
                return
            if save.state is State.FAILED:
                del self._open[number]
                for path, hidden in save.hidden.items():
                    _remove_folders(path, [hidden.parent])
            else:
                save.state = State.WRITTEN
                self.writer.submit(lambda: self._finish(save), lambda reason: self.fail(number, reason))

    def _finish(self, save: Save) -> None:
        replace(save.manifest, shards=save.shards).write(save.folder)
        for hidden in save.hidden.values():
            if hidden.parent != save.folder:
                files.share(save.folder, [*save.shards, NAME], hidden.parent)
        with self._lock:
            if save.state is State.FAILED:  # it was given up meanwhile
                return
            in_use = {hidden.parent for other in self._open.values() for hidden in other.hidden.values()}
            older = {path: set(save_folders(path)) - in_use for path in save.hidden}
            for path in older:
                os.replace(save.hidden[path], path)
                del save.hidden[path]
            save.state = State.COMPLETE
            for link, path in save.links.items():
                files.link(path, link)
            self._latest_is_complete |= self._latest == save.marker.save
        try:
            for path, folders in older.items():
                files.bring_to_disk(path.parent)
                _remove_folders(path, folders)
            self._remove_replaced()
        finally:
            with self._lock:
                del self._open[save.marker.save]

    def _remove_replaced(self) -> None:
        with self._lock:
            if not self._latest_is_complete:
                return
            removals = [(path, remove_file, save_folders(path)) for path, remove_file in self._removals.items()]
            self._removals = {}
        for path, remove_file, folders in removals:
            remove_file()
            _remove_folders(path, folders)


def _remove_folders(path: Path, folders: Iterable[Path]) -> None:
    """Removes folders of a ``.ckpt`` file's saves, and the one that they are in if nothing else is in there."""
    for folder in folders:
        files.remove_folder(folder)
    with contextlib.suppress(OSError):
        folder_of(path).rmdir()


def _warn(name: str, reason: str) -> None:
    rank_zero_warn(
        f"The checkpoint {name} is not complete: {reason}. Training goes on, and older checkpoints are kept."
    )
