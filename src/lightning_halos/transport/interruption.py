"""Lets the main thread wait for a blocking function, and handle signals meanwhile."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")


def interruptible(run: Callable[[], T], interrupted: Callable[[], None], timeout: float = math.inf) -> T:
    """Runs a blocking function in another thread, so that the main thread can still handle Ctrl-C and SIGTERM.

    Args:
        run: The function.
        interrupted: Called several times a second while waiting; may raise.
        timeout: Limit in seconds. Default: none, for functions that have a limit of their own.

    Raises:
        TimeoutError: If it takes longer.
    """
    outcome: Future[T] = Future()

    def target() -> None:
        try:
            outcome.set_result(run())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=target, name="halos collective", daemon=True).start()
    deadline = time.monotonic() + timeout
    while not wait([outcome], 0.2).done:
        interrupted()
        if time.monotonic() > deadline:
            raise TimeoutError
    return outcome.result()
