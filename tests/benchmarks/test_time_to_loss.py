"""Time to loss: what its rows say, and what its tables make of results. Nothing is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    for folder in ("benchmarks", "examples"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    import time_to_loss

    return time_to_loss


COMPLETE = {
    "halos": {"local_steps", "accumulate_updates", "merge_weight", "local_optimizer", "global_optimizer"},
    "async_local_sgd": {"local_steps", "optimizer"},
    "diloco_dynamic": {"local_steps", "outer_optimizer"},
    "diloco": {"local_steps", "outer_optimizer"},
    "sync_sgd": set(),
}


def test_no_row_depends_on_the_defaults_of_a_strategy(bench: Any) -> None:
    for settings in [*bench.ROWS.values(), *bench.SEARCH]:
        assert settings.keys() - {"algorithm"} == COMPLETE[settings["algorithm"]]
        for name in settings.keys() & bench.OPTIMIZERS.keys():
            delay = set() if name == "outer_optimizer" else {"delay"}
            assert settings[name].keys() == {"lr", "momentum"} | delay
