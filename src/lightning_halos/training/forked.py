"""Runs a function in a forked process that can change nothing that this process uses. What it reads is in ``sketches``.

A forked process shares more than its memory's content: the positions in open files, connections, and shared memory with
the locks in it. A dataset may use all of them, so the forked process gives them up before the function starts. If that
fails, the function does not run. A lock that another thread held at the fork stays locked there, which the limit ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import os
import select
import signal
import stat
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_PR_SET_DUMPABLE = 4  # of Linux's <sys/prctl.h>
_PROT_READ = 1  # of <sys/mman.h>
_CHANGES = ("os.", "shutil.", "subprocess.", "tempfile.", "sqlite3.")
_READS = ("os.listdir", "os.scandir", "os.fwalk", "os.walk", "os.getxattr", "os.listxattr")


def in_forked_process(function: Callable[[], str], seconds: float) -> bytes:
    """Returns what a function returns in a forked process, or less if it fails, takes too long, or is not on Linux.

    The function reads the files that this process has open at positions of its own. It cannot write them or any other
    file by Python's own functions, start processes, or use this process's connections or writable shared memory.
    """
    if sys.platform != "linux":
        return b""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python, that other threads do not exist there
        process = os.fork()
    if process == 0:
        try:
            gc.disable()  # objects that this process has given up may do something when they are deleted
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _share_nothing(writer)
            torch.set_num_threads(1)
            with os.fdopen(writer, "w") as file:
                file.write(function())
        finally:
            os._exit(0)
    os.close(writer)
    deadline, received = time.monotonic() + seconds, b""
    try:
        while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
            if not (part := os.read(reader, 2**16)):
                break
            received += part
    finally:
        os.close(reader)
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    return received


def _share_nothing(writer: int) -> None:
    sys.stdin = sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the rest of this process
    nowhere = os.open(os.devnull, os.O_WRONLY)  # takes what is written, and cannot be read
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor not in (writer, nowhere):
            _give_up(descriptor, nowhere)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):  # a write to shared memory ends the process, without a core dump
        raise OSError(ctypes.get_errno(), "prctl")
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, mode, *_ = line.split()
        if "w" in mode and "s" in mode:
            start, stop = (int(address, 16) for address in span.split("-"))
            if libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _PROT_READ):
                raise OSError(ctypes.get_errno(), "mprotect")
    sys.addaudithook(_refuse_changes)


def _give_up(descriptor: int, nowhere: int) -> None:
    """Replaces a descriptor by one of its own at the same position, or by one that leads nowhere."""
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:
        return  # was that of the list
    with contextlib.suppress(OSError):  # a file that may not be opened again leads nowhere
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        if (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) and flags & os.O_ACCMODE != os.O_WRONLY:
            position = os.lseek(descriptor, 0, os.SEEK_CUR)
            own = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
            os.lseek(own, position, os.SEEK_SET)
            os.dup2(own, descriptor)
            os.close(own)
            return
    os.dup2(nowhere, descriptor)


def _refuse_changes(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: a process that ends in the middle would leave half a file, or a lock."""
    if event == "open":
        path, _, flags = arguments
        is_change = not isinstance(path, int) and flags & (os.O_ACCMODE | os.O_CREAT | os.O_TRUNC)
    else:
        is_change = event.startswith(_CHANGES) and event not in _READS
    if is_change:
        raise PermissionError(f"{event} is not allowed in a process that only compares samples")
