"""The names whose certificates the server refuses. Certificates themselves are in ``certificates``."""

from __future__ import annotations

import os
import time
from datetime import datetime, timezone
from pathlib import Path

from lightning_halos.transport.certificates import Certificate, check_name
from lightning_halos.transport.errors import CertificateRefusedError

REVOKED = "revoked"
"""Name of the list in the directory of a run."""

_TIME = "%Y-%m-%dT%H:%M:%SZ"
_FOREVER = datetime.max.replace(tzinfo=timezone.utc)
_NEVER = datetime.min.replace(tzinfo=timezone.utc)
_RESOLUTION_NS = 2_000_000_000
_SHOWN = 100  # characters of a line


class Revocations:
    """The names whose certificates are refused: a text file that may be changed at any time.

    A line is ``NAME TIME``, which refuses the certificates of that name that were issued up to that time, or ``NAME``,
    which refuses all of them. ``#`` starts a comment.

    Args:
        path: The file. It need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._read_as: tuple[int, int, int] | None = None
        self._until: dict[str, datetime] = {}
        self._fault = ""

    def add(self, name: str, until: datetime | None = None) -> None:
        """Refuses a name's certificates that were issued up to a time (default: now). A later one is accepted."""
        check_name(name)
        line = f"{name} {(until or datetime.now(timezone.utc)).astimezone(timezone.utc).strftime(_TIME)}\n"
        with self.path.open("a+", encoding="utf-8") as file:
            file.seek(0)
            text = file.read()
            file.write(line if not text or text.endswith("\n") else "\n" + line)
            file.flush()
            os.fsync(file.fileno())

    def check(self, certificate: Certificate) -> None:
        """Does nothing if the certificate is not revoked.

        Raises:
            CertificateRefusedError: If it is revoked.
            OSError: If the file cannot be read, or a line of it is not understood, so that nobody knows.
        """
        self._read_changes()
        until = self._until.get(certificate.name)
        if until is None or certificate.start > until:
            self._raise_fault()
            return
        what = f"the certificate of {certificate.name} (number {certificate.serial}) is revoked: {self.path} has "
        if until == _FOREVER:
            raise CertificateRefusedError(f"{what}its name. Remove that line there, or use another name.")
        raise CertificateRefusedError(
            f"{what}those issued up to {until:{_TIME}}, and this is from {certificate.start:{_TIME}}. Make a new one "
            f"where the authority is: lightning-halos keys region FOLDER {certificate.name} --replace"
        )

    def read(self) -> None:
        """Reads the file if it has changed.

        Raises:
            OSError: If it cannot be read, or a line of it is not understood.
        """
        self._read_changes()
        self._raise_fault()

    def _raise_fault(self) -> None:
        if self._fault:
            raise OSError(self._fault)

    def _read_changes(self) -> None:
        try:
            found = self.path.stat()
        except FileNotFoundError:
            self._read_as, self._until, self._fault = None, {}, ""
            return
        read_as = (found.st_mtime_ns, found.st_size, found.st_ino)
        if read_as == self._read_as:
            return
        until, fault = _read(self.path)
        # A change within the resolution of the file's time would not be seen: it is read again until it is older.
        is_settled = time.time_ns() - found.st_mtime_ns > _RESOLUTION_NS
        self._until, self._fault = until, fault  # before another thread believes that it is read
        self._read_as = read_as if is_settled else None


def _read(path: Path) -> tuple[dict[str, datetime], str]:
    """Returns the names with their times, for one without a time the end of time, and what is wrong with the file."""
    until: dict[str, datetime] = {}
    fault = ""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        return {}, f"{path} is not a text in UTF-8. Save it as one."
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            name, text = words if len(words) == 2 else (*words, "")
            check_name(name)
            end = datetime.strptime(text, _TIME).replace(tzinfo=timezone.utc) if text else _FOREVER
        except ValueError:
            fault = fault or (
                f"{path}, line {number}, is {line.strip()[:_SHOWN]!r}. It must be a region's name, or its name and a"
                " time, like 'us-east 2026-11-27T14:51:05Z'."
            )
        else:
            until[name] = max(end, until.get(name, _NEVER))
    return until, fault
