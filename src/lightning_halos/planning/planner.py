"""The plan: the events on a described cluster under each algorithm, without a model.

It works on numbers only: no tensors, no printing. It follows the rules of
:mod:`lightning_halos.core.local_server` and ``global_server``, with the durations of
:class:`~lightning_halos.simulation.timing.Timing`.

A worker never waits for an exchange between servers, so its pushes are an arithmetic progression, from the second one
on if it trains on while they are answered, and the pushes to a server are the merged progressions of its workers.
Arrays therefore replace an event queue, and servers are computed one after the other. Simultaneous pushes are in the
order of workers, simultaneous updates at the global server in the order in which they were sent. Only for servers that
take time, which a push has to wait for, there is an event queue for each server.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from lightning_halos.core.algorithms import Algorithm, ServerAlgorithm
from lightning_halos.core.checks import check_count
from lightning_halos.core.topology import ServerGroup
from lightning_halos.simulation.cluster import SimulatedCluster
from lightning_halos.simulation.timing import Timing

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MS_PER_HOUR = 3.6e6
MOST_ROUNDS = 10**9
"""Rounds that a plan has at most. Each takes some tens of bytes of memory."""
ACTIVITIES = ("computing", "communicating", "waiting")  # the last one: for the slowest worker of a synchronous round


@dataclass(frozen=True)
class Staleness:
    """Statistics of the staleness of updates: the server's versions between an update's start and its arrival."""

    count: int  # of updates
    mean: float  # in versions
    p95: int  # by nearest rank, in versions
    maximum: int  # in versions
    missed_steps: float  # mean number of local steps that these versions contain


class Arrivals(NamedTuple):
    """Updates in the order of their arrival at a server. Update i creates the server's version i + 1."""

    times: Floats  # in virtual milliseconds
    senders: Ints  # ranks of workers or, at the global server, indices of local servers
    staleness: Ints  # versions between each update's start and its arrival
    missed_steps: Ints  # local steps that these versions contain


class Exchanges(NamedTuple):
    """The exchanges of a local server with the global server, in order. Times are in virtual milliseconds."""

    sent: Floats  # when the local server sends an update
    arrived: Floats  # when the update arrives at the global server
    merged: Floats  # when the local server merges the answer
    sent_versions: Ints  # the local server's versions when it sends
    merged_versions: Ints  # the local server's versions when it merges


@dataclass(frozen=True)
class Recording:
    """The events up to a time."""

    until_ms: float  # virtual
    groups: tuple[ServerGroup, ...] = ()  # the servers that workers push to, with their workers
    pushes: tuple[Arrivals, ...] = ()  # to each of these servers
    exchanges: tuple[Exchanges, ...] = ()  # of each of these servers; empty without a global server above them
    updates: Arrivals | None = None  # at the global server
    rounds: Floats = field(default_factory=lambda: np.empty(0))  # end times, of a synchronous algorithm


@dataclass(frozen=True)
class Plan:
    """The behavior of an algorithm on a cluster. Arrays are by rank."""

    algorithm: str
    title: str  # the algorithm's name for people
    elapsed_ms: float  # virtual time that the numbers cover; for a synchronous algorithm, complete rounds only
    local_steps: Ints  # per round
    rounds: Ints  # finished
    round_ms: Floats  # virtual time that each worker (row) spends per round on each of the ACTIVITIES (columns)
    bytes_inside: int  # on links inside regions
    bytes_between: int  # on links between regions
    pushes: Staleness  # of the workers' pushes
    updates: Staleness | None  # of the local servers' updates; ``None`` without local servers
    global_updates: int  # versions of the global model
    sent_share: float | None
    """Share of the pushes, up to each local server's last merge, that are part of an update to the global server.

    ``None`` without a merge. Pushes that arrive during an exchange are part of no update: the next one counts from the
    merge.
    """
    accumulate_updates: tuple[int, ...]  # pushes per exchange (K), by local server
    recording: Recording  # the events of the time that was asked for
    overlap: bool = False  # whether workers train on while their pushes are answered

    @property
    def global_steps(self) -> float:
        """Local steps of finished rounds, divided by the number of workers."""
        return float((self.rounds * self.local_steps).sum()) / len(self.rounds)

    @property
    def seconds_per_global_step(self) -> float:
        """Virtual seconds in which the workers do one local step per worker on average."""
        return self.elapsed_ms / 1e3 / self.global_steps

    @property
    def updates_per_second(self) -> float:
        """Changes of the global model per virtual second."""
        return self.global_updates / (self.elapsed_ms / 1e3)

    @property
    def worker_shares(self) -> Floats:
        """Shares of the activities (columns) in each worker's time (rows)."""
        shares: Floats = self.round_ms / self.round_ms.sum(axis=1, keepdims=True)
        return shares

    @property
    def shares(self) -> Floats:
        """Shares of the activities, averaged over workers."""
        mean: Floats = self.worker_shares.mean(axis=0)
        return mean

    @property
    def round_shares(self) -> Floats:
        """Shares of the activities, averaged over finished rounds instead of workers."""
        mean: Floats = np.average(self.worker_shares, axis=0, weights=self.rounds)
        return mean


def make_timing(cluster: SimulatedCluster, message_bytes: int | None = None) -> Timing:
    """Returns the durations on a cluster for a model of the given size.

    Args:
        cluster: The cluster.
        message_bytes: Size of a message that contains a model. Default: the size in the cluster's description.

    Raises:
        ValueError: If the size is invalid, or neither argument gives it.
    """
    size = cluster.message_bytes if message_bytes is None else message_bytes
    if size is None:
        raise ValueError(
            "message_bytes is missing: the plan has no model to measure. Give --message-bytes, or write message_bytes"
            " into the cluster's description: 4 bytes for each trainable parameter and for each number of what is"
            " averaged, such as BatchNorm's statistics."
        )
    check_count("message_bytes", size)
    return Timing(cluster, size)


def groups_of(algorithm: Algorithm, cluster: SimulatedCluster) -> tuple[ServerGroup, ...]:
    """Returns the local servers that an algorithm has on a cluster, and their workers."""
    return algorithm.arrange(cluster.regions, cluster.names, cluster.global_region).groups


def longest_rounds(algorithm: Algorithm, timing: Timing) -> Floats:
    """Returns the milliseconds that a round of each worker takes at most, without overlap.

    A push then waits for one of each other worker of its server.
    """
    steps = timing.local_steps(algorithm.local_steps, algorithm.dynamic_local_steps)
    if not isinstance(algorithm, ServerAlgorithm):
        compute = max(map(timing.compute, range(len(steps)), steps))
        return np.full(len(steps), compute + timing.all_reduce() + timing.serve)
    timing = timing.on(algorithm.wire)
    rounds = np.empty(len(steps))
    for group in groups_of(algorithm, timing.cluster):
        for rank in group.ranks:
            rounds[rank] = timing.round(rank, group.region, steps[rank]) + len(group.ranks) * timing.serve
    return rounds


def plan(algorithm: Algorithm, timing: Timing, hours: float = 1.0, record_ms: float = 0.0) -> Plan:
    """Simulates an algorithm on a cluster.

    Args:
        algorithm: The algorithm.
        timing: The durations on the cluster.
        hours: Virtual hours to simulate.
        record_ms: Virtual milliseconds from the start whose events are kept in :attr:`Plan.recording`.

    Raises:
        ValueError: If the time is invalid, nothing is finished in it, or too much.
    """
    if not 0 < hours < float("inf"):
        raise ValueError(f"hours={hours!r} must be a positive number of hours.")
    horizon = hours * MS_PER_HOUR
    durations = longest_rounds(algorithm, timing)
    each = horizon / durations
    # Synchronous rounds are of all workers at once.
    rounds = float(each.sum() if isinstance(algorithm, ServerAlgorithm) else each[0])
    if rounds > MOST_ROUNDS:
        raise ValueError(
            f"In hours={hours:g} there are about {rounds:.1g} rounds, and a plan has at most {MOST_ROUNDS:.0g}. The"
            f" shortest one takes {durations.min():.3g} ms and the longest {durations.max():.3g} ms. Give fewer hours,"
            " or check step_ms and worker_speeds."
        )
    steps = np.array(timing.local_steps(algorithm.local_steps, algorithm.dynamic_local_steps))
    if isinstance(algorithm, ServerAlgorithm):
        return _with_servers(algorithm, timing, horizon, steps, record_ms)
    return _in_lockstep(algorithm, timing, horizon, steps, record_ms)


def _in_lockstep(algorithm: Algorithm, timing: Timing, horizon: float, local_steps: Ints, record_ms: float) -> Plan:
    """Plans a synchronous algorithm, whose rounds end for all workers at once, with an all-reduce."""
    workers, regions = timing.cluster.num_workers, len(timing.cluster.regions)
    compute = np.array([timing.compute(worker, steps) for worker, steps in enumerate(local_steps)])
    all_reduce, slowest = timing.all_reduce(), float(compute.max())
    if not algorithm.averages_gradients:
        all_reduce += timing.serve
    ends = _multiples(slowest + all_reduce, horizon)
    if not len(ends):
        raise ValueError(_too_short(algorithm.name, horizon, slowest + all_reduce))
    total = len(ends) * 2 * (workers - 1) * timing.message_bytes
    if timing.cluster.all_reduce == "ring":
        between = total * regions // workers if regions > 1 else 0
    else:
        between = len(ends) * 2 * (regions - 1) * timing.message_bytes
    return Plan(
        algorithm.name,
        algorithm.title,
        elapsed_ms=float(ends[-1]),
        local_steps=local_steps,
        rounds=np.full(workers, len(ends)),
        round_ms=np.stack([compute, np.full(workers, all_reduce), slowest - compute], axis=1),
        bytes_inside=total - between,
        bytes_between=between,
        pushes=Staleness(len(ends) * workers, 0.0, 0, 0, 0.0),
        updates=None,
        global_updates=len(ends),
        sent_share=None,
        accumulate_updates=(),
        recording=Recording(record_ms, rounds=ends[: np.searchsorted(ends, record_ms, side="right")].copy()),
    )


def _with_servers(
    algorithm: ServerAlgorithm, timing: Timing, horizon: float, local_steps: Ints, record_ms: float
) -> Plan:
    """Plans an algorithm whose local servers apply pushes on arrival; several of them use a global server."""
    timing, cluster, workers = timing.on(algorithm.wire), timing.cluster, len(local_steps)
    home, region_of = cluster.global_region, cluster.region_of
    groups = groups_of(algorithm, cluster)
    periods = [] if len(groups) == 1 else [algorithm.period(len(group.ranks)) for group in groups]
    durations, rounds = np.empty(workers), np.zeros(workers, dtype=np.int64)
    messages = Counter[bool]()  # by whether they cross a region's border
    sent, merged = 0, 0  # pushes
    push_tally, update_tally = _Tally(), _Tally()
    recorded, exchanges, sent_steps = [], [], []
    for group in groups:
        own_rounds = [
            _Rounds.of(timing, rank, group.region, local_steps[rank], algorithm.overlap) for rank in group.ranks
        ]
        applied: Floats | None = None
        if timing.serve:
            times, applied = _serve(own_rounds, timing.serve, horizon)
        else:
            times = [own.arrivals(horizon) for own in own_rounds]
        for rank, own, arrivals in zip(group.ranks, own_rounds, times, strict=True):
            waits = timing.serve and len(arrivals)
            durations[rank] = float(arrivals[-1]) / len(arrivals) if waits else own.duration
            rounds[rank] = len(arrivals)
            messages[region_of[rank] != group.region] += 2 * len(arrivals)
        steps = [np.full(len(own), local_steps[rank]) for rank, own in zip(group.ranks, times, strict=True)]
        pushes = _arrive(times, steps, group.ranks)
        push_tally.add(pushes)
        recorded.append(_until(pushes, record_ms))
        if periods:
            period = periods[group.index]
            there, back = timing.transfer(group.region, home), timing.serve + timing.transfer(home, group.region)
            exchange = _exchange(pushes.times, pushes.times if applied is None else applied, period, there, back)
            exchanges.append(exchange)
            done = np.concatenate([[0], np.cumsum(local_steps[pushes.senders])])
            sent_steps.append(np.diff(done[exchange.sent_versions], prepend=0))
            merges = int((exchange.merged <= horizon).sum())
            messages[group.region != home] += int((exchange.arrived <= horizon).sum()) + merges
            sent += period * merges
            merged += int(exchange.merged_versions[merges - 1]) if merges else 0
    if not rounds.any():
        raise ValueError(_too_short(algorithm.name, horizon, float(durations.min())))
    updates = None
    if periods:
        arrived, sent_at = [own.arrived for own in exchanges], [own.sent for own in exchanges]
        updates = _until(_arrive(arrived, sent_steps, range(len(groups)), sent_at), horizon)
        update_tally.add(updates)
    compute = np.array([timing.compute(worker, steps) for worker, steps in enumerate(local_steps)])
    return Plan(
        algorithm.name,
        algorithm.title,
        elapsed_ms=horizon,
        local_steps=local_steps,
        rounds=rounds,
        round_ms=np.stack([compute, durations - compute, np.zeros(workers)], axis=1),
        bytes_inside=messages[False] * timing.bytes_within,
        bytes_between=messages[True] * timing.bytes_between,
        pushes=push_tally.result(),
        updates=None if updates is None else update_tally.result(),
        global_updates=int(rounds.sum()) if updates is None else len(updates.times),
        sent_share=sent / merged if merged else None,
        accumulate_updates=tuple(periods),
        recording=Recording(
            record_ms,
            groups,
            tuple(recorded),
            tuple(_until(own, record_ms) for own in exchanges),
            None if updates is None else _until(updates, record_ms),
        ),
        overlap=algorithm.overlap,
    )


Events = TypeVar("Events", Arrivals, Exchanges)


def _until(events: Events, time: float) -> Events:
    """Returns a copy with the events that begin no later than ``time``."""
    stop = int(np.searchsorted(events[0], time, side="right"))
    columns: Iterable[Any] = (column[:stop].copy() for column in events)
    return type(events)(*columns)


def _multiples(duration: float, horizon: float) -> Floats:
    """End times of consecutive rounds up to a horizon, with the rounding of repeated addition."""
    ends: Floats = np.cumsum(np.full(int(horizon / duration) + 2, duration))
    return ends[: np.searchsorted(ends, horizon, side="right")]


class _Rounds(NamedTuple):
    """The rounds of a worker. If it trains on while a push is answered, see :mod:`~..simulation.overlap`."""

    first: float  # milliseconds from the start until the first push leaves
    duration: float  # of the others, if its server takes no time
    way: float  # of a push, and of its answer
    overlap: bool

    @classmethod
    def of(cls, timing: Timing, rank: int, server_region: int, steps: int, overlap: bool) -> _Rounds:
        busy, way = timing.busy(rank, steps), timing.way(rank, server_region)
        duration = max(busy, 2 * way) if overlap else timing.round(rank, server_region, steps)
        return cls(busy, duration, way, overlap)

    def arrivals(self, horizon: float) -> Floats:
        """Arrival times of the pushes, if the server takes no time."""
        if not self.overlap:
            return _multiples(self.duration, horizon)
        durations = np.full(int(horizon / self.duration) + 2, self.duration)
        durations[0] = self.first
        ends: Floats = np.cumsum(durations) + self.way
        return ends[: np.searchsorted(ends, horizon, side="right")]


def _serve(rounds: Sequence[_Rounds], serve: float, horizon: float) -> tuple[list[Floats], Floats]:
    """The pushes to a server that applies one after the other, in the order of their arrival.

    Returns:
        The arrival times of each worker's pushes, and the times at which all pushes have been applied, in order.
    """
    arrivals: list[list[float]] = [[] for _ in rounds]
    applied: list[float] = []
    leaves = [own.first for own in rounds]
    coming = [(own.first + own.way if own.overlap else own.duration, number) for number, own in enumerate(rounds)]
    heapq.heapify(coming)
    free = 0.0
    while coming[0][0] <= horizon:
        arrival, number = coming[0]
        own = rounds[number]
        free = max(arrival, free) + serve
        arrivals[number].append(arrival)
        applied.append(free)
        if own.overlap:
            leaves[number] = max(leaves[number] + own.duration, free + own.way)
            heapq.heapreplace(coming, (leaves[number] + own.way, number))
        else:
            heapq.heapreplace(coming, (free + own.duration, number))
    return [np.array(times, dtype=np.float64) for times in arrivals], np.array(applied, dtype=np.float64)


def _arrive(
    times: Sequence[Floats], steps: Sequence[Ints], names: Sequence[int], sent: Sequence[Floats] | None = None
) -> Arrivals:
    """Merges the updates of several senders to one server. An update starts from the answer to the previous one.

    Args:
        times: Arrival times of each sender's updates, ascending.
        steps: Local steps that each of these updates contains.
        names: The senders' ranks or indices.
        sent: When each update was sent, which orders simultaneous arrivals. Default: they are in the order of senders.
    """
    counts = np.array([len(own) for own in times])
    when, work = np.concatenate(times), np.concatenate(steps)
    order = np.argsort(when, kind="stable") if sent is None else np.lexsort((np.concatenate(sent), when))
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    started = np.empty_like(position)  # the version that each update started from
    started[1:] = position[:-1] + 1
    started[(np.cumsum(counts) - counts)[counts > 0]] = 0
    done = np.concatenate([[0], np.cumsum(work[order])])
    missed = done[position] - done[started]
    senders = np.repeat(np.array(names, dtype=np.int64), counts)
    return Arrivals(when[order], senders[order], (position - started)[order], missed[order])


def _exchange(times: Floats, applied: Floats, accumulate: int, there: float, back: float) -> Exchanges:
    """The exchanges of a server: one whenever ``accumulate`` pushes follow the last merge.

    Args:
        times: Arrival times of the pushes.
        applied: Times at which they have been applied.
        accumulate: The number of pushes.
        there: Milliseconds of an update on its way.
        back: Milliseconds from its arrival until its answer arrives.
    """
    sent, versions = [], []
    merged_versions = [0]
    while (version := merged_versions[-1] + accumulate) <= len(times):
        sent.append(applied[version - 1])
        versions.append(version)
        merged_versions.append(int(np.searchsorted(times, sent[-1] + there + back, side="right")))
    start = np.array(sent, dtype=np.float64)
    integers = (np.array(versions, dtype=np.int64), np.array(merged_versions[1:], dtype=np.int64))
    return Exchanges(start, start + there, start + there + back, *integers)


def _too_short(algorithm: str, horizon: float, duration: float) -> str:
    return (
        f"hours={horizon / MS_PER_HOUR:g} is too short: the first round of {algorithm.title} ends after"
        f" {duration / MS_PER_HOUR:.3g} hours. Give at least that."
    )


class _Tally:
    """Counts updates by staleness, so that the updates themselves need not be kept."""

    def __init__(self) -> None:
        self._counts = np.zeros(0, dtype=np.int64)
        self._missed = 0

    def add(self, arrivals: Arrivals) -> None:
        counts = np.bincount(arrivals.staleness, minlength=len(self._counts))
        counts[: len(self._counts)] += self._counts
        self._counts = counts
        self._missed += int(arrivals.missed_steps.sum())

    def result(self) -> Staleness:
        count = int(self._counts.sum())
        if not count:
            return Staleness(0, 0.0, 0, 0, 0.0)
        mean = float(self._counts @ np.arange(len(self._counts))) / count
        rank = -(-95 * count // 100)  # nearest rank, rounded up
        p95 = int(np.searchsorted(np.cumsum(self._counts), rank))
        return Staleness(count, mean, p95, len(self._counts) - 1, self._missed / count)
