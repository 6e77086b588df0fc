"""Writes a plan as a timeline in Chrome's trace format, for https://ui.perfetto.dev and chrome://tracing.

Each region is a process, with a lane for each of its servers and workers. Times are virtual. Events are written one by
one, because there may be millions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_halos.planning.planner import Arrivals, Plan, Recording
from lightning_halos.simulation.timing import Timing

Event = dict[str, Any]

_GLOBAL_LANE, _SERVER_LANES, _WORKER_LANES = 1, 10, 100_000


def write_trace(plan: Plan, timing: Timing, path: Path) -> None:
    """Writes the events that a plan recorded (it was made with ``record_ms``) to a JSON file."""
    with path.open("w") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        for index, event in enumerate(_events(plan, timing)):
            file.write((",\n" if index else "") + json.dumps(event))
        file.write("\n]}\n")


def _events(plan: Plan, timing: Timing) -> Iterator[Event]:
    yield from _names(plan, timing)
    regions, limit = timing.cluster.region_of, plan.recording.until_ms
    for worker, starts in _starts(plan, timing):
        parts = _parts(plan, worker)
        for start, following in zip(starts, [*starts[1:], limit], strict=True):
            begin = start
            for name, duration in parts:
                end = min(begin + duration, following)
                if begin < end:
                    yield _slice(name, regions[worker], _WORKER_LANES + worker, begin, end)
                begin = end
    yield from _servers(plan.recording, timing)


def _names(plan: Plan, timing: Timing) -> Iterator[Event]:
    cluster, groups = timing.cluster, plan.recording.groups
    for region, name in enumerate(cluster.names):
        yield from _name("process", region, 0, f"region {name} ({plan.title})")
    if groups:
        yield from _name("thread", cluster.global_region, _GLOBAL_LANE, "global server")
    for group in groups if plan.recording.exchanges else ():
        yield from _name("thread", group.region, _SERVER_LANES + group.index, f"local server {group.index}")
    for worker, region in enumerate(cluster.region_of):
        yield from _name("thread", region, _WORKER_LANES + worker, f"worker {worker}")


def _starts(plan: Plan, timing: Timing) -> Iterator[tuple[int, list[float]]]:
    """Each worker, with the start times of its rounds."""
    recording = plan.recording
    if not recording.groups:
        for worker in range(len(plan.rounds)):
            yield worker, [0.0, *recording.rounds.tolist()]
    for group, pushes in zip(recording.groups, recording.pushes, strict=True):
        starts: dict[int, list[float]] = {rank: [0.0] for rank in group.ranks}
        for time, worker in zip(pushes.times.tolist(), pushes.senders.tolist(), strict=True):
            # With overlap a round begins when the push of the one before leaves, not when it arrives.
            starts[worker].append(time - (timing.way(worker, group.region) if plan.overlap else 0.0))
        yield from starts.items()


def _parts(plan: Plan, worker: int) -> list[tuple[str, float]]:
    """The parts of a worker's round in order, with their durations in milliseconds."""
    compute, communication, wait = plan.round_ms[worker].tolist()
    if plan.overlap:
        return [("compute", compute), ("wait", communication)]
    if plan.recording.groups:
        return [("pull", communication / 2), ("compute", compute), ("push", communication / 2)]
    return [("compute", compute), ("wait", wait), ("all-reduce", communication)]


def _servers(recording: Recording, timing: Timing) -> Iterator[Event]:
    home, limit = timing.cluster.global_region, recording.until_ms
    for group, pushes in zip(recording.groups, recording.pushes, strict=True):
        lane = (group.region, _SERVER_LANES + group.index) if recording.exchanges else (home, _GLOBAL_LANE)
        yield from _arrivals(pushes, *lane, "push applied", "worker")
    for group, own in zip(recording.groups, recording.exchanges, strict=False):
        lane = (group.region, _SERVER_LANES + group.index)
        for sent, arrived, merged, version, merged_version in zip(*(column.tolist() for column in own), strict=True):
            yield _slice("exchange", *lane, sent, min(merged, limit), {"version": version})
            yield _slice("update to the global server", *lane, sent, min(arrived, limit))
            if arrived < limit:
                yield _slice("answer", *lane, arrived, min(merged, limit))
            if merged <= limit:
                yield _instant("merge", *lane, merged, {"version": merged_version})
    if recording.updates is not None:
        yield from _arrivals(recording.updates, home, _GLOBAL_LANE, "update applied", "local server")


def _arrivals(arrivals: Arrivals, region: int, lane: int, name: str, sender: str) -> Iterator[Event]:
    rows = zip(*(column.tolist() for column in arrivals), strict=True)
    for version, (time, number, staleness, _) in enumerate(rows, start=1):
        yield _instant(name, region, lane, time, {sender: number, "version": version, "staleness": staleness})


def _name(what: str, region: int, lane: int, name: str) -> Iterator[Event]:
    """The name of a process or thread, and its position among the others."""
    common = {"ph": "M", "pid": region + 1, "tid": lane}
    yield {**common, "name": f"{what}_name", "args": {"name": name}}
    yield {**common, "name": f"{what}_sort_index", "args": {"sort_index": lane or region}}


def _slice(name: str, region: int, lane: int, start: float, end: float, details: Event | None = None) -> Event:
    begin = _nanoseconds(start)
    duration = (_nanoseconds(end) - begin) / 1e3
    event = {"ph": "X", "name": name, "pid": region + 1, "tid": lane, "ts": begin / 1e3, "dur": duration}
    return event | ({"args": details} if details else {})


def _instant(name: str, region: int, lane: int, time: float, details: Event) -> Event:
    ts = _nanoseconds(time) / 1e3
    return {"ph": "i", "s": "t", "name": name, "pid": region + 1, "tid": lane, "ts": ts, "args": details}


def _nanoseconds(milliseconds: float) -> int:
    """Rounds to an integer, so that adjacent slices of a lane never overlap by a rounding error."""
    return round(milliseconds * 1e6)
