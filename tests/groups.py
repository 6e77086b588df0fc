"""Process groups of processes that a test has started, each of which leads a group.

A process's number is soon given to another one, because tests start hundreds a minute. As long as a group has
processes, nobody else gets its number. So if the process has ended and one has its number, that is somebody else's.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path


def is_left(pid: int) -> bool:
    """Whether the group of a process that has ended still has processes."""
    if Path(f"/proc/{pid}").exists():
        return False
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def kill_group(pid: int, has_ended: bool) -> None:
    """Kills a process and its group, or what is left of the group.

    Args:
        pid: Its process id.
        has_ended: Whether it is known to have ended, so that its number is free.
    """
    if not has_ended or is_left(pid):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
