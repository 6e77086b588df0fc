"""What a job that is one region of a run refuses, before any process starts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_halos import AsyncLocalSGDStrategy, DelayedNesterov, DilocoStrategy, HalosStrategy, cli
from lightning_halos.core.algorithms import Halos
from lightning_halos.training.server_settings import find_server, numbers_of_global_optimizer

SERVER = {"server": "localhost:29600", "keys": "us.pem"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"server": "localhost:29600"}, r"server='localhost:29600' without keys: pass keys='us-east.pem', or set"),
        ({"keys": "us.pem"}, "keys='us.pem' without server: pass server='host:29600', or set HALOS_SERVER"),
        ({**SERVER, "server": "localhost"}, "server='localhost': 'localhost' has no port"),
        ({**SERVER, "server": ":29600"}, "server=':29600': ':29600' names no host to connect to"),
        ({**SERVER, "server": "localhost:0"}, "server='localhost:0': 'localhost:0' names no port to connect to"),
        ({**SERVER, "streams": 0}, "streams=0 must be a whole number of at least 1"),
        ({**SERVER, "regions": 2}, "regions=2 with server='localhost:29600' .* a job is one region there"),
        ({**SERVER, "servers_per_region": 2}, "servers_per_region=2 with server=.* Start one job per local server"),
        ({**SERVER, "simulate": "examples/clusters/paper.yaml"}, "with simulate=...: a simulation is one job"),
        (
            {**SERVER, "global_optimizer": partial(torch.optim.Adam, lr=0.1)},
            "global_optimizer makes Adam, but the global server .* only has DelayedNesterov",
        ),
    ],
)
def test_what_cannot_work_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HalosStrategy(**arguments)


@pytest.mark.parametrize("strategy", [DilocoStrategy, AsyncLocalSGDStrategy])
def test_algorithms_whose_workers_must_be_one_job_are_refused(strategy: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"they have to be one job\. Use HalosStrategy, or leave the server out"):
        strategy(**SERVER)


def test_the_environment_says_where_the_server_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALOS_SERVER", "[::1]:29600")
    monkeypatch.setenv("HALOS_KEYS", "us.pem")
    found = find_server(None, None, 4)
    assert found is not None
    assert (found.server, found.keys) == ("[::1]:29600", Path("us.pem"))
    found = find_server("localhost:29601", "eu.pem", 8)
    assert found is not None
    assert (found.server, found.keys, found.streams) == ("localhost:29601", Path("eu.pem"), 8)
    found = find_server("localhost:29601", "~/eu.pem", 8)
    assert found is not None
    assert found.keys == Path.home() / "eu.pem"
    with pytest.raises(ValueError, match="unset HALOS_SERVER"):
        DilocoStrategy()


def test_a_job_does_not_train_alone_because_the_variable_of_the_server_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HALOS_SERVER", raising=False)
    monkeypatch.setenv("HALOS_KEYS", "us.pem")
    with pytest.raises(ValueError, match=r"HALOS_KEYS='us\.pem' without server: .* or set HALOS_SERVER"):
        HalosStrategy()


def test_keys_are_checked_when_the_trainer_is_made(tmp_path: Path) -> None:
    assert cli.main(["keys", "init", str(tmp_path), "--host", "localhost"]) == 0
    for keys, message in (("none.pem", "cannot be read: No such file"), ("server.pem", "are those of the server")):
        strategy = HalosStrategy(server="localhost:29600", keys=tmp_path / keys)
        with pytest.raises(ValueError, match=message):
            L.Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False, enable_checkpointing=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--server", ":29600"], "--server ':29600' names no host to connect to. Write HOST:PORT"),
        (["--server", "localhost:0"], "--server 'localhost:0' names no port to connect to"),
        (["--server", "localhost"], "--server 'localhost' has no port"),
        (["--keys", "none.pem"], "--keys none.pem cannot be read: No such file or directory. It has to be a file that"),
        (["--keys", "."], "--keys . cannot be read: Is a directory"),
        (["--watch", "inf"], "--watch=inf must be a positive number of seconds, of at most 315360000 (ten years)"),
        (["--watch", "1e30"], "--watch=1e+30 must be"),
        (["--timeout", "nan"], "--timeout=nan must be"),
    ],
    ids=" ".join,
)
def test_status_names_an_argument_that_is_wrong(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["status", "--server", "localhost:29600", "--keys", "us.pem", *options]) == 2
    assert message in capsys.readouterr().err


def test_the_server_gets_the_numbers_of_a_global_optimizer() -> None:
    assert numbers_of_global_optimizer(Halos()) is None
    nesterov = Halos(global_optimizer=lambda params: DelayedNesterov(params, lr=0.5, momentum=0.2, delay=3))
    assert numbers_of_global_optimizer(nesterov) == {"lr": 0.5, "momentum": 0.2, "delay": 3, "activation": 0.0}
    plain = Halos(global_optimizer=partial(torch.optim.SGD, lr=0.5))
    assert numbers_of_global_optimizer(plain) == {"lr": 0.5, "momentum": 0.0, "delay": 1, "activation": 0.0}
