"""The server's own keys, while it runs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lightning_halos.serving import entrance as entrance_module
from lightning_halos.serving.entrance import Entrance
from lightning_halos.transport.address import Address
from lightning_halos.transport.certificates import make_authority, make_region, make_server
from lightning_halos.transport.dialer import dial
from lightning_halos.transport.session import Session
from tests.serving.conftest import until


def test_reminds_of_keys_that_expire_soon_once_a_day_until_they_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_authority(tmp_path, ["localhost"], days=20)
    notes: list[str] = []
    keys = tmp_path / "server.pem"
    entrance = Entrance(Address("127.0.0.1", 0), keys, tmp_path, lambda session: None, notes.append)
    now = [time.time()]
    monkeypatch.setattr(entrance_module.time, "time", lambda: now[0])
    try:
        for hours in (0, 1, 20, 4, 23, 2, 24 * 19):
            now[0] += 3600 * hours
            entrance.renew()
        reminders = [note for note in notes if "certificate" in note]
        assert [note.partition(".")[0] for note in reminders] == [
            "The server's certificate expires in 20 d",
            "The server's certificate expires in 19 d",
            "The server's certificate expires in 18 d",
            "The server's certificate has expired, so that regions cannot connect again",
        ]
        assert f"copy it over {keys}: lightning-halos keys server FOLDER --host HOST --replace" in reminders[0]
        now[0] -= 3600 * 24 * 21
        make_server(tmp_path, ["localhost"], replace=True)
        entrance.renew()
        entrance.renew()
        assert notes[-1] == "The server's keys were replaced. New connections use the new ones."
        keys.write_text("nothing")
        entrance.renew()
        assert "the new ones are not used" in notes[-1]
    finally:
        entrance.close()


def test_says_once_which_line_of_the_revoked_names_is_wrong_also_if_nobody_is_connected(tmp_path: Path) -> None:
    make_authority(tmp_path, ["localhost"])
    revoked = tmp_path / "revoked"
    revoked.write_text("us-east\nus,eu\n")
    notes: list[str] = []
    entrance = Entrance(Address("127.0.0.1", 0), tmp_path / "server.pem", tmp_path, lambda session: None, notes.append)
    try:
        for text in ("us-east\nus,eu\n", "us-east\n", "eu us\n"):
            revoked.write_text(text)
            entrance.renew()
            entrance.renew()
        found = [note for note in notes if "revoked" in note]
        assert [note.partition("line ")[2][:13] for note in found] == ["2, is 'us,eu'", "1, is 'eu us'"]
    finally:
        entrance.close()


def test_new_connections_see_the_new_keys_of_both_sides(tmp_path: Path) -> None:
    make_authority(tmp_path, ["localhost"], days=20)
    make_region(tmp_path, "us", days=20)
    sessions: list[Session] = []
    entrance = Entrance(Address("127.0.0.1", 0), tmp_path / "server.pem", tmp_path, sessions.append, lambda note: None)

    def days_left() -> list[int]:
        own = dial(Address("localhost", entrance.port), tmp_path / "us.pem", streams=0, timeout=20)
        until(lambda: sessions)
        both = [own, sessions.pop()]
        for session in both:
            session.abort()
        return [(session.certificate.end - session.certificate.start).days for session in both]

    try:
        assert days_left() == [20, 20]
        make_server(tmp_path, ["localhost"], days=30, replace=True)
        make_region(tmp_path, "us", days=40, replace=True)
        entrance.renew()
        assert days_left() == [30, 40]
    finally:
        entrance.close()
