"""``lightning-halos keys``."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_halos.cli import main
from lightning_halos.transport.certificates import make_authority, read_keys

Keys = Callable[..., tuple[int, str, str]]


@pytest.fixture
def keys(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Keys:
    monkeypatch.chdir(tmp_path)

    def keys(command: str) -> tuple[int, str, str]:
        status = main(["keys", *command.split()])
        return status, *capsys.readouterr()

    return keys


def test_the_commands_of_the_quickstart(keys: Keys) -> None:
    status, out, err = keys("init keys --host halos.example.org")
    assert (status, err) == (0, "")
    assert "keep it away from the server" in out
    assert "Now one for each region: lightning-halos keys region keys NAME" in out
    status, out, err = keys("region keys us-east")
    assert (status, err) == (0, "")
    assert re.match(
        r"keys/us-east\.pem  of us-east, until \d{4}-\d\d-\d\d: copy it there .*HALOS_KEYS=us-east\.pem", out
    )
    moved = shutil.move("keys/us-east.pem", "us-east.pem")
    assert read_keys(moved).certificate.name == "us-east"


def test_renews_on_request_only(keys: Keys) -> None:
    keys("init keys --host a.example.org")
    keys("region keys us-east --days 7")
    first = read_keys("keys/us-east.pem").certificate
    for command in ("region keys us-east", "server keys --host b.example.org", "init keys --host a.example.org"):
        status, out, err = keys(command)
        assert (status, out) == (2, "")
        assert re.match(r"lightning-halos: error: keys/\S+ exists, and is left as it is\..*\n$", err)
    assert read_keys("keys/us-east.pem").certificate == first
    assert keys("region keys us-east --days 14 --replace")[0] == 0
    assert (read_keys("keys/us-east.pem").certificate.end - first.end).days == 7
    assert keys("server keys --host b.example.org --host ::2 --replace")[0] == 0
    assert read_keys("keys/server.pem").certificate.hosts[:2] == ("b.example.org", "::2")


def test_shows_what_files_are(keys: Keys) -> None:
    make_authority("keys", ["halos.example.org"])
    keys("region keys us-east")
    status, out, _ = keys("show keys")
    assert status == 0
    assert [line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith("for ")] == [
        "making keys",
        "global server",
        "the region us-east",
    ]
    assert "hosts      halos.example.org, localhost, 127.0.0.1, ::1" in out
    assert out.count("364 days left") == 2
    assert len(set(re.findall(r"authority  ([0-9a-f]{16})", out))) == 1
    assert "PRIVATE" not in out
    assert keys("show keys/us-east.pem")[1] in out + "\n"


def test_shows_the_files_beside_one_that_cannot_be_read(keys: Keys) -> None:
    make_authority("keys", ["halos.example.org"])
    Path("keys/notes.pem").write_text("no key")
    status, out, err = keys("show keys")
    assert status == 2
    assert [line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith("file ")] == [
        "keys/authority.pem",
        "keys/server.pem",
    ]
    assert err.count("\n") == 1
    assert "keys/notes.pem" in err


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("region keys us-east", "keys/authority.pem does not exist. `lightning-halos keys init keys --host HOST`"),
        ("init keys --host https://x", "'https://x' is not the name or the address of a host"),
        ("init keys --host x --days 0", "days"),
        ("show .", "no *.pem files in ."),
        ("show nothing.pem", "nothing.pem"),
    ],
)
def test_a_mistake_is_one_line(keys: Keys, command: str, text: str) -> None:
    status, out, err = keys(command)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert text in err
