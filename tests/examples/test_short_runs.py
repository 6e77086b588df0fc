"""The examples validate also in a run that is shorter than the interval between validations."""

from __future__ import annotations

import runpy
import sys
from typing import Any

import lightning as L
import pytest

from tests.examples.conftest import EXAMPLES


@pytest.mark.parametrize("script", ["train_digits.py", "finetune_lora.py", "train_char_lm.py"])
def test_a_short_run_validates_at_its_end(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def trainer(**options: Any) -> None:
        sys.exit(f"validates after {options['val_check_interval']} steps")

    monkeypatch.setattr(L, "Trainer", trainer)
    monkeypatch.setattr(sys, "argv", [script, "--strategy", "auto", "--max-steps", "6"])
    with pytest.raises(SystemExit, match="validates after 6 steps"):
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
