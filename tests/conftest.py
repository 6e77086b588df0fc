import gc
import os
import signal
from collections.abc import Iterator

import pytest
import torch

# Tests run beside each other, and start processes that do. Threads of one computation would wait for each other by
# spinning while those of another have the cores: a small model's step then takes ten times as long.
torch.set_num_threads(1)

# A background job of a shell ignores Ctrl-C, and so would the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Exempts what the imports have made from garbage collections, which take half a second otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_environment_stays() -> Iterator[None]:
    """Removes what ``seed_everything`` and Lightning's launchers leave in the environment of later tests.

    A later test would use the same port, which another one may have by then.
    """
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
