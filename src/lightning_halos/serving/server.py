"""The global server's process: it listens, keeps the clock, and ends when the run is done or nobody works on it.

A member is lost when nothing at all came from it for ``liveness`` seconds. The run goes on until its work is done, an
operator ends the process, or for longer than ``timeout`` fewer than ``min_regions`` members have been present, or
nothing could be written to the disk. The last three cost nothing but time: the snapshot in the run's directory is what
the next process goes on from. Members wait for a server that an operator has ended, and not for one that has given up.
"""

from __future__ import annotations

import logging
import secrets
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_halos.core.founding import Founding
from lightning_halos.core.open_global_node import OpenGlobalNode
from lightning_halos.core.protocol import GlobalState
from lightning_halos.serving.final_model import checkpoint_of
from lightning_halos.serving.host import Node, RunHost
from lightning_halos.serving.snapshots import SnapshotWriter
from lightning_halos.serving.status import Reporter
from lightning_halos.serving.storage import RunDirectory
from lightning_halos.transport.certificates import Certificate, check_name

log = logging.getLogger(__name__)

FINISHED, ABANDONED = 0, 1
"""Exit codes of a run that is done, and of one that the server has given up. After a signal: 128 + signal."""

_TICK = 0.25  # seconds between two looks at the clock
_LONGEST_TICK = 5.0  # seconds of them that count
_RETRY = 10.0  # seconds after a final model that could not be written
_HEAR = 10.0  # seconds in which members must hear that the server gives up
_LEAST_LIVENESS = 5.0  # seconds; a connection shows a sign of life each second, and may be slow for a few


@dataclass(frozen=True)
class Rules:
    """What an operator decides about a run.

    Attributes:
        min_regions: Members that the run waits for at its start, and needs to go on.
        workers: Workers that a global step is divided by. Default: those of the members that the run begins with.
        snapshot_every: Updates between two snapshots.
        timeout: Seconds that fewer than ``min_regions`` members may be present, once the run has begun; that the disk
            may be full; and that the server waits for goodbyes when the run is finished.
        liveness: Seconds of silence after which a member is lost.
        patience: Seconds that the others wait, at least, for a member that is connected and does not do its part.
        decider: Name of the region that decides about validation and checkpoints while it is present. Default: the one
            that has been a member for longest.

    Raises:
        ValueError: If a value is invalid.
    """

    min_regions: int = 1
    workers: int | None = None
    snapshot_every: int = 1
    timeout: float = 3600.0
    liveness: float = 30.0
    patience: float = 1800.0
    decider: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("min_regions", 1), ("workers", 1), ("snapshot_every", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {least}.")
        if self.snapshot_every > MOST_UPDATES:
            raise ValueError(
                f"--snapshot-every {self.snapshot_every} must be at most {MOST_UPDATES}, because members keep each"
                " update until a snapshot has it."
            )
        if not self.liveness >= _LEAST_LIVENESS:
            raise ValueError(
                f"--liveness {self.liveness:g} must be at least {_LEAST_LIVENESS:g} seconds, because a slow connection"
                " may be silent for a few."
            )
        if self.decider is not None:
            try:
                check_name(self.decider)
            except ValueError as error:
                raise ValueError(f"--decider {error}") from None
        for name in ("timeout", "patience"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} {getattr(self, name):g} must be a positive number of seconds.")


MOST_UPDATES = 8
"""Largest number of updates between two snapshots."""


class RunServer:
    """Runs the global server in this process.

    Args:
        directory: The run's directory. If it has a snapshot, the run goes on from there.
        rules: What the operator decides.

    Attributes:
        host: The host of the run's node.
        reporter: Describes the run.

    Raises:
        CheckpointError: If the directory's snapshots cannot be used.
    """

    def __init__(self, directory: RunDirectory, rules: Rules) -> None:
        self._directory = directory
        self._rules = rules
        self._signal: int | None = None
        self._few_since: float | None = None
        self._finished_since: float | None = None
        self._stays_until = 0.0  # if the run was finished before this process started
        self._is_written = False  # the final model
        self._retry_at = 0.0  # when to write it again
        self._ticked = time.monotonic()
        self._seconds = 0.0  # that count for the members
        self._unwritten_since: float | None = None  # when it could not be written for the first time
        state = directory.load()
        node: Node
        if state is None:
            run, founding = secrets.token_hex(16), directory.load_founding()
            node = Founding(run, rules.min_regions, rules.workers, rules.decider, rules.patience, founding)
        else:
            node = OpenGlobalNode.restored(state, rules.decider, rules.patience)
        self.host = RunHost(node, rules.liveness, lambda: self.reporter.text())
        self._snapshots = SnapshotWriter(self.host, directory, rules.snapshot_every, self._summary)
        self.reporter = Reporter(self.host, self._snapshots, directory.path, rules.min_regions)

    def stop(self, number: int) -> None:
        """Ends :meth:`run` soon, because of a signal. It takes no lock, which the interrupted thread may hold."""
        self._signal = number

    def run(
        self,
        objection: Callable[[Certificate], str | None] = lambda certificate: None,
        each_tick: Callable[[], None] = lambda: None,
    ) -> int:
        """Serves until the run ends. Returns the exit code.

        Args:
            objection: Why a present peer must go, by its certificate.
            each_tick: Called several times a second.
        """
        self._greet()
        self._snapshots.start()
        try:
            while True:
                try:
                    each_tick()
                    code = self._tick(time.monotonic(), objection)
                except Exception:  # nothing that a member does may end the run
                    log.exception("The server has met an error, and goes on.")
                    code = None
                if code is not None:
                    return code
                time.sleep(_TICK)
        finally:
            self._snapshots.end()
            self.host.abort()

    def _summary(self) -> dict[str, Any]:
        status = self.host.ask(lambda node: node.status())
        return {"global_step": status["run"]["global_step"], "members": sorted(status["members"])}

    def _tick(self, now: float, objection: Callable[[Certificate], str | None]) -> int | None:
        """Looks at the clock. Returns the exit code if the process ends."""
        if self._signal is not None:
            return self._end_for_signal(self._signal)
        self.host.watch(now)
        # A member may wait for the disk, and nobody did anything while this process was stopped.
        passed = min(now - self._ticked, _LONGEST_TICK) if self._snapshots.failing_since is None else 0.0
        self._ticked, self._seconds = now, self._seconds + passed
        self.host.act(lambda node: node.tick(self._seconds))
        self.host.expel_if(objection)
        self.reporter.sample(now)
        if self._is_finished:
            return self._end_finished(now) if self._has_written_final_model(now) else self._give_up_finished(now)
        return self._give_up_unfinished(now)

    @property
    def _is_finished(self) -> bool:
        node = self.host.node
        return isinstance(node, OpenGlobalNode) and node.state is GlobalState.FINISHED

    def _greet(self) -> None:
        path, note = self._directory.path, self.host.note
        if self._is_finished:
            self._stays_until = time.monotonic() + self.host.returns_within
            self._is_written = self._directory.final_model.exists()
            note(
                f"The run in {path} is finished. Its final model is in {self._directory.final_model}. Members that"
                f" return within {self.host.returns_within:g} s get it, then the server ends."
            )
        elif isinstance(self.host.node, OpenGlobalNode):
            step = self.host.ask(lambda node: node.status())["run"]["global_step"]
            note(f"The run in {path} goes on from global step {step}. Its members are waited for.")
        else:
            few = self._rules.min_regions
            note(f"A new run begins in {path} when {few} {'regions have' if few > 1 else 'region has'} joined.")

    def _too_few(self, now: float) -> bool:
        is_founding, present = self.host.ask(lambda node: (isinstance(node, Founding), node.present))
        if is_founding or present >= self._rules.min_regions:
            self._few_since = None
        elif self._few_since is None:
            self._few_since = now
        return self._few_since is not None and now - self._few_since > self._rules.timeout

    def _has_written_final_model(self, now: float) -> bool:
        """Writes the final model, unless this has been done. Returns whether it is on disk."""
        if self._is_written:
            return True
        if now < self._retry_at:
            return False
        node = self.host.node
        assert isinstance(node, OpenGlobalNode)
        try:
            checkpoint = self.host.ask(lambda _: checkpoint_of(node))  # members may still come and go
            self._directory.write_final_model(checkpoint)
        except OSError as error:
            self._retry_at = now + _RETRY
            self._unwritten_since = now if self._unwritten_since is None else self._unwritten_since
            self.host.note(f"The final model could not be written, and is tried again: {error}", logging.ERROR)
            return False
        self._is_written = True
        self.host.note(f"The run is finished. Its final model is in {self._directory.final_model}.")
        return True

    def _end_finished(self, now: float) -> int | None:
        if self.host.is_alone and now >= self._stays_until:
            self.host.note("All members have got the final model. The server ends.")
            return FINISHED
        self._finished_since = now if self._finished_since is None else self._finished_since
        if now - self._finished_since > self._rules.timeout:
            self.host.note("The server ends, although not all members have said goodbye.", logging.WARNING)
            self.host.give_up("The run is finished, and this job has not said goodbye in time.", _HEAR)
            return FINISHED
        return None

    def _give_up_unfinished(self, now: float) -> int | None:
        few, limit, failing = self._rules.min_regions, self._rules.timeout, self._snapshots.failing_since
        if self._too_few(now):
            regions = "regions" if few > 1 else "region"
            return self._give_up(f"Fewer than {few} {regions} took part for longer than {limit:g} s")
        if failing is not None and now - failing > limit:
            return self._give_up(f"No snapshot could be written for {limit:g} s ({self._snapshots.failure})")
        return None

    def _give_up_finished(self, now: float) -> int | None:
        limit, failing = self._rules.timeout, self._unwritten_since
        if failing is not None and now - failing > limit:
            return self._give_up(f"The final model could not be written for {limit:g} s")
        return None

    def _give_up(self, reason: str) -> int:
        self._snapshots.end()
        self._snapshots.write()
        sentence = (
            f"{reason}, so the server ends. The run is in {self._directory.path}: start the server again to go on."
        )
        self.host.note(sentence, logging.ERROR)
        self.host.give_up(sentence, _HEAR)
        return ABANDONED

    def _end_for_signal(self, number: int) -> int:
        self._snapshots.end()
        name = signal.Signals(number).name
        if isinstance(self.host.node, OpenGlobalNode):
            self._snapshots.write()
            rest = f"The run is in {self._directory.path}: start the server again, here or elsewhere, to go on."
        else:
            rest = "The run had not begun."
        self.host.note(f"The server ends because of {name}. {rest}", logging.WARNING)
        return 128 + number
