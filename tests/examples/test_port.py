"""The same script under DDP and under HALoS: two lines differ."""

from __future__ import annotations

import difflib
import re

import pytest

from tests.examples.conftest import EXAMPLES, Example
from tests.integration.toys import assert_same_model

RECIPES = EXAMPLES.parent / "docs" / "recipes.md"


def changed(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith(("+", "-")) and not line.startswith(("+++", "---"))]


def test_two_lines_differ() -> None:
    before, after = ((EXAMPLES / "port" / f"train_{name}.py").read_text().splitlines() for name in ("ddp", "halos"))
    changes = changed(list(difflib.unified_diff(before, after, lineterm="")))
    assert changes == ["+import lightning_halos", '-        strategy="ddp",', '+        strategy="halos",']

    (shown,) = re.findall(r"```diff\n(.*?)```", RECIPES.read_text(), flags=re.DOTALL)
    assert changed(shown.splitlines()) == changes


@pytest.mark.parametrize("strategy", ["ddp", "halos"])
def test_both_train(example: Example, strategy: str) -> None:
    results = example(f"port/train_{strategy}.py", "--max-epochs=4")
    assert_same_model(results)
    for result in results:
        assert result["tested"]["test_acc"] > 0.85
