"""Killing what is left of a process never kills another process that has got its number."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from tests.groups import is_left, kill_group

SLEEPING = [sys.executable, "-c", "import time; time.sleep(60)"]
LEAVING = [sys.executable, "-c", f"import subprocess; print(subprocess.Popen({SLEEPING}, stdout=-3).pid)"]
LIMIT = 60


def test_what_a_process_left_is_killed() -> None:
    process = subprocess.Popen(LEAVING, start_new_session=True, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.stdout.close()
    assert process.wait(LIMIT) == 0
    assert os.getpgid(child) == process.pid
    assert is_left(process.pid)
    kill_group(process.pid, has_ended=True)
    deadline = time.monotonic() + LIMIT
    while is_left(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_process_that_runs_is_killed() -> None:
    process = subprocess.Popen(SLEEPING, start_new_session=True)
    kill_group(process.pid, has_ended=False)
    assert process.wait(LIMIT) == -9


def test_another_process_with_the_number_is_not_killed() -> None:
    """This one stands for it, since nobody can choose a number."""
    other = subprocess.Popen(SLEEPING, start_new_session=True)
    assert not is_left(other.pid)
    kill_group(other.pid, has_ended=True)
    assert other.poll() is None
    kill_group(other.pid, has_ended=False)
    assert other.wait(LIMIT) == -9
