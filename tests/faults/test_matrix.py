"""After any fault in any process at any moment, the run ends or goes on as documented, and resumes without a loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.cases import CASES, COVERING, Case
from tests.faults.outcomes import observe


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=str(case), marks=() if case in COVERING else pytest.mark.slow) for case in CASES],
)
def test_case(tmp_path: Path, case: Case) -> None:
    observe(case, tmp_path)
