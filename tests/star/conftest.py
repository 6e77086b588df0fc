from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.star.network import Network, internet
from tests.star.processes import Starter, starting

pytest.register_assert_rewrite("tests.star.evidence", "tests.star.star")


@pytest.fixture
def net() -> Iterator[Network]:
    """An internet of its own for each test."""
    with internet() as network:
        yield network


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[Starter]:
    """Starts processes, none of which outlives the test."""
    with starting(tmp_path) as starter:
        yield starter
