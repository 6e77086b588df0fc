"""Settings that name what they leave to defaults."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import yaml

from lightning_halos import AsyncLocalSGDStrategy, HalosStrategy
from lightning_halos.core.algorithms import AsyncLocalSGD, Halos
from lightning_halos.planning.settings import arguments_of, make_arguments, name_defaults


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
