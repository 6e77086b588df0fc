import gc
import os
from collections.abc import Iterator

import pytest
import torch

# Tests run beside each other, and start processes that do. Threads of one computation would wait for each other by
# spinning while those of another have the cores: a small model's step then takes ten times as long.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Exempts what the imports have made from garbage collections, which take half a second otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_seed_stays() -> Iterator[None]:
    """Removes the environment variables of ``seed_everything``, which processes of later tests would use."""
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)
