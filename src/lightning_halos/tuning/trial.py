"""One trial: it trains in a simulated cluster, in a process of its own, and reports each validation to the search.

The process is forked from one that has imported everything. What happens to it, an error or a lack of memory, changes
nothing in the search.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.multiprocessing.spawn import ProcessRaisedException

from lightning_halos.core.layout import Layout
from lightning_halos.core.vector import ModelVector
from lightning_halos.transport.address import unused_port
from lightning_halos.tuning.goal import Point
from lightning_halos.tuning.make import Make, call

VALIDATIONS = 12
"""Validations of a trial, about."""
_PAUSE = 1.0  # seconds between two looks whether a process has ended
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Job:
    """What a trial trains.

    Attributes:
        make: The user's function.
        strategy: Makes the strategy for the cluster, with the trial's settings.
        steps: Global steps.
        every: Global steps between validations.
        monitor: The metric to report.
        trainer: Further arguments of the Trainer.
        seed: Of the module and the data.
    """

    make: Make
    strategy: Callable[[], Any]
    steps: int
    every: int
    monitor: str
    trainer: Mapping[str, Any]
    seed: int


@dataclass
class Report:
    """What a trial has reported last: a validation, its end, or a failure.

    Attributes:
        point: The validation; it waits for an answer.
        error: Why it failed.
        is_users: Whether the failure is one of the user's input, which all other trials would have, too.
        model: The layout of the model's vector, and the bytes of an element; only from :func:`measure`.
    """

    point: Point | None = None
    error: str | None = None
    is_users: bool = False
    model: tuple[Layout, int] | None = None


@dataclass
class Process:
    """A trial's process and its end of the connection. All processes that it starts are in its group.

    Attributes:
        process: The process.
        connection: To it.
        folder: Its temporary files.
        log: What it prints.
        started: When, by ``time.monotonic``.
    """

    process: ForkProcess
    connection: Connection
    folder: Path
    log: Path
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, function: Callable[[Connection], None], log: Path) -> Process:
        """Starts a process that calls ``function`` with its end of the connection.

        Args:
            function: What it does.
            log: The file for what it prints.
        """
        here, there = _FORK.Pipe()
        folder = Path(tempfile.mkdtemp(prefix="halos-tune-"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python, that other threads do not exist there
            process = _FORK.Process(target=_begin, args=(function, there, here, log, folder), daemon=False)
            process.start()
        there.close()
        return cls(process, here, folder, log)

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended.

        Its sentinel and the connection do not say so while processes live on that it has started, which have both.
        """
        return not self.process.is_alive()

    def receive(self) -> Report | None:
        """Waits for a report. Returns it, or ``None`` if the process has ended without another one."""
        has_ended = self.has_ended  # asked before each look at the connection, because what it has sent counts
        while not self.connection.poll(0 if has_ended else _PAUSE):
            if has_ended:
                return None
            has_ended = self.has_ended
        try:
            report: Report = self.connection.recv()
        except (EOFError, OSError):
            return None
        return report

    def answer(self, goes_on: bool) -> None:
        """Tells the trial, which has reported a validation, whether to go on."""
        with suppress(OSError):
            self.connection.send(goes_on)

    def end(self, seconds: float) -> None:
        """Ends all its processes: it gets some time to end them by itself."""
        self.process.join(seconds)
        group = self.process.pid
        assert group is not None
        with suppress(ProcessLookupError, PermissionError):
            if not (self.has_ended and Path(f"/proc/{group}").exists()):  # or another process has its number now
                os.killpg(group, signal.SIGKILL)
        self.process.kill()  # if it has not made its group yet
        self.process.join()
        self.connection.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def describe_end(self) -> str:
        """Says how the process has ended without a report."""
        self.process.join(10)
        code = self.process.exitcode
        if code is not None and code < 0:
            reason = " (out of memory?)" if code == -signal.SIGKILL else ""
            return f"its process was ended by {signal.Signals(-code).name}{reason}"
        return f"its process ended with exit code {code}"


def _begin(
    function: Callable[[Connection], None], connection: Connection, other: Connection, log: Path, folder: Path
) -> None:
    """The start of a forked process."""
    os.setsid()  # so that Ctrl-C reaches the search alone, which ends its trials
    other.close()
    file = log.open("w", buffering=1)  # for the rest of this process
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    tempfile.tempdir = str(folder)
    torch.set_num_threads(1)
    try:
        function(connection)
    except BaseException as error:
        traceback.print_exc()
        with suppress(OSError):
            connection.send(Report(error=_last_line(error)))


def _last_line(error: BaseException) -> str:
    """Returns what an error says, without the traceback of another process in it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, ProcessRaisedException) and lines:
        return lines[-1]
    return f"{type(error).__name__}: {' '.join(lines)}".removesuffix(": ")


def measure(make: Make) -> Callable[[Connection], None]:
    """Returns a function for a process that calls the user's function and reports what of its model is sent."""

    def function(connection: Connection) -> None:
        module = call(make).module
        if next(module.parameters(), None) is None:
            module.configure_model()
        vector = ModelVector(module)
        connection.send(Report(model=(vector.layout, vector.dtype.itemsize)))

    return function


def train(job: Job) -> Callable[[Connection], None]:
    """Returns a function for a process that trains, reports each validation, and waits for the answer."""

    def function(connection: Connection) -> None:
        warnings.filterwarnings("ignore")
        for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        torch.set_flush_denormal(True)  # the time of a step must not depend on the values that it computes
        os.environ["MASTER_PORT"] = str(unused_port())  # its own, even if all of them inherit one
        pl.seed_everything(job.seed, verbose=False)
        arguments = dict(job.trainer)
        callbacks = list(arguments.pop("callbacks", None) or [])
        trainer = pl.Trainer(
            **{
                "accelerator": "cpu",
                "devices": 1,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
                **arguments,
            },
            strategy=job.strategy(),
            max_steps=job.steps,
            val_check_interval=job.every,
            check_val_every_n_epoch=None,
            callbacks=[*callbacks, _Reporter(connection, job.monitor)],
        )
        made = call(job.make)
        trainer.fit(made.module, **made.data)
        connection.send(Report())

    return function


class _Reporter(Callback):
    """Reports the metric of the global model after each validation, and ends the fit if it is told so."""

    def __init__(self, connection: Connection, monitor: str) -> None:
        self._connection = connection
        self._monitor = monitor
        self._is_over = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.enable_validation:
            self._refuse(
                "There is no validation. The module needs a validation_step, and there must be validation data."
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or self._is_over or not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        if self._monitor not in metrics:
            self._refuse(
                f"The module logs no {self._monitor!r}, which the search is to monitor. It logs"
                f" {', '.join(sorted(metrics)) or 'nothing'}."
            )
        strategy: Any = trainer.strategy
        point = Point(trainer.global_step, strategy.model_seconds, float(metrics[self._monitor]))
        try:
            self._connection.send(Report(point=point))
            goes_on = self._connection.recv()
        except (EOFError, OSError):
            goes_on = False  # the search has ended
        if not goes_on:
            self._is_over = trainer.should_stop = True

    def _refuse(self, message: str) -> None:
        self._connection.send(Report(error=message, is_users=True))
        raise ValueError(message)


def fitting(steps: int) -> tuple[int, int]:
    """Returns the number of steps, or slightly fewer, and a period of validations, the last of which is at the end."""
    if steps < 2 * VALIDATIONS:
        return steps, 1
    periods = range(max(1, steps // (VALIDATIONS + 4)), steps // (VALIDATIONS - 3) + 1)
    every = min(periods, key=lambda period: (steps % period, abs(steps / period - VALIDATIONS)))
    return steps - steps % every, every


def is_diverged(point: Point) -> bool:
    """Whether a validation shows that the model has diverged."""
    return not math.isfinite(point.value)
