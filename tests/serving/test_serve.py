"""``lightning-halos serve`` as a process: it goes on from its directory, however it ended."""

from __future__ import annotations

import http.client
import math
import os
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from lightning_halos import cli
from lightning_halos.core.messages import GlobalModel, Refusal
from lightning_halos.serving.storage import RunDirectory
from lightning_halos.transport.certificates import make_region
from lightning_halos.transport.errors import PeerLostError
from tests.integration.harness import free_port
from tests.serving.region import DESCRIPTION, STEPS, Region
from tests.star import roles
from tests.star.processes import Process, Starter, starting, wait_until

LIMIT = 60.0
KILLS, ROUNDS_BETWEEN = 5, 20
STEPS_IN_ALL = 5 * KILLS * ROUNDS_BETWEEN * STEPS


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[Starter]:
    with starting(tmp_path) as starter:
        yield starter


def start(starter: Starter, keys: Path, port: int, *options: str) -> Process:
    directory = str(starter.folder / "run")
    where = ("--listen", f"127.0.0.1:{port}", "--keys", str(keys / "server.pem"), "--directory", directory)
    return starter.start(roles.serve, *where, *options, name="server")


def falter(chance: random.Random, is_early: Callable[[], bool]) -> None:
    """Loses the connection now and then, with a lease or an answer on the way. Waits while it is too early for more."""
    wait_until(lambda: not is_early(), LIMIT)
    if chance.random() < 0.02:
        raise PeerLostError


def test_a_name_is_not_revoked_in_a_directory_that_does_not_exist(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mistyped = tmp_path / "rum"
    assert cli.main(["serve", "--directory", str(mistyped), "--revoke", "us"]) != 0
    assert f"--directory {mistyped} does not exist. Give the directory of the run's server" in capsys.readouterr().err
    assert not mistyped.exists()
    mistyped.mkdir()
    assert cli.main(["serve", "--directory", str(mistyped), "--revoke", "us"]) == 0
    assert cli.main(["serve", "--directory", str(mistyped), "--revoke", "us east"]) == 2
    assert "--revoke 'us east' cannot be the name of a region" in capsys.readouterr().err


def test_a_note_says_that_a_revoked_name_is_none_of_the_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def revoke(name: str) -> str:
        assert cli.main(["serve", "--directory", str(tmp_path), "--revoke", name]) == 0
        return capsys.readouterr().out

    assert "Note" not in revoke("eu")  # nobody has come yet
    directory = RunDirectory(tmp_path)
    directory.save_founding({"workers": 2, "regions": [{"name": "us", "first": 0, "workers": 2}]})
    directory.save({}, {"members": ["asia"], "global_step": 3})
    directory.close()
    assert f"Note: the run in {tmp_path} has had no such region yet, but asia, us." in revoke("eu")
    assert "Note" not in revoke("us")
    assert "Note" not in revoke("asia")


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_server_killed_at_any_moment_goes_on_and_applies_each_update_once(
    starter: Starter, keys: Path, seed: int
) -> None:
    chance, port = random.Random(seed), free_port()
    description = replace(DESCRIPTION, max_steps=STEPS_IN_ALL, steps_per_epoch=2 * STEPS_IN_ALL)
    regions = [Region(port, keys / f"{name}.pem", description=description) for name in ("us", "eu")]

    def rounds() -> int:
        return sum(region.rounds for region in regions)

    most = 0.0  # rounds until the next strike, so that the run does not end before the last one
    for index, region in enumerate(regions):
        region.falter = partial(falter, random.Random(f"{seed} {index}"), lambda: rounds() > most)
    finals: list[GlobalModel] = []
    threads = [threading.Thread(target=lambda one=one: finals.append(one.train()), daemon=True) for one in regions]
    options = ("--min-regions", "2", "--workers", "1")
    server = start(starter, keys, port, *options)
    for thread in threads:
        thread.start()
    for _ in range(KILLS):
        next_strike = rounds() + ROUNDS_BETWEEN
        most = next_strike + 2 * ROUNDS_BETWEEN
        wait_until(lambda: rounds() > next_strike, LIMIT, starter.logs)  # noqa: B023
        time.sleep(chance.uniform(0, 0.1))
        os.kill(server.pid, chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        assert server.wait(LIMIT) in (-signal.SIGKILL, 143), starter.logs()
        server = start(starter, keys, port, *options)
    most = math.inf
    for thread in threads:
        thread.join(LIMIT)
    assert len(finals) == 2, starter.logs()
    assert server.wait(LIMIT) == 0, starter.logs()
    checkpoint = torch.load(starter.folder / "run" / "final.ckpt", weights_only=True)
    updates = rounds()
    assert checkpoint["global_step"] == STEPS_IN_ALL
    assert updates * STEPS >= STEPS_IN_ALL
    assert torch.equal(checkpoint["state_dict"]["layer.bias"], torch.full((4,), float(updates)))
    for final in finals:
        assert final.vector is not None
        assert torch.equal(final.vector[:16], torch.full((16,), float(updates)))
    assert starter.log("server").count("goes on from global step") == KILLS


def test_the_command(starter: Starter, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its page, its lock, a revoked region, and its end."""
    port = free_port()
    directory = starter.folder / "run"
    make_region(keys, "tmp", replace=True)
    server = start(starter, keys, port, "--dashboard", "127.0.0.1:0", "--snapshot-every", "8")
    wait_until(lambda: "dashboard" in starter.log("server"), LIMIT, starter.logs)
    us = Region(port, keys / "us.pem")
    us.enter()
    us.work()
    us.answer()
    page = int(re.findall(r"http://127.0.0.1:(\d+)/", starter.log("server"))[0])
    connection = http.client.HTTPConnection("127.0.0.1", page, timeout=20)
    connection.request("GET", "/")
    assert b"us" in connection.getresponse().read()

    # Another server does not get the directory.
    arguments = ["serve", "--keys", str(keys / "server.pem"), "--directory", str(directory)]
    assert cli.main(arguments) == 2
    assert "in use by another server (process" in capsys.readouterr().err

    assert cli.main(["serve", "--directory", str(directory), "--revoke", "us"]) == 0
    assert "revoked" in us.expect(Refusal).reason
    us.cut()
    os.kill(server.pid, signal.SIGINT)
    assert server.wait(LIMIT) == 130, starter.logs()
    assert "The server ends because of SIGINT." in starter.log("server")
    assert "Traceback" not in starter.log("server")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "give the server's keys with --keys"),
        (
            ["--keys", "missing.pem"],
            "--keys missing.pem cannot be read: No such file or directory. It has to be a file",
        ),
        (
            ["--keys", "."],
            "--keys . cannot be read: Is a directory. It has to be a file that `lightning-halos keys init`",
        ),
        (["--keys", "missing.pem", "--snapshot-every", "9"], "--snapshot-every 9 must be at most 8"),
        (["--keys", "missing.pem", "--min-regions", "0"], "--min-regions 0 must be at least 1"),
        (["--keys", "missing.pem", "--liveness", "1"], "--liveness 1 must be at least 5"),
        (["--keys", "missing.pem", "--timeout", "nan"], "--timeout nan must be"),
        (["--keys", "missing.pem", "--listen", "29600"], "--listen '29600' has no port. Write HOST:PORT"),
        (["--keys", "missing.pem", "--dashboard", "8080"], "--dashboard '8080' has no port. Write HOST:PORT"),
        (["--keys", "missing.pem", "--dashboard", "nowhere.invalid:0"], "Cannot show --dashboard nowhere.invalid:0: "),
        (["--keys", "missing.pem", "--decider", "us east"], "--decider 'us east' cannot be the name of a region"),
    ],
)
def test_a_wrong_argument_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    assert cli.main(["serve", "--directory", str(tmp_path / "run"), *options]) == 2
    assert reason in capsys.readouterr().err


def test_a_host_without_an_address_is_named(keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["serve", "--keys", str(keys / "server.pem"), "--directory", str(tmp_path / "run")]
    assert cli.main([*arguments, "--listen", "nowhere.invalid:29600"]) == 2
    error = capsys.readouterr().err
    assert "Cannot listen at nowhere.invalid:29600: " in error
    assert "Give an address of this machine, or :29600 for all of them." in error


def test_a_page_at_a_port_in_use_is_an_error_before_a_region_is_let_in(
    keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["serve", "--keys", str(keys / "server.pem"), "--directory", str(tmp_path / "run")]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        page = f"127.0.0.1:{taken.getsockname()[1]}"
        assert cli.main([*arguments, "--listen", "127.0.0.1:0", "--dashboard", page]) == 2
    assert f"Cannot show --dashboard {page}: Address already in use" in capsys.readouterr().err
    assert "The server listens" not in caplog.text


def test_a_file_in_place_of_the_directory_is_called_that(
    keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").touch()
    for directory in (tmp_path / "run", tmp_path / "run" / "pile"):
        assert cli.main(["serve", "--keys", str(keys / "server.pem"), "--directory", str(directory)]) == 2
        assert f"the directory {directory} cannot be made, because a file is in its place" in capsys.readouterr().err
