"""After any fault in any process at any moment, the run ends or goes on as documented, and resumes without a loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import star_cases
from tests.faults.cases import CASES, COVERING, Case
from tests.faults.outcomes import observe
from tests.faults.star_cases import StarCase
from tests.star.network import missing


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=str(case), marks=() if case in COVERING else pytest.mark.slow) for case in CASES],
)
def test_case(tmp_path: Path, case: Case) -> None:
    observe(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=str(case)) for case in star_cases.CASES])
def test_case_in_a_star_of_jobs(tmp_path: Path, case: StarCase) -> None:
    """``test_soak`` has a short form of all of it."""
    if case.needs_network and missing():
        pytest.skip(missing())
    star_cases.observe(case, tmp_path)
