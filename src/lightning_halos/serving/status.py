"""The state of a run as plain values, for ``lightning-halos status`` and the dashboard.

It describes; it decides nothing. ``report`` makes it readable for people.
"""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any, NamedTuple

from lightning_halos.core.members import MemberState
from lightning_halos.serving.host import RunHost
from lightning_halos.serving.snapshots import SnapshotWriter
from lightning_halos.transport.wire import MOST_CHARACTERS
from lightning_halos.version import __version__

_MOST_MEMBERS = 300  # that are described one by one
_MOST_METRICS = 200
_MOST_CHARACTERS = 200  # of the name of a metric
_WINDOW = 60.0  # seconds over which rates are averaged
_LEAST = 1.0  # seconds between two samples

_GONE = (MemberState.LEFT.value, MemberState.LOST.value)


class _Sample(NamedTuple):
    at: float  # by `time.monotonic`
    counts: dict[str, int]  # of the run
    steps: dict[str, int]  # local steps of each member


class Reporter:
    """Describes a run.

    Args:
        host: The host of the run's node.
        snapshots: Writes its snapshots.
        directory: The run's directory.
        min_regions: Members that the run needs.
    """

    def __init__(self, host: RunHost, snapshots: SnapshotWriter, directory: Path, min_regions: int) -> None:
        self._host = host
        self._snapshots = snapshots
        self._directory = directory
        self._min_regions = min_regions
        self._started = time.time()
        self._samples: deque[_Sample] = deque()
        self._lock = threading.Lock()

    def sample(self, now: float) -> None:
        """Notes how far the run is, from which rates follow. ``now`` is by ``time.monotonic``."""
        if self._samples and now - self._samples[-1].at < _LEAST:
            return
        status = self._host.ask(lambda node: node.status())
        traffic = self._host.connections().values()
        counts = {name: sum(one[name] for one in traffic) for name in ("bytes_sent", "bytes_received")}
        counts |= {"local_steps": status["run"]["total"], "updates": self._host.updates}
        with self._lock:
            steps = {name: member.get("steps", 0) for name, member in status["members"].items()}
            self._samples.append(_Sample(now, counts, steps))
            while now - self._samples[0].at > _WINDOW:
                self._samples.popleft()

    def describe(self, most_members: int = _MOST_MEMBERS) -> dict[str, Any]:
        """Returns the state of the run. Its size has a limit, whatever the numbers of members and workers.

        - ``version`` of the package, ``time`` and ``started`` (by ``time.time``), ``directory``
        - ``run``: ``state``, ``global_step``, ``max_steps``, ``epoch``, ``epochs``, ``total`` (local steps),
          ``workers`` (that a global step is divided by), ``min_regions``, ``version`` (of the global model),
          ``decider``, and more
        - ``rates`` per second, over the last minute: ``global_steps``, ``local_steps``, ``updates``, ``bytes_sent`` and
          ``bytes_received``
        - ``members`` by name: ``state``, ``workers``, ``steps`` and ``steps_per_second`` (local), ``updates``,
          ``staleness`` (mean of its pushes), ``rejected`` (pushes), ``counters``, ``outliers`` (a few of its workers),
          what :meth:`RunHost.connections` tells, and more
        - ``states``: number of members in each state
        - ``left_out``: number of members that are not in ``members``; those that take part are the last to be left out
        - ``snapshot``: the last one, see :class:`SnapshotWriter`; ``None`` before the first of this process
        - ``events``: the latest ones, as pairs of a time and a sentence; the newest is the last

        Args:
            most_members: Largest number of members that are described one by one.
        """
        status = self._host.ask(lambda node: node.status())
        connections, (rates, speeds) = self._host.connections(), self._rates()
        run, workers = status["run"], status["run"]["workers"]
        metrics = itertools.islice(run.get("metrics", {}).items(), _MOST_METRICS)
        order = sorted(status["members"].items(), key=lambda item: item[1]["state"] in _GONE)
        return {
            "version": __version__,
            "time": time.time(),
            "started": self._started,
            "directory": str(self._directory),
            "run": {
                **run,
                "metrics": {name[:_MOST_CHARACTERS]: value for name, value in metrics},
                "min_regions": self._min_regions,
            },
            "rates": {**rates, "global_steps": rates["local_steps"] / workers if workers else 0.0},
            "members": {
                name: {**member, "steps_per_second": speeds.get(name), **connections.get(name, {})}
                for name, member in order[:most_members]
            },
            "states": Counter(member["state"] for _, member in order),
            "left_out": max(0, len(order) - most_members),
            "snapshot": self._snapshots.last,
            "events": [list(event) for event in list(self._host.events)],
        }

    def text(self) -> str:
        """Returns the state of the run as JSON, which a message can carry. NaN and infinite numbers are ``null``."""
        members = _MOST_MEMBERS
        while len(text := _json_of(self.describe(members))) > MOST_CHARACTERS and members:
            members //= 2
        return text

    def _rates(self) -> tuple[dict[str, float], dict[str, float]]:
        """Returns the rates of the run, and the local steps per second of each member."""
        with self._lock:
            samples = list(self._samples)
        if len(samples) < 2:
            return dict.fromkeys(("bytes_sent", "bytes_received", "local_steps", "updates"), 0.0), {}
        first, last = samples[0], samples[-1]
        seconds = last.at - first.at
        rates = {name: (count - first.counts[name]) / seconds for name, count in last.counts.items()}
        speeds = {}
        for name, steps in last.steps.items():
            since = next(sample for sample in samples if name in sample.steps)  # it may have joined just now
            if since is not last:
                speeds[name] = max(0.0, (steps - since.steps[name]) / (last.at - since.at))
        # Counts shrink when a member is lost whose work was not in the global model yet.
        return {name: max(0.0, rate) for name, rate in rates.items()}, speeds


def _json_of(value: Any) -> str:
    """Returns a value as JSON that every program can read: it has no NaN, such as the loss of a run that diverged."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case _:
            return value
