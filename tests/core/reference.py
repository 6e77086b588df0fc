"""The published simulator of HALoS and its baselines on the toy problem, written a second time from its formulas.

It is independent of what it checks: it uses NumPy and the standard library, nothing of lightning_halos and no torch.
Sample `i` is `sin(0.37 i + [0..5])`, the loss `0.5 |weight - mean of the batch|^2`, the initial weight
`linspace(-1, 1, 6)`. `lr` of a configuration's delayed_nesterov is `lr * delay` of ours. A worker keeps the state of
its optimizer from round to round, and the schedule decides its rate.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

Config = dict[str, Any]
Vector = np.ndarray

OPTIMIZERS = {"delayed_nesterov": ("lr", "beta", "buffer_size", "c"), "sgd": ("lr", "momentum", "nesterov")}
SCHEDULE = "cosine_decay_after_linear_warmup"


@dataclass(frozen=True)
class Event:
    """An event, and its server's state afterwards. `fields` in the recordings explains the attributes."""

    time: float  # virtual milliseconds
    kind: str  # "push": a round ended at its LPS; "update": an LPS's update came to the GPS; "merge": the answer came;
    # "round": a synchronous round of all workers ended
    lps: int  # of a push, update or merge; else -1
    worker: int  # of a push; else -1
    version: int  # updates that the server has applied
    steps: int  # local steps that the global server, or the only one, has counted
    parameters: Vector
    local_steps: int | None = None  # of a push, update or round: what it brings
    start: float | None = None  # of a push: when its round was dispatched
    samples: tuple[int, int] | None = None  # of a push or round: first index of its data, and the one after the last
    position: int | tuple[int, ...] | None = None  # of a push or, by worker, of a round: where the LR schedule began
    merged_version: int | None = None  # of an LPS: its version at its last merge
    sends_update: bool | None = None  # of a push to an LPS


def record(config: Config) -> list[Event]:
    """The events until the global server, or the only one, has counted `total_local_steps`."""
    check(config)
    events: list[Event] = []
    for event in {"halos": halos, "async_local_sgd": async_local_sgd, "diloco": diloco}[config["algorithm"]](config):
        events.append(event)
        if event.steps >= config["total_local_steps"]:
            return events
    raise AssertionError("a simulation has no end")


def check(config: Config) -> None:
    """Refuses optimizers and schedules whose rules are not written here, instead of following others."""
    for name in ("worker_optimizer", "local_optimizer", "global_optimizer", "outer_optimizer"):
        if name in config:
            kind, allowed = config[name]["opt_type"], ("sgd",) if name == "worker_optimizer" else tuple(OPTIMIZERS)
            assert kind in allowed, f"{name}: the opt_type {kind!r} is not known here, only {', '.join(allowed)}"
            unknown = config[name].keys() - {"opt_type", *OPTIMIZERS[kind]}
            assert not unknown, f"{name}: {', '.join(sorted(unknown))} of {kind} is not known here"
    kind = config["worker_lr_schedule"]["lr_type"]
    assert kind == SCHEDULE, f"worker_lr_schedule: the lr_type {kind!r} is not known here, only {SCHEDULE}"


def halos(config: Config) -> Iterator[Event]:
    """All events by virtual time."""
    homes = [region for region, speeds in enumerate(config["worker_speeds"]) for _ in speeds]
    rounds = local_steps(config)
    train = [trainer(config) for _ in homes]
    size = config["workers_per_lps"]
    workers = [range(lps * size, (lps + 1) * size) for lps in range(config["num_lps"])]
    regions = [homes[group[0]] for group in workers]
    dispatcher = Dispatcher(config, [regions[worker // size] for worker in range(len(homes))])

    gps, gps_apply, gps_version, gps_steps = initial(), optimizer(config["global_optimizer"]), 0, 0
    theta = [initial() for _ in workers]
    apply = [optimizer(config["local_optimizer"]) for _ in workers]
    merged = [initial() for _ in workers]
    version, merged_at, unsent_steps = ([0] * len(workers) for _ in range(3))
    queue: list[tuple[float, int, str, int, int, Any]] = []
    numbers = iter(range(10**9))

    link = partial(link_ms, config)

    def later(time: float, kind: str, lps: int, worker: int, load: Any) -> None:
        heapq.heappush(queue, (time, next(numbers), kind, lps, worker, load))

    def dispatch(now: float, lps: int, worker: int) -> None:
        end, facts = dispatcher.dispatch(now, worker)
        gradient = theta[lps] - train[worker](theta[lps], facts["samples"][0], rounds[worker])
        later(end, "push", lps, worker, (gradient, facts))

    for lps, group in enumerate(workers):
        for worker in group:
            dispatch(0.0, lps, worker)
    while True:
        now, _, kind, lps, worker, load = heapq.heappop(queue)
        if kind == "push":
            gradient, facts = load
            theta[lps] = apply[lps](theta[lps], gradient)
            version[lps] += 1
            unsent_steps[lps] += rounds[worker]
            if sends := version[lps] == merged_at[lps] + config["accumulation"]:
                update = (merged[lps] - theta[lps], unsent_steps[lps])
                later(now + link(regions[lps], 0), "update", lps, -1, update)
                unsent_steps[lps] = 0
            dispatch(now, lps, worker)
            facts = {**facts, "merged_version": merged_at[lps], "sends_update": sends}
            yield Event(now, kind, lps, worker, version[lps], gps_steps, theta[lps], **facts)
        elif kind == "update":
            gradient, steps = load
            gps, gps_version, gps_steps = gps_apply(gps, gradient), gps_version + 1, gps_steps + steps
            later(now + link(0, regions[lps]), "merge", lps, -1, gps)
            yield Event(now, kind, lps, -1, gps_version, gps_steps, gps, local_steps=steps)
        else:
            alpha = config["merge_weight"]
            theta[lps] = merged[lps] = (1 - alpha) * theta[lps] + alpha * load
            merged_at[lps] = version[lps]
            yield Event(now, kind, lps, -1, version[lps], gps_steps, theta[lps], merged_version=version[lps])


def async_local_sgd(config: Config) -> Iterator[Event]:
    """All events by virtual time. The only server is the GPS, in region 0."""
    rounds, apply = local_steps(config), optimizer(config["global_optimizer"])
    dispatcher = Dispatcher(config, [0] * len(rounds))
    train = [trainer(config) for _ in rounds]
    theta, version, steps = initial(), 0, 0
    queue: list[tuple[float, int, Vector, dict[str, Any]]] = []

    def dispatch(now: float, worker: int) -> None:
        end, facts = dispatcher.dispatch(now, worker)
        gradient = theta - train[worker](theta, facts["samples"][0], rounds[worker])
        heapq.heappush(queue, (end, worker, gradient, facts))

    for worker in range(len(rounds)):
        dispatch(0.0, worker)
    while True:
        now, worker, gradient, facts = heapq.heappop(queue)
        theta, version, steps = apply(theta, gradient), version + 1, steps + rounds[worker]
        dispatch(now, worker)
        yield Event(now, "push", 0, worker, version, steps, theta, **facts)


def diloco(config: Config) -> Iterator[Event]:
    """All rounds. Workers with equally many steps also start from the same position of the schedule."""
    rounds, speeds, apply = local_steps(config), relative_speeds(config), optimizer(config["outer_optimizer"])
    workers, table = len(rounds), config["network_bandwidths_gbps"]
    train = [trainer(config) for _ in rounds]
    rings = [
        min(table[a][b] for a, b in zip(ring, (*ring[1:], ring[0]), strict=True))
        for ring in itertools.permutations(range(len(table)))
    ]
    bits = 2 * (workers - 1) * (config["message_bytes"] * 8 / workers)
    exchange = bits / (max(rings) * 1e9) * 1e3 if workers > 1 else 0.0
    compute = max(config["local_step_time_ms"] * r / s for r, s in zip(rounds, speeds, strict=True))
    theta, version, steps, cursor, now = initial(), 0, 0, 0, 0.0
    while True:
        total, begin, positions = np.zeros(6), cursor, []
        for worker, own in enumerate(rounds):
            position = cursor // config["global_batch_size"]
            positions.append(position - position % own if len(set(rounds)) == 1 else position)
            total += theta - train[worker](theta, cursor, own, positions[-1])
            cursor += own * config["local_batch_size"]
        now += compute + exchange
        theta, version, steps = apply(theta, total / workers), version + 1, steps + sum(rounds)
        facts: dict[str, Any] = {"samples": (begin, cursor), "position": tuple(positions)}
        yield Event(now, "round", -1, -1, version, steps, theta, local_steps=sum(rounds), **facts)


class Dispatcher:
    """Hands out the data of asynchronous rounds, and knows when they end."""

    def __init__(self, config: Config, servers: list[int]) -> None:
        """Takes the region of each worker's server."""
        self.config = config
        self.servers = servers
        self.homes = [region for region, speeds in enumerate(config["worker_speeds"]) for _ in speeds]
        self.speeds, self.rounds = relative_speeds(config), local_steps(config)
        self.cursor = 0

    def dispatch(self, now: float, worker: int) -> tuple[float, dict[str, Any]]:
        """Returns when the worker's next round ends, and what its event says about it."""
        steps, first = self.rounds[worker], self.cursor
        self.cursor += steps * self.config["local_batch_size"]
        compute = self.config["local_step_time_ms"] * steps / self.speeds[worker]
        end = now + 2 * link_ms(self.config, self.servers[worker], self.homes[worker]) + compute + worker * 1e-6
        position = first // self.config["global_batch_size"]
        samples = (first, self.cursor)
        return end, {"local_steps": steps, "start": now, "samples": samples, "position": position}


def link_ms(config: Config, source: int, target: int) -> float:
    return config["message_bytes"] * 8 / (config["network_bandwidths_gbps"][source][target] * 1e9) * 1e3


def relative_speeds(config: Config) -> list[float]:
    speeds = [speed for region in config["worker_speeds"] for speed in region]
    return [speed / max(speeds) for speed in speeds]


def local_steps(config: Config) -> list[int]:
    """H of each worker."""
    dynamic = config["dynamic_local_steps"]
    return [max(1, math.ceil(config["local_steps"] * (s if dynamic else 1))) for s in relative_speeds(config)]


def initial() -> Vector:
    return np.linspace(-1.0, 1.0, 6)


def sample(index: int) -> Vector:
    return np.sin(0.37 * index + np.arange(6))


def learning_rate(schedule: Config, step: int) -> float:
    top, warmup, end = schedule["max_lr"], schedule["t_warmup"], schedule["t_max"]
    bottom = schedule.get("min_lr", 0.1 * top)
    if step <= warmup:
        return top * step / warmup
    if step <= end:
        return bottom + (top - bottom) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (end - warmup)))
    return bottom


def trainer(config: Config) -> Callable[..., Vector]:
    """A worker."""
    size, apply = config["local_batch_size"], sgd(config["worker_optimizer"])

    def train(weight: Vector, start: int, steps: int, position: int | None = None) -> Vector:
        """The weight after a round that starts at index `start` of the data."""
        position = start // config["global_batch_size"] if position is None else position
        for step in range(steps):
            first = start + step * size
            mean = sum(sample(index) for index in range(first, first + size)) / size
            weight = apply(weight, weight - mean, learning_rate(config["worker_lr_schedule"], position + step + 1))
        return weight

    return train


def optimizer(config: Config) -> Callable[[Vector, Vector], Vector]:
    return {"delayed_nesterov": delayed_nesterov, "sgd": sgd}[config["opt_type"]](config)


def delayed_nesterov(config: Config) -> Callable[[Vector, Vector], Vector]:
    lr, beta, n, c = config["lr"], config["beta"], config.get("buffer_size", 1), config.get("c", 0.0)
    m, delta, t = np.zeros(6), np.zeros(6), 0

    def apply(p: Vector, g: Vector) -> Vector:
        nonlocal m, delta, t
        delta, t = delta + g, t + 1
        if t % n:
            return p - lr * (c * beta * m + g / n)
        m, delta = beta * m + delta / n, np.zeros(6)
        return p - lr * ((1 - c * n + c) * beta * m + g / n)

    return apply


def sgd(config: Config) -> Callable[..., Vector]:
    momentum, nesterov = config.get("momentum", 0.0), config.get("nesterov", False)
    m = np.zeros(6)

    def apply(p: Vector, g: Vector, lr: float = config["lr"]) -> Vector:
        nonlocal m
        m = momentum * m + g
        return p - lr * (g + momentum * m if nesterov else m)

    return apply
