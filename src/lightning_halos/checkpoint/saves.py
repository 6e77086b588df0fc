"""The saves of a run, from the request to the complete checkpoint. Rank 0 keeps this record.

A checkpoint replaces nothing until it is complete:

    PENDING    its files are being written to a hidden place: <path without .ckpt>/<save>/
       |       all of them are on disk
    WRITTEN    the manifest is written; finally the .ckpt file is renamed to its path
       |
    COMPLETE   the checkpoints that it replaces are removed

    FAILED     from PENDING or WRITTEN: a warning; its files are removed, and the checkpoints that it would have
               replaced stay until a later save, of any callback, is complete

A crash at any moment leaves the checkpoints that were complete before it. ``writer`` writes the files in the
background. The contents of a save are decided by its callers.
"""

from __future__ import annotations

import contextlib
import enum
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_halos.checkpoint import files
from lightning_halos.checkpoint.files import WrittenFile
from lightning_halos.checkpoint.manifest import NAME, Manifest
from lightning_halos.checkpoint.places import folder_of, is_complete, is_hpc, is_last, save_folders
from lightning_halos.checkpoint.writer import Writer
from lightning_halos.core.messages import Marker, ShardWritten


class State(enum.Enum):
    """The state of a save; see the top of this file."""

    PENDING = enum.auto()
    WRITTEN = enum.auto()
    COMPLETE = enum.auto()
    FAILED = enum.auto()


@dataclass
class Save:
    """One save: the shards of one moment, and one or more ``.ckpt`` files of that moment."""

    marker: Marker  # of the snapshot, with the save's identity and the folder of its shards
    request: int  # number of the request that started it
    manifest: Manifest  # as far as it is known
    moment: str  # a request at the same moment joins this save; empty if none may
    missing: set[str]  # names of shards and .ckpt files, and of the manifest while its contents are unknown
    hidden: dict[Path, Path] = field(default_factory=dict)  # from which each .ckpt file is renamed to its path
    shards: dict[str, WrittenFile] = field(default_factory=dict)  # that are on disk
    links: dict[Path, Path] = field(default_factory=dict)  # to create to .ckpt files
    state: State = State.PENDING


class Saves:
    """Completes saves and removes the checkpoints that they replace.

    Attributes:
        writer: The background writer of this process.
    """

    def __init__(self) -> None:
        self.writer = Writer()
        self._lock = threading.RLock()  # a signal handler may save while the main thread does
        self._open: dict[str, Save] = {}
        self._requests = 0  # number of requests that started a save or were left out
        self._latest = 0  # the latest of them; that of its save, if a request joined one
        self._completed = 0  # the latest of them whose save is complete
        # What replaces a file is the latest request at that moment. It is removed when the save of that request, or of
        # a later one, is complete.
        self._removals: dict[Path, tuple[int, Callable[[], None]]] = {}

    @property
    def in_flight(self) -> bool:
        """Whether a process may still hold memory for a save, because not all of its files are on disk."""
        with self._lock:
            return any(save.state in (State.PENDING, State.FAILED) for save in self._open.values())

    @property
    def under_way(self) -> bool:
        """Whether a save may still become complete, or its predecessors are being removed."""
        with self._lock:
            return any(save.state is not State.FAILED for save in self._open.values())

    def begin(self, path: Path, manifest: Manifest, shards: set[str], moment: str = "") -> Save:
        """Starts a save, or joins the pending save of the same moment, so that both ``.ckpt`` files share its shards.

        Args:
            path: The ``.ckpt`` file.
            manifest: The manifest, as far as it is known. A new save gets a new identity.
            shards: Names of the shards that will be written.
            moment: See :class:`Save`.

        Raises:
            OSError: If its folder cannot be created.
        """
        path, number = path.absolute(), uuid.uuid4().hex[:12]
        with self._lock:
            save = self.pending(moment)
            if save is None:
                marker = Marker(number, str(folder_of(path) / number))
                self._requests += 1
                manifest = replace(manifest, save=number, shards={})
                save = Save(marker, self._requests, manifest, moment, {NAME, *shards})
            self._latest = save.request
            folder = folder_of(path) / save.marker.save
            folder.mkdir(parents=True, exist_ok=True)
            save.hidden[path] = folder / path.name
            save.missing.add(str(path))
            self._open[save.marker.save] = save
            self._removals.pop(path, None)
        return save

    def pending(self, moment: str) -> Save | None:
        """Returns the save that a request at this moment would join, ``None`` if there is none."""
        with self._lock:
            same = (save for save in self._open.values() if save.moment == moment != "")
            return next((save for save in same if save.state is State.PENDING), None)

    def leave_out(self, path: Path) -> None:
        """Records that a request is skipped, with a warning."""
        with self._lock:
            self._requests += 1
            self._latest = self._requests
        reason = "an earlier one is not yet, because rounds or a disk take longer than the time between saves"
        _warn(str(path), f"{reason}. It is left out")

    def file_written(self, number: str, path: Path) -> None:
        """Records that a ``.ckpt`` file is on disk."""
        self._note(number, str(path.absolute()))

    def show(self, save: Save, path: Path) -> None:
        """Makes a ``.ckpt`` file visible before its shards are complete, if this replaces nothing.

        It can be read at once, by a logger that uploads it, for example. If the save fails, the file stays, without
        shards. Files that a later run would choose by their names alone stay invisible.
        """
        if path.exists() or is_last(path) or is_hpc(path):
            return
        with contextlib.suppress(OSError):  # then it is there when it is complete
            files.share(save.hidden[path.absolute()].parent, [path.name], path.parent)

    def complete_manifest(self, number: str, **facts: Any) -> None:
        """Adds the fields of a manifest that were unknown when its save started."""
        with self._lock:
            if save := self._open.get(number):
                save.manifest = replace(save.manifest, **facts)
        self._note(number, NAME)

    def written(self, message: ShardWritten) -> None:
        """Records that a shard is on disk, or that it could not be written."""
        if message.error:
            self.fail(message.save, message.error)
        with self._lock:
            if save := self._open.get(message.save):
                save.shards[message.name] = WrittenFile(message.size, message.crc32)
        self._note(message.save, message.name)

    def fail(self, number: str, reason: str) -> None:
        """Abandons a save, with a warning."""
        with self._lock:
            save = self._open.get(number)
            if save is None or save.state not in (State.PENDING, State.WRITTEN):
                return
            save.state = State.FAILED
            save.missing -= {NAME, *map(str, save.hidden)}  # it stays in flight until all shards are written
        self._note(number)
        _warn(" and ".join(map(str, save.hidden)), reason)

    def remove(self, path: Path, remove_file: Callable[[], None]) -> None:
        """Removes a ``.ckpt`` file, by calling a function, and its shards as soon as what replaces it is complete."""
        with self._lock:
            self._removals[path.absolute()] = self._latest, remove_file
        self._remove_replaced()

    def link(self, path: Path, link: Path) -> None:
        """Creates a symbolic link to a ``.ckpt`` file when it is complete. Until then an older link stays."""
        path = path.absolute()
        with self._lock:
            for save in self._open.values():
                if path in save.hidden:
                    save.links[link] = path
                    return
        if is_complete(path):
            _link(path, link)

    def flush(self, timeout: float, interrupted: Callable[[], None] = lambda: None) -> None:
        """Waits until all saves are complete or have failed. Abandons those that take longer than ``timeout`` seconds.

        ``interrupted`` is called many times a second while waiting; it may raise.
        """
        deadline = time.monotonic() + timeout
        while self.under_way and time.monotonic() < deadline:
            interrupted()
            time.sleep(0.01)
        self.give_up(timeout)

    def give_up(self, timeout: float) -> None:
        """Abandons all incomplete saves, with a warning that they took longer than ``timeout`` seconds."""
        with self._lock:
            saves = dict(self._open)
        for number, save in saves.items():
            missing = sorted(save.missing - {NAME}) or [NAME]
            self.fail(number, f"{', '.join(missing)} did not arrive within {timeout:g} s")
            self._note(number, *save.missing)

    def _note(self, number: str, *names: str) -> None:
        """Records that parts are not missing any more. When no part is missing, the save is finished."""
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
        folder = Path(save.marker.folder)
        replace(save.manifest, shards=save.shards).write(folder)
        for hidden in save.hidden.values():
            if hidden.parent != folder:
                files.share(folder, [*save.shards, NAME], hidden.parent)
        with self._lock:
            if save.state is State.FAILED:  # it was abandoned meanwhile
                return
            in_use = {hidden.parent for other in self._open.values() for hidden in other.hidden.values()}
            older = {path: set(save_folders(path)) - in_use for path in save.hidden}
            for path in older:
                os.replace(save.hidden[path], path)
                save.hidden[path].unlink(missing_ok=True)  # still there if both were names of one file
                del save.hidden[path]
            save.state = State.COMPLETE
            for link, path in save.links.items():
                _link(path, link)
            self._completed = max(self._completed, save.request)
        try:
            for path, folders in older.items():
                files.sync_folder(path.parent)
                _remove_folders(path, folders)
            self._remove_replaced()
        finally:
            with self._lock:
                del self._open[save.marker.save]

    def _remove_replaced(self) -> None:
        with self._lock:
            due = [path for path, (request, _) in self._removals.items() if request <= self._completed]
            removals = [(path, self._removals.pop(path)[1], save_folders(path)) for path in due]
        for path, remove_file, folders in removals:
            remove_file()
            _remove_folders(path, folders)


def _link(path: Path, link: Path) -> None:
    try:
        files.link(path, link)
    except OSError as error:
        rank_zero_warn(f"{link} could not be made a link to {path.name}: {error}")


def _remove_folders(path: Path, folders: Iterable[Path]) -> None:
    """Removes folders of a ``.ckpt`` file's saves, and their parent folder if it is empty then."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder_of(path).rmdir()


def _warn(name: str, reason: str) -> None:
    rank_zero_warn(
        f"The checkpoint {name} is not complete: {reason}. Training goes on, and older checkpoints are kept."
    )
