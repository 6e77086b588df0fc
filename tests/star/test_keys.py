"""A run whose operator watches it, revokes a region, and lets it in again with a new key."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_halos import cli
from tests.integration.harness import free_port
from tests.star.processes import Starter, wait_until
from tests.star.roles import Task
from tests.star.star import Star
from tests.star.test_members import LIMIT, SLOW, batches


def secrets(folder: Path) -> Iterator[str]:
    """Lines of all private keys."""
    for path in folder.glob("*.pem"):
        yield from path.read_text().partition("-----END PRIVATE KEY-----")[0].splitlines()[1:]


def test_a_revoked_region_is_out_at_once_and_comes_back_with_a_new_key(
    starter: Starter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    star = Star(starter, tmp_path / "star", Task(epochs=3, samples=1536, pause=SLOW), ["localhost"], ["us", "eu"])
    port, page = free_port(), free_port()
    server = star.server("--min-regions", "2", "--dashboard", f"127.0.0.1:{page}", listen=f"127.0.0.1:{port}")
    us, eu = jobs = [star.job(name, f"localhost:{port}") for name in star.regions]
    for party in (server, us, eu):
        party.start()
    wait_until(lambda: batches(star, "us") > 20 and batches(star, "eu") > 20, LIMIT, starter.logs)
    before = list(secrets(star.keys))

    def status() -> dict[str, Any]:
        capsys.readouterr()
        where = ["--server", f"localhost:{port}", "--keys", str(star.keys / "us.pem")]
        assert cli.main(["status", *where, "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    assert {name: member["state"] for name, member in status()["members"].items()} == {"us": "active", "eu": "active"}
    assert cli.main(["serve", "--directory", str(star.directory), "--revoke", "eu"]) == 0
    wait_until(eu.has_ended, LIMIT, starter.logs)
    assert 0 not in eu.codes()
    assert "is revoked" in starter.log("eu-0")
    assert "keys region FOLDER eu --replace" in starter.log("eu-0")
    assert status()["members"]["eu"]["state"] == "lost"

    eu.start()  # with the same key
    wait_until(eu.has_ended, LIMIT, starter.logs)
    assert 0 not in eu.codes()
    assert status()["members"]["eu"]["state"] == "lost"

    assert cli.main(["keys", "region", str(star.keys), "eu", "--replace"]) == 0
    eu.start()
    wait_until(lambda: status()["members"]["eu"]["state"] == "active", LIMIT, starter.logs)
    connection = http.client.HTTPConnection("127.0.0.1", page, timeout=LIMIT)
    connection.request("GET", "/")
    shown = connection.getresponse().read().decode()
    assert "<td>eu</td><td>active</td>" in shown

    star.hurry()
    evidence = star.wait(server, jobs, LIMIT)
    evidence.assert_same_model([worker for job in jobs for worker in job.workers])
    written = starter.logs(last=10**9) + shown + capsys.readouterr().out
    assert not [line for line in [*before, *secrets(star.keys)] if line in written]
