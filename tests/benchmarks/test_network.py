"""The race on a slow network: its rules, and what its report says of given rows. Nothing is run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _paths(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("benchmarks", "examples"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


def row(contestant: str, software: str, curve: list[tuple[int, float, float]], **changes: Any) -> dict[str, Any]:
    settings = {"software": software, "local_steps": 8, "accumulate_updates": 4, "seconds": [0.6] * 4}
    return {
        "case": "100",
        "contestant": contestant,
        "settings": settings,
        "machine": "a machine",
        "is_ended": False,
        "computed_seconds": 0.3,
        "load_average": 2.0,
        "samples": 160,
        "samples_per_second": 10.0,
        "predicted_samples_per_second": 11.0,
        "curve": curve,
        **changes,
    }


HALOS = row("HALoS", "halos", [(0, 0.0, 5.0), (8, 10.0, 4.0), (16, 20.0, 2.0)])
DDP = row("DDP", "ddp", [(0, 0.0, 5.0), (8, 100.0, 4.0)], is_ended=True)


def test_a_row_reaches_a_loss_between_two_models() -> None:
    from race.report import common_loss, time_to

    assert common_loss([HALOS, DDP]) == 4.0
    assert time_to(HALOS, 3.0) == pytest.approx(15.0)
    assert math.isnan(time_to(DDP, 3.0))


def test_the_report_says_what_is_reached_and_what_is_not() -> None:
    from race.report import tables

    text = tables([HALOS, DDP, row("torchft", "torchft", [(0, 0.0, 5.0), (16, 30.0, 2.0)])])
    assert "5 times as fast as DDP, to the lowest loss that both reach (4.00): 10.0 times, reached" in text
    assert "2 times as fast as torchft, to the lowest loss that both reach (2.00): 1.5 times, not reached" in text
    assert "8 steps, 100 s, ended" in text
    assert "within 25% of the samples/s in training in every row" in text
    assert "| 10.00 | 11.00 (+10%) | 8.00 |" in text, "160 samples until the last model, after 20 s"
    assert "too busy" not in text


def test_the_report_doubts_a_busy_machine_and_a_wrong_prediction() -> None:
    from race.report import tables

    text = tables([HALOS | {"computed_seconds": 0.9, "predicted_samples_per_second": 20.0}])
    assert "too busy to keep the devices' pace in: 100 Mbit/s, HALoS" in text
    assert "more than 25% off in: 100 Mbit/s, HALoS" in text


def test_settings_follow_from_the_link() -> None:
    from race.cases import CONTESTANTS, Case, choose, timing

    def settings(case: str, contestant: str) -> dict[str, Any]:
        where, who = Case.parse(case), CONTESTANTS[contestant]
        durations = timing(where, who, 0.6, where.mbit / 1e3)
        return choose(where, who, durations, steps=96, pace=0.6)[0]

    assert settings("500", "torchft")["local_steps"] == 8
    assert settings("100", "torchft")["local_steps"] == 16, "with 8, less than 60 % of a round is computing"
    assert settings("20", "torchft")["local_steps"] == 32, "none computes for 60 %"
    assert settings("100-slow", "ddp")["seconds"] == [0.6, 0.6, 0.6, 2.4]
    assert settings("100", "halos").items() >= {"local_steps": 4, "accumulate_updates": 4}.items()


def test_a_case_has_a_name_that_is_understood() -> None:
    from race.cases import Case

    assert [Case.parse(name).name for name in ("100", "20-slow")] == ["100", "20-slow"]
    with pytest.raises(ValueError, match="'100-fast' must be a number of Mbit/s"):
        Case.parse("100-fast")
