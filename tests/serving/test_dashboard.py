"""The page shows the state of a run to a browser, and nobody can change the run or the page through it."""

import http.client
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_halos.serving.dashboard import Dashboard, amount, page, span

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


def ask(dashboard: Dashboard, path: str, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", dashboard.port, timeout=10)
    connection.request(method, path)
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


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_it(dashboard: Dashboard, tmp_path: Path) -> None:
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    address = f"http://127.0.0.1:{dashboard.port}/"
    command = [str(CHROMIUM), *options, address]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "<title>runs/pile - lightning-halos</title>" in shown
    assert "203.0.113.7:51234</td>" in shown


def test_numbers_read_well() -> None:
    assert [amount(size) for size in (0, 999, 1000, 1.5e6, 2e15)] == ["0 B", "999 B", "1 kB", "1.5 MB", "2e+03 TB"]
    assert [span(seconds) for seconds in (0.4, 119, 121, 7300, 200000)] == ["0 s", "119 s", "2 min", "2 h", "2 d"]
