"""``lightning-halos status`` asks a server over its port, with a region's key."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_halos.cli import main
from lightning_halos.core.messages import Refusal, StatusReply, StatusRequest
from lightning_halos.serving.dashboard import page
from lightning_halos.transport import dialer
from lightning_halos.transport.address import Address
from lightning_halos.transport.certificates import make_authority, make_region, read_keys
from lightning_halos.transport.listener import Listener
from lightning_halos.transport.session import Session
from tests.serving.conftest import until
from tests.serving.region import Region
from tests.serving.test_report import EXPECTED, status
from tests.test_commands import SLOW, imported

Ask = Callable[..., tuple[int, str, str]]


class Server:
    """A server that knows one answer, and one name that it refuses."""

    def __init__(self, folder: Path) -> None:
        self.answer = json.dumps(status())
        self.asked: list[str] = []
        self._sessions: list[Session] = []
        self._listener = Listener(
            Address("127.0.0.1", 0), read_keys(folder / "server.pem"), lambda _: None, self._serve
        )
        self._listener.start()
        self.address = f"127.0.0.1:{self._listener.port}"

    def _serve(self, session: Session) -> None:
        def answer(message: object, _: object) -> None:
            assert isinstance(message, StatusRequest)
            self.asked.append(session.name)
            is_refused = session.name == "refused"
            session.control.post(Refusal("it is so") if is_refused else StatusReply(self.answer))
            threading.Thread(target=session.close, args=(10.0,), daemon=True).start()

        self._sessions.append(session)
        session.control.start(answer, lambda _: None)

    def close(self) -> None:
        self._listener.close()
        for session in self._sessions:
            session.abort()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    make_authority(folder, ["localhost"])
    make_authority(folder / "other", ["localhost"])
    for name in ("us", "refused"):
        make_region(folder, name)
    make_region(folder / "other", "us")
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    yield server
    server.close()


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    def ask(*arguments: object) -> tuple[int, str, str]:
        code = main(["status", *map(str, arguments)])
        return code, *capsys.readouterr()

    return ask


def test_prints_a_table_or_all_values(ask: Ask, server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask("--server", server.address, "--keys", folder / "us.pem") == (0, EXPECTED, "")
    monkeypatch.setenv("HALOS_SERVER", server.address)
    monkeypatch.setenv("HALOS_KEYS", str(folder / "us.pem"))
    code, out, _ = ask("--json")
    assert (code, out.count("\n")) == (0, 1)
    assert json.loads(out) == status()
    assert server.asked == ["us", "us"]


def test_the_keys_may_be_in_the_home_folder(
    ask: Ask, server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert ask("--server", server.address, "--keys=~/us.pem")[0] == 0
    monkeypatch.setenv("HALOS_KEYS", "~/us.pem")
    assert ask("--server", server.address)[0] == 0


def test_imports_no_torch(server: Server, folder: Path) -> None:
    program = ["-m", "lightning_halos.cli"]
    packages = imported(program, "status", "--server", server.address, "--keys", folder / "us.pem")
    assert server.asked == ["us"]
    assert "lightning_halos" in packages
    assert not packages & SLOW


def test_the_state_of_a_run_of_very_many_workers_is_long(ask: Ask, server: Server, folder: Path) -> None:
    server.answer = json.dumps({**status(), "counters": "x" * 2**22})
    code, out, _ = ask("--server", server.address, "--keys", folder / "us.pem", "--json")
    assert (code, json.loads(out)) == (0, json.loads(server.answer))


def test_watches_also_while_the_server_is_away(ask: Ask, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = [Server(folder)]
    pauses: list[float] = []
    sleep = time.sleep

    def pause(seconds: float) -> None:
        if seconds != 7.5:
            return sleep(seconds)
        pauses.append(seconds)
        if len(pauses) == 1:
            servers[0].close()
        if len(pauses) == 2:
            raise KeyboardInterrupt
        return None

    monkeypatch.setattr(time, "sleep", pause)
    monkeypatch.setattr(dialer, "_FIRST_PAUSE", 100.0)  # so that it tries once each time, and may take long
    where = ["--server", servers[0].address, "--keys", folder / "us.pem", "--timeout", 30]
    code, out, err = ask(*where, "--json", "--watch", 7.5)
    assert code == 0
    assert json.loads(out) == status()
    assert "could not be reached" in err
    assert len(pauses) == 2


def test_says_what_is_wrong_in_one_line(
    ask: Ask, server: Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HALOS_SERVER", "HALOS_KEYS"):
        monkeypatch.delenv(variable, raising=False)
    where, keys = ["--server", server.address], ["--keys", folder / "us.pem"]
    closed = Server(folder)
    closed.close()
    for arguments, expected in (
        (keys, "--server is missing, and the environment variable HALOS_SERVER is not set"),
        (where, "--keys is missing, and the environment variable HALOS_KEYS is not set"),
        (["--server", "localhost", *keys], "has no port"),
        ([*where, "--keys", tmp_path / "no.pem"], "no.pem"),
        ([*where, "--keys", folder / "server.pem"], "is the global server's; a region needs a file of its own"),
        ([*where, "--keys", folder / "other" / "us.pem"], "is not from the authority in"),
        ([*where, "--keys", folder / "refused.pem"], "refused: it is so"),
        (["--server", closed.address, *keys, "--timeout", 1], closed.address),
        ([*where, *keys, "--watch", -1], "--watch=-1.0 must be a positive number of seconds"),
        ([*where, *keys, "--timeout", 0], "--timeout=0.0 must be a positive number of seconds"),
    ):
        code, out, err = ask(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), (arguments, err)
        assert expected in err
    assert server.asked == ["refused"]


def test_shows_a_run_that_waits_works_and_has_lost_a_member(
    ask: Ask, serve: Callable[..., Any], region: Callable[..., Region], keys: Path
) -> None:
    server = serve(workers=1, liveness=60)
    where = ["--server", f"127.0.0.1:{server.port}", "--keys", keys / "ap.pem"]
    assert "No region has joined yet." in ask(*where)[1]
    us, eu = region("us", server), region("eu", server)
    us.enter()
    eu.enter()
    us.work()
    us.answer()
    eu.cut()
    until(lambda: server.status()["members"]["eu"]["state"] == "disconnected")
    code, out, err = ask(*where)
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith(("us ", "eu "))}
    assert rows["us"][:3] == ["active", "1", "4"]
    assert rows["eu"][:3] == ["disconnected", "1", "0"]
    assert "running, global step 4 of 40, epoch 0 of 1" in out
    assert "us decides" in out
    assert "The connection of eu (127.0.0.1:" in out
    shown = page(server.status())
    assert '<tr class="disconnected"><td>eu</td>' in shown
    assert "4 of 40" in shown
