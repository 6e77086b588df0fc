from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_group_stays() -> Iterator[None]:
    """Destroys the test's process groups here: in a process that a later test forks, that would be fatal."""
    yield
    gc.collect()
