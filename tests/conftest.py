import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_seed_stays() -> Iterator[None]:
    """Forgets what ``seed_everything`` leaves in the environment, where the processes of later tests would find it."""
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)
