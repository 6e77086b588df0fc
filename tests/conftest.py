import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_seed_stays() -> Iterator[None]:
    """Removes the environment variables of ``seed_everything``, which processes of later tests would use."""
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)
