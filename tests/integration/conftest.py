from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.integration.harness import LIMIT, Result, Scenario, lightning_environments, run_workers

pytest.register_assert_rewrite("tests.integration.toys")


class Run(Protocol):
    """See :func:`run`."""

    def __call__(
        self,
        scenario: Scenario,
        *args: Any,
        workers: int = 4,
        environments: list[dict[str, str]] | None = None,
        timeout: float = LIMIT,
    ) -> list[Result]: ...


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a scenario in worker processes, in ``tmp_path``. Returns what it returned there, by rank."""
    return lambda scenario, *args, workers=4, environments=None, timeout=LIMIT: run_workers(
        scenario,
        *args,
        folder=tmp_path,
        environments=environments or lightning_environments(workers),
        timeout=timeout,
    )
