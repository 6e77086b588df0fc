"""The page shows the state of a run to a browser, and nobody can change the run or the page through it."""

import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_halos.serving import dashboard as dashboard_module
from lightning_halos.serving.dashboard import Dashboard, page
from tests.serving.conftest import until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NOW = time.time()
STATUS: dict[str, Any] = {
    "version": "1.2.3",
    "time": NOW,
    "started": NOW - 9000,
    "directory": "runs/pile",
    "run": {
        "state": "running",
        "global_step": 12345,
        "total": 197520,
        "epoch": 1,
        "epochs": 3,
        "max_steps": 20000,
        "workers": 16,
        "version": 333,
        "decider": "us-east",
    },
    "rates": {"local_steps": 32, "global_steps": 2.0, "updates": 1, "bytes_sent": 12e6, "bytes_received": 13e6},
    "members": {
        "us-east": {
            "state": "active",
            "workers": 8,
            "steps": 50000,
            "updates": 120,
            "staleness": 1.25,
            "address": "203.0.113.7:51234",
            "connected": NOW - 100,
            "silence": 0.4,
            "bytes_sent": 1e9,
            "bytes_received": 2e9,
        },
        "<b>eu</b>": {"state": "lost", "workers": 8, "steps": 40000, "updates": 100, "staleness": 2},
    },
    "snapshot": {"time": NOW - 3, "seconds": 0.3, "bytes": 1.2e9},
    "events": [[NOW, "The job of eu failed: <script>document.title = 'taken'</script>"]],
}


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    dashboard = Dashboard("127.0.0.1", 0, lambda: STATUS, lambda: json.dumps(STATUS))
    yield dashboard
    dashboard.close()


def ask(dashboard: Dashboard, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", dashboard.port, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_page_and_the_json_show_the_run(dashboard: Dashboard) -> None:
    status, text = ask(dashboard, "/")
    assert status == 200
    for part in ("12,345 of 20,000", "1 of 3", "us-east", "203.0.113.7:51234", "1.2 GB", "13 MB/s"):
        assert part in text
    assert ask(dashboard, "/status.json") == (200, json.dumps(STATUS))
    assert ask(dashboard, "/", "HEAD") == (200, "")


def test_it_can_only_be_read(dashboard: Dashboard) -> None:
    assert ask(dashboard, "/", "POST")[0] == 501
    assert ask(dashboard, "/../etc/passwd")[0] == 404


@pytest.mark.parametrize("host", ["localhost:8080", "LOCALHOST", "127.0.0.1", "[::1]:8080", "192.0.2.7:1", "[::1]"])
def test_it_is_shown_where_it_was_asked_for_by_an_address(dashboard: Dashboard, host: str) -> None:
    assert ask(dashboard, "/", Host=host)[0] == 200


@pytest.mark.parametrize("host", ["evil.example.org", "evil.example.org:8080", "127.0.0.1.evil.example.org", "", ":80"])
@pytest.mark.parametrize("path", ["/", "/status.json"])
def test_a_page_of_somebody_else_cannot_read_it_by_a_name_that_points_here(
    dashboard: Dashboard, path: str, host: str
) -> None:
    status, text = ask(dashboard, path, Host=host)
    assert status == 421
    assert "us-east" not in text


def test_nobody_can_embed_the_page_or_run_a_script_in_it(dashboard: Dashboard) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", dashboard.port, timeout=10)
    connection.request("GET", "/")
    policy = connection.getresponse().headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "script" not in policy


def test_requests_that_never_end_cost_a_limited_number_of_threads(dashboard: Dashboard) -> None:
    before = set(threading.enumerate())
    silent = [socket.create_connection(("127.0.0.1", dashboard.port), timeout=10) for _ in range(50)]
    refused = [one for one in silent[20:] if one.recv(1) == b""]  # those that found all places taken
    assert len(refused) == 30
    assert len(set(threading.enumerate()) - before) <= 16
    for one in silent:
        one.close()
    until(lambda: not set(threading.enumerate()) - before)
    assert ask(dashboard, "/")[0] == 200


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False


def test_a_request_has_one_time_limit_however_its_bytes_trickle(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard_module, "_LIMIT", 0.5)
    slow = socket.create_connection(("127.0.0.1", dashboard.port), timeout=0.02)
    slow.sendall(b"GET / HTTP/1.0\r\n")
    deadline = time.monotonic() + 10
    with contextlib.suppress(ConnectionError):
        while not is_closed(slow):
            assert time.monotonic() < deadline
            slow.sendall(b"x")  # of a header that never ends
    slow.close()


def test_a_reader_that_takes_nothing_has_the_same_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard_module, "_LIMIT", 0.5)
    before, much = set(threading.enumerate()), "x" * 10**7  # more than the kernel takes
    dashboard = Dashboard("127.0.0.1", 0, lambda: STATUS, lambda: much)
    slow = socket.create_connection(("127.0.0.1", dashboard.port), timeout=10)
    slow.sendall(b"GET /status.json HTTP/1.0\r\nHost: localhost\r\n\r\n")
    with contextlib.suppress(ConnectionError):
        slow.recv(1)  # the request was accepted
    until(lambda: len(set(threading.enumerate()) - before) == 1)  # the thread that listens
    slow.close()
    dashboard.close()


def test_an_error_is_logged_and_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    dashboard = Dashboard("127.0.0.1", 0, lambda: {"secret": 1}, lambda: "{}")
    with pytest.raises((http.client.HTTPException, OSError)):
        ask(dashboard, "/")
    assert ask(dashboard, "/status.json") == (200, "{}")
    dashboard.close()
    assert "The dashboard could not answer 127.0.0.1." in caplog.text


def test_a_port_that_is_taken_is_an_error_at_once(dashboard: Dashboard) -> None:
    with pytest.raises(OSError, match="in use"):
        Dashboard("127.0.0.1", dashboard.port, dict, str)


def test_what_members_say_is_text() -> None:
    text = page(STATUS)
    assert "<script>" not in text
    assert "<b>eu</b>" not in text
    assert "&lt;b&gt;eu&lt;/b&gt;" in text


def test_a_run_that_has_not_begun_has_a_page() -> None:
    run = {**STATUS["run"], "state": "waiting", "max_steps": None, "epochs": None, "workers": None, "decider": None}
    text = page({**STATUS, "run": run, "members": {}, "snapshot": None, "events": []})
    assert "waiting" in text
    assert "none yet" in text
    assert "No region has joined yet." in text


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_it(dashboard: Dashboard, tmp_path: Path) -> None:
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    address = f"http://127.0.0.1:{dashboard.port}/"
    command = [str(CHROMIUM), *options, address]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "<title>runs/pile - lightning-halos</title>" in shown
    assert "203.0.113.7:51234</td>" in shown
