"""Who may talk to the server: its port, its keys, and the list of revoked names. What a peer says is read elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from lightning_halos.serving.report import EXPIRES_SOON, span
from lightning_halos.transport.address import Address
from lightning_halos.transport.certificates import Certificate, Keys, read_keys
from lightning_halos.transport.errors import CertificateRefusedError
from lightning_halos.transport.listener import Listener
from lightning_halos.transport.revocations import REVOKED, Revocations
from lightning_halos.transport.session import Session

_REMINDER = 86400.0  # seconds between two lines that the server's certificate expires soon


class Entrance:
    """Listens for peers, and lets those in whose certificates are valid and not revoked.

    Args:
        address: The address to listen on.
        keys: The file of the server's keys. It may be replaced while the server runs.
        directory: The run's directory.
        admit: Called with each authenticated peer.
        note: Called with a sentence about what an operator should know.

    Raises:
        ValueError: If the keys cannot be used.
        OSError: If the address cannot be used.
    """

    def __init__(
        self,
        address: Address,
        keys: Path,
        directory: Path,
        admit: Callable[[Session], None],
        note: Callable[[str], None],
    ) -> None:
        self._keys = keys
        self._note = note
        self._revocations = Revocations(directory / REVOKED)
        self._fault = ""  # of the list, as it was noted last
        self._changed = self._changed_at()
        self._reminded_at = -math.inf  # by `time.time`
        own = read_keys(keys)
        self._expires_at = _end_of(own)
        self._listener = Listener(address, own, self._check, admit)
        self._listener.start()
        note(f"The server listens on {', '.join(map(str, self._listener.addresses))}.")

    @property
    def port(self) -> int:
        """The port."""
        return self._listener.port

    def objection(self, certificate: Certificate) -> str | None:
        """Returns why a peer that is present must go, if its certificate has been revoked since it came."""
        try:
            self._revocations.check(certificate)
        except CertificateRefusedError as error:
            return str(error)
        except OSError:  # nobody knows; :meth:`renew` notes why
            pass
        return None

    def renew(self) -> None:
        """Uses the server's keys from now on if their file was replaced, and reminds of it before they expire.

        It also notes what is wrong with the list of revoked names.
        """
        changed = self._changed_at()
        if changed not in (self._changed, None):
            self._changed = changed
            self._replace_keys()
        self._remind(time.time())
        fault = ""
        try:
            self._revocations.read()
        except OSError as error:
            fault = str(error)
        if fault and fault != self._fault:
            self._note(f"The list of revoked names cannot be used. Members stay, and nobody else is let in: {fault}")
        self._fault = fault

    def close(self) -> None:
        """Lets nobody else in."""
        self._listener.close()

    def _check(self, certificate: Certificate) -> None:
        try:
            self._revocations.check(certificate)
        except OSError:
            raise CertificateRefusedError(
                f"the server lets nobody in until its list of revoked names, {self._revocations.path}, is put right",
                for_good=False,
            ) from None

    def _replace_keys(self) -> None:
        try:
            keys = read_keys(self._keys)
            self._listener.renew(keys)
        except (ValueError, OSError) as error:
            self._note(f"The server's keys were replaced, but the new ones are not used: {error}")
        else:
            self._expires_at, self._reminded_at = _end_of(keys), -math.inf
            self._note("The server's keys were replaced. New connections use the new ones.")

    def _remind(self, now: float) -> None:
        left = self._expires_at - now
        if left < EXPIRES_SOON and now - self._reminded_at > _REMINDER:
            self._reminded_at = now
            state = f"expires in {span(left)}" if left > 0 else "has expired, so that regions cannot connect again"
            self._note(
                f"The server's certificate {state}. Make a new one where the authority is, and copy it over"
                f" {self._keys}: lightning-halos keys server FOLDER --host HOST --replace"
            )

    def _changed_at(self) -> int | None:
        try:
            return self._keys.stat().st_mtime_ns
        except OSError:
            return None


def _end_of(keys: Keys) -> float:
    return keys.certificate.end.timestamp()
