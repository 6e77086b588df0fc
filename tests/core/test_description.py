"""What a run may be at all: every number of the first member that joins has its limits."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from lightning_halos.core.description import MOST_WORKERS, check
from lightning_halos.core.messages import RunDescription
from tests.core.star import SHARED, Star

RATES = {"lr": 1.0, "momentum": 0.0, "delay": 1, "activation": 0.0}


def with_setting(**settings: Any) -> dict[str, Any]:
    return {"settings": {**SHARED.settings, **settings}}


def with_rate(**rates: Any) -> dict[str, Any]:
    return {"global_optimizer": {**RATES, **rates}}


TOO_MUCH: list[tuple[dict[str, Any], str]] = [
    (with_setting(local_steps=10**9), "local_steps 1000000000: must be a number from 1 to 1000000"),
    (with_setting(local_steps=0), "local_steps 0: must be"),
    (with_setting(local_steps=True), "local_steps True: must be"),
    (with_setting(local_steps=4.0), "local_steps 4.0: must be an integer"),
    (with_setting(has_momentum=1), "has_momentum 1: must be True or False"),
    (with_setting(updates_per_worker=10**30), "updates_per_worker 1000000000000000000000000000000: must be"),
    (with_setting(local_lr=math.nan), "local_lr nan: must be"),
    ({"settings": {**SHARED.settings, **{str(number): 1 for number in range(1000)}}}, "1002 settings: must be at most"),
    (with_rate(lr=1e9), r"global_optimizer: lr 1000000000.0: must be a number from 0 to 1000.0"),
    (with_rate(lr=math.inf), "global_optimizer: lr inf: must be"),
    (with_rate(lr=-1.0), "global_optimizer: lr -1.0: must be"),
    (with_rate(momentum=1.0), r"global_optimizer: momentum must be a number in \[0, 1\), got 1.0"),
    (with_rate(momentum=math.nan), "global_optimizer: momentum nan: must be"),
    (with_rate(delay=10**9), "global_optimizer: delay 1000000000: must be a number from 0 to 100000"),
    (with_rate(delay=1.5), "global_optimizer: delay 1.5: must be an integer"),
    (with_rate(delay=math.nan), "global_optimizer: delay nan: must be an integer"),
    (with_rate(activation=2.0), "global_optimizer: activation 2.0: must be"),
    (with_rate(nesterov=1.0), "global_optimizer: 'nesterov' is no argument"),
    ({"steps_per_epoch": 2**60}, f"steps_per_epoch {2**60}: must be"),
    ({"epochs": 2**40}, f"max_epochs {2**40}: must be"),
    ({"steps_per_epoch": 2**40, "epochs": 2**20}, f"{2**60} local steps in {2**20} epochs: must be at most"),
    ({"max_steps": 2**62}, f"max_steps {2**62}: must be"),
    ({"shapes": [[2**62, 2**62]]}, "a tensor of shape .* elements"),
    ({"shapes": [[1] * 1000]}, "a tensor of shape .* elements"),
    ({"shapes": [[-1]]}, "a tensor of shape .* elements"),
    ({"buffers": [("mean", [2**41])]}, "a tensor of shape .* elements"),
    ({"names": ["a"] * (2**20 + 1), "shapes": [[0]] * (2**20 + 1)}, "1048577 parameters and buffers: must be at most"),
    ({"dtype": "float16"}, "dtype 'float16': must be"),
    ({"data": None}, "training data None with 40 local steps"),
]


@pytest.mark.parametrize(("fields", "message"), TOO_MUCH, ids=[message for _, message in TOO_MUCH])
def test_a_number_beyond_its_limit_is_an_error_that_names_the_value(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(dataclasses.replace(SHARED, **fields))


def test_the_largest_numbers_are_possible() -> None:
    check(
        dataclasses.replace(
            SHARED,
            **with_rate(lr=1000.0, momentum=0.99, delay=MOST_WORKERS, activation=0.0),
            **with_setting(local_steps=10**6),
            steps_per_epoch=2**40,
            epochs=2**13,
            max_steps=2**40,
            shapes=[[2**40]],
        )
    )


def test_a_job_whose_numbers_are_impossible_is_told_so_and_founds_nothing() -> None:
    star = Star()
    bad: RunDescription = dataclasses.replace(SHARED, **with_rate(lr=1e9))
    refusal = star.job("eu", description=bad).refusal
    assert refusal is not None
    assert refusal.for_good
    assert "global_optimizer: lr 1000000000.0" in refusal.reason
    assert star.top.description is None
    assert star.job("us", description=SHARED).node is not None
