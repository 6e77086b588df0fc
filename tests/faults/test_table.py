"""The command that makes the tables of ``docs/faults.md`` goes on where it was, and writes nothing half done."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults import table
from tests.faults.cases import CASES, Case
from tests.faults.star_cases import StarCase

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"


def test_outcomes_are_kept_and_a_page_is_written_when_all_are_as_documented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    broken = str(CASES[5])

    def run(case: Case | StarCase) -> str:
        ran.append(str(case))
        return table.BROKEN if str(case) == broken else f"outcome of {case}"

    monkeypatch.setattr(table, "run", run)
    page, results = Path(shutil.copy(PAGE, tmp_path)), tmp_path / "results.json"
    command = [str(page), "job", "--results", str(results)]
    assert table.main(command) == 1
    assert page.read_text() == PAGE.read_text()
    assert ran == list(map(str, CASES))
    ran.clear()
    broken = ""
    assert table.main(command) == 0
    assert ran == [str(CASES[5])]
    assert all(f"| outcome of {case} |" in page.read_text() for case in CASES)
    before, after = PAGE.read_text().splitlines(), page.read_text().splitlines()
    assert len(before) == len(after)
    assert sum(old != new for old, new in zip(before, after, strict=True)) == len(CASES) / 3
