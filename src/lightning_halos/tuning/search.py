"""The search: it keeps a number of trials running until its time is over, and reports what it has found.

All decisions about settings are the study's, and all training is in the trials' processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from optuna.trial import Trial
from tqdm.auto import tqdm

from lightning_halos.planning.settings import make_arguments
from lightning_halos.simulation.cluster import SimulatedCluster
from lightning_halos.tuning.goal import Goal, Point
from lightning_halos.tuning.make import Make
from lightning_halos.tuning.report import describe_settings
from lightning_halos.tuning.space import Settings, Space
from lightning_halos.tuning.study import Outcome, Study
from lightning_halos.tuning.trial import Job, Process, Report, fitting, is_diverged, train

_GRACE = 20.0  # seconds in which a trial that is told to stop ends its fit
_FAILURES = 3  # of the first trials, all of them: the user's module is wrong, not the settings


class TuningError(ValueError):
    """A search that cannot go on."""


@dataclass
class _Running:
    """A trial that is running."""

    trial: Trial
    settings: Settings
    process: Process
    curve: list[Point] = field(default_factory=list)
    outcome: Outcome | None = None  # once it was told to stop
    stopped: float = 0.0  # when


class Search:
    """Runs trials.

    Args:
        study: The study.
        space: The search space.
        goal: What counts.
        make: The user's function.
        strategy: The strategy's class.
        cluster: The cluster.
        trainer: Arguments of the trials' Trainers.
        folder: The folder for logs.
        jobs: Trials side by side.
        seed: Of the module and the data.
    """

    def __init__(
        self,
        study: Study,
        space: Space,
        goal: Goal,
        make: Make,
        strategy: Callable[..., Any],
        cluster: SimulatedCluster,
        trainer: Mapping[str, Any],
        folder: Path,
        jobs: int,
        seed: int,
    ) -> None:
        self._study, self._space, self._goal = study, space, goal
        self._make, self._strategy, self._cluster = make, strategy, cluster
        self._trainer, self._folder, self._jobs, self._seed = trainer, folder, jobs, seed
        self._running: list[_Running] = []
        complete = [trial for trial in study.results() if trial.value is not None]
        self._durations = [trial.seconds for trial in complete]
        self._best = min((trial.value for trial in complete if trial.value is not None), default=None)
        self._failed, self._ended = 0, 0
        self._exhausted = -1  # trials that had ended when there was nothing left to try

    def run(self, seconds: float, trials: int | None, shows_progress: bool) -> bool:
        """Searches for a time, until a number of trials has been trained, or until nothing is left to try.

        Args:
            seconds: Wall-clock seconds.
            trials: Number of trials; ``None`` for no limit.
            shows_progress: Whether to show a progress bar and a line for each trial.

        Returns:
            Whether it ended by itself; ``False`` after Ctrl-C.

        Raises:
            TuningError: If all trials fail.
        """
        begin = time.monotonic()
        end = begin + seconds
        bar = _Bar(
            total=round(seconds), unit="s", disable=not shows_progress, bar_format="{l_bar}{bar}| {elapsed}{postfix}"
        )
        self._bar = bar
        started = 0
        try:
            while True:
                now = time.monotonic()
                bar.update(min(round(seconds), int(now - begin)) - bar.n)
                if now >= end:
                    return True
                while len(self._running) < self._jobs and (trials is None or started < trials) and self._has_time(end):
                    if not self._start():
                        break
                    started += 1
                if not self._running:
                    return True
                self._wait(min(1.0, max(0.0, end - now)))
        except KeyboardInterrupt:
            return False
        finally:
            self._end_all()
            bar.close()

    def _has_time(self, end: float) -> bool:
        """Whether a complete trial takes no longer than what is left, as far as that is known."""
        left = end - time.monotonic()
        return left > 0 and (not self._durations or left >= sorted(self._durations)[len(self._durations) // 2])

    def _start(self) -> bool:
        """Starts a trial. Returns whether there was one to start, as far as the trials that have ended say."""
        if self._ended == self._exhausted:
            return False
        if (asked := self._study.ask()) is None:
            self._exhausted = self._ended
            return False
        trial, settings = asked
        algorithm = self._space.algorithm(settings)
        steps, every = fitting(self._space.steps(settings, self._goal.seconds))
        arguments = {**settings, **make_arguments(type(algorithm), settings)}

        def strategy() -> Any:
            return self._strategy(simulate=self._cluster, **arguments)

        job = Job(self._make, strategy, steps, every, self._goal.monitor, self._trainer, self._seed)
        process = Process.start(train(job), self._folder / f"trial-{trial.number}.log")
        self._running.append(_Running(trial, settings, process))
        return True

    def _wait(self, seconds: float) -> None:
        """Waits for reports, and acts on them."""
        ends = [
            end for running in self._running for end in (running.process.connection, running.process.process.sentinel)
        ]
        wait(ends, seconds)
        for running in list(self._running):
            process = running.process
            if process.has_ended or process.connection.poll():
                self._act(running, process.receive() or Report(error=process.describe_end()))
        for running in list(self._running):
            if running.outcome is not None and time.monotonic() > running.stopped + _GRACE:
                self._finish(running, running.outcome, grace=0.0)

    def _act(self, running: _Running, report: Report) -> None:
        if report.point is not None:
            self._judge(running, report.point)
        elif report.error is None or running.outcome is not None:
            self._finish(running, running.outcome or "complete")
        else:
            self._finish(running, "failed", report.error)
            self._failed += 1
            if report.is_users:
                raise TuningError(report.error)
            if self._failed == self._ended == _FAILURES:
                raise TuningError(
                    f"All of the first {_FAILURES} trials failed. The last one: {report.error}. See"
                    f" {running.process.log}."
                )

    def _judge(self, running: _Running, point: Point) -> None:
        """Takes a validation, and lets the trial go on or stop."""
        running.curve.append(point)
        if is_diverged(point):
            running.outcome = "diverged"
        elif self._goal.is_reached(running.curve):
            running.outcome = "complete"
        elif not self._study.goes_on(running.trial, running.curve):
            running.outcome = "pruned"
        running.stopped = time.monotonic()
        running.process.answer(running.outcome is None)

    def _finish(self, running: _Running, outcome: Outcome, reason: str = "", grace: float = _GRACE) -> None:
        """Ends a trial's processes and notes the outcome."""
        self._running.remove(running)
        running.process.end(grace)
        if outcome == "complete" and not running.curve:
            outcome, reason = "failed", "it ended without a validation"
        duration = time.monotonic() - running.process.started
        self._study.tell(running.trial, outcome, running.curve, duration, reason)
        if outcome == "interrupted":
            running.process.log.unlink(missing_ok=True)
            return
        self._ended += 1
        if outcome == "complete":
            self._durations.append(duration)
        if outcome != "failed":
            running.process.log.unlink(missing_ok=True)
        self._tell(running, outcome, reason)

    def _tell(self, running: _Running, outcome: Outcome, reason: str) -> None:
        """Shows a line about a trial that has ended."""
        shown: str = outcome
        if outcome == "complete":
            value = self._goal.value(running.curve)
            shown = self._goal.describe(value)
            if self._best is None or value < self._best:
                self._best = value
                shown += " *"
        elif outcome == "pruned":
            part = running.curve[-1].seconds / self._goal.seconds
            shown = f"{running.curve[-1].value:.4g} at {part:.0%}, ended"
        elif reason:
            shown += f" ({reason[:200]}; see {running.process.log})"
        if not self._bar.disable:
            settings = describe_settings(running.settings) or "the strategy's defaults"
            self._bar.write(f"{running.trial.number:5}  {shown:22}  {settings}")
        best = "" if self._best is None else f", best {self._goal.describe(self._best)}"
        self._bar.set_postfix_str(f"{self._ended} trials{best}")

    def _end_all(self) -> None:
        for running in list(self._running):
            self._finish(running, "interrupted", grace=0.0)


class _Bar(tqdm):  # type: ignore[misc]
    """A progress bar without a thread of its own, which a forked process would lack."""

    monitor_interval = 0
