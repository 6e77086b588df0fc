"""Settings that name what they leave to defaults."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_halos import AsyncLocalSGDStrategy, HalosStrategy
from lightning_halos.core.algorithms import AsyncLocalSGD, Halos
from lightning_halos.planning.settings import arguments_of, make_arguments, name_defaults, read_settings
from lightning_halos.yaml_files import load_yaml


def named(settings: dict[str, Any]) -> dict[str, Any]:
    algorithm = Halos(**make_arguments(Halos, settings))
    return name_defaults(settings, algorithm, arguments_of(HalosStrategy))


def test_all_arguments_of_the_algorithm_are_named_as_yaml() -> None:
    settings = named({"wire": {"between": "int4"}, "servers_per_region": (2, 1), "timeout": 60})
    assert yaml.safe_load(yaml.safe_dump(settings)) == {
        "local_steps": 8,
        "dynamic_local_steps": True,
        "defaults": "run",
        "merge_weight": None,
        "max_norm_ratio": None,
        "overlap": False,
        "wire": {"within": "float32", "between": "int4"},
        "accumulate_updates": None,
        "servers_per_region": [2, 1],
        "local_optimizer": None,
        "global_optimizer": None,
        "timeout": 60,
    }
    HalosStrategy(**settings)


def test_what_changes_an_update_is_named_inside_optimizers() -> None:
    """And not how it is computed, which the user's device and version of torch decide."""
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1, "fused": True}}
    arguments = named({"local_optimizer": optimizer})["local_optimizer"]["init_args"]
    assert arguments.keys() == {"lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "fused"}
    assert (arguments["lr"], arguments["weight_decay"], arguments["fused"]) == (0.1, 0.01, True)
    assert named(yaml.safe_load(yaml.safe_dump(named({"local_optimizer": optimizer}))))["local_steps"] == 8


def test_a_strategy_of_the_users_own_keeps_the_functions_that_are_its_defaults() -> None:
    class Mine(AsyncLocalSGDStrategy):
        def __init__(self, local_steps: int = 3) -> None:
            super().__init__(local_steps, optimizer=partial(torch.optim.SGD, lr=0.1))

    algorithm = Mine().algorithm
    assert isinstance(algorithm, AsyncLocalSGD)
    assert name_defaults({}, algorithm, arguments_of(Mine)) == {"local_steps": 3}
    assert "optimizer" not in name_defaults({}, algorithm, arguments_of(AsyncLocalSGDStrategy))


def test_a_key_that_is_there_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"(?s)here is not YAML: the key lr is there twice.*line 3, column 1"):
        load_yaml("lr: 1\nmomentum: 0\nlr: 2", "here")
    merged = "base: &base {lr: 1, momentum: 0}\nown: {<<: *base, lr: 2}"  # a default that is replaced
    assert load_yaml(merged, "here")["own"] == {"lr": 2, "momentum": 0}


def test_numbers_may_have_an_exponent_without_a_dot(tmp_path: Path) -> None:
    """As LightningCLI reads them; PyYAML by itself makes a text of 1e-1."""
    path = tmp_path / "settings.yaml"
    path.write_text(
        "{merge_weight: 1e-1, local_optimizer: {class_path: torch.optim.SGD, init_args: {lr: 2E-1, momentum: 0.5e0}}}"
    )
    settings = read_settings(path)
    assert settings.algorithm.merge_weight == 0.1
    assert settings.arguments["local_optimizer"]["init_args"] == {"lr": 0.2, "momentum": 0.5}
    assert {text: load_yaml(text, "here") for text in ("-.5E+1", "1_0e1", "1.e3", "e3", "1e", "0x1e3", "1e3m")} == {
        "-.5E+1": -5.0,
        "1_0e1": 100.0,
        "1.e3": 1000.0,
        "e3": "e3",
        "1e": "1e",
        "0x1e3": 0x1E3,
        "1e3m": "1e3m",
    }
