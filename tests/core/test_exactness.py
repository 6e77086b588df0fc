"""The servers, rounds and vectors of `core` reproduce the published HALoS simulator, event by event.

`tests/golden` holds what the published program did on the toy problem. Here the servers are driven alone, without a
clock: the record says which event comes next, and after each event everything that the record says about it but its
time is compared with what the servers and workers say. `steps` is the count of the published global server. Ours is the
sum of what the updates that it applied bring; where there is only one server, of the pushes.

For other clusters and settings the record is that of `reference.py`, an independent second writing of the published
rules, which itself equals the recordings.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_halos.core.global_server import GlobalServer, SynchronousServer
from lightning_halos.core.local_server import LocalServer
from lightning_halos.core.messages import GlobalModel, Pull, Push, RegionUpdate
from lightning_halos.core.parameter_server import ParameterServer
from lightning_halos.core.vector import ModelVector
from lightning_halos.core.worker import WorkerRound

from . import golden, reference
from .receiving import receive
from .reference import Config, Event

TWO_REGIONS = golden.load(golden.SHIPPED / "halos_two_regions.json").config


def test_there_are_recordings() -> None:
    assert golden.FILES, f"there are no recordings in {golden.FOLDER}"


@pytest.mark.parametrize("path", golden.FILES, ids=lambda path: path.stem)
def test_the_servers_reproduce_the_recording(path: Path) -> None:
    check(path)


@pytest.mark.parametrize("path", golden.FILES, ids=lambda path: path.stem)
def test_the_reference_equals_the_recording(path: Path) -> None:
    recording = golden.load(path)
    golden.assert_equal(reference.record(recording.config), recording.events)


@pytest.mark.parametrize(
    "change",
    [
        {"dynamic_local_steps": True, "local_steps": 5},
        {"merge_weight": 1.0, "accumulation": 1},
        {"local_optimizer": {"opt_type": "delayed_nesterov", "lr": 0.8, "beta": 0.9, "buffer_size": 4, "c": 0.2}},
        {"global_optimizer": {"opt_type": "delayed_nesterov", "lr": 0.9, "beta": 0.5, "buffer_size": 3, "c": 0.1}},
        {"local_optimizer": {"opt_type": "sgd", "lr": 0.3, "momentum": 0.5, "nesterov": True}},
        {"global_optimizer": {"opt_type": "sgd", "lr": 0.7, "momentum": 0.9, "nesterov": True}},
        {"local_optimizer": {"opt_type": "sgd", "lr": 0.3}, "global_optimizer": {"opt_type": "sgd", "lr": 0.7}},
        {"worker_optimizer": {"opt_type": "sgd", "lr": 0.05, "momentum": 0.6, "nesterov": True}},
        {"worker_optimizer": {"opt_type": "sgd", "lr": 0.05, "momentum": 0.6}},
    ],
    ids=str,
)
def test_the_servers_reproduce_two_regions_with(change: Config) -> None:
    config = TWO_REGIONS | change
    record = reference.record(config)
    golden.assert_equal(replay(config, record), record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"worker_optimizer": {"opt_type": "adamw", "lr": 1e-3}}, "worker_optimizer: the opt_type 'adamw'"),
        ({"local_optimizer": {"opt_type": "adam", "lr": 1e-3}}, "local_optimizer: the opt_type 'adam'"),
        ({"worker_optimizer": {"opt_type": "sgd", "lr": 0.1, "weight_decay": 0.1}}, "weight_decay of sgd"),
        ({"worker_lr_schedule": {"lr_type": "constant", "max_lr": 0.05}}, "worker_lr_schedule: the lr_type 'constant'"),
    ],
    ids=str,
)
def test_the_reference_refuses_rules_that_it_does_not_know(change: Config, message: str) -> None:
    with pytest.raises(AssertionError, match=f"{message}.* is not known here"):
        reference.record(TWO_REGIONS | change)


def test_the_first_round_of_the_reference_is_what_a_pocket_calculator_gives() -> None:
    first = reference.record(TWO_REGIONS)[0]
    there_and_back = 2 * 281.706496e6 * 8 / 10e9 * 1e3
    assert first.worker == 0  # 8 steps at full speed
    assert first.time == pytest.approx(there_and_back + 8 * 238.391, abs=1e-9)
    weight = np.linspace(-1, 1, 6)
    for step in range(8):
        mean = np.mean([np.sin(0.37 * index + np.arange(6)) for index in range(4 * step, 4 * step + 4)], axis=0)
        weight -= 0.005 * (step + 1) * (weight - mean)
    start = np.linspace(-1, 1, 6)
    np.testing.assert_allclose(first.parameters, start - 0.8 * (start - weight) / 4, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", sorted(golden.SHIPPED.glob("halos_*.json")), ids=lambda path: path.stem)
def test_rounding_does_not_decide_the_order_of_a_recording(path: Path) -> None:
    """Rounds that end together are told apart by `worker * 1e-6` ms; a double at 100 s is exact to 1e-11 ms."""
    events = golden.load(path).events
    assert np.diff([event.time for event in events]).min() > 1e-7


class TestAFileThatIsNotRight:
    """One number that is off, or a file that is incomplete, does not pass."""

    @pytest.fixture
    def data(self) -> Any:
        return json.loads((golden.SHIPPED / "halos_two_regions.json").read_text())

    @pytest.fixture
    def check_(self, tmp_path: Path) -> Callable[[Any], None]:
        def check_(data: Any) -> None:
            (tmp_path / "recorded.json").write_text(json.dumps(data))
            check(tmp_path / "recorded.json")

        return check_

    @pytest.mark.parametrize("number", [0, 60, -1])
    @pytest.mark.parametrize("amount", [1e-6, -1e-8])
    def test_fails_if_a_parameter_is_off(self, data: Any, check_: Any, number: int, amount: float) -> None:
        data["events"][number]["parameters"][3] += amount
        data["final_parameters"] = data["events"][-1]["parameters"]
        with pytest.raises(AssertionError, match=f"event {number % len(data['events'])} .*parameters"):
            check_(data)

    @pytest.mark.parametrize(
        ("number", "fields"),
        [
            (0, "version steps local_steps lr_position first_sample end_sample merged_version start_time_ms"),
            (6, "version steps local_steps"),
            (7, "version steps merged_version"),
        ],
        ids=["push", "update", "merge"],
    )
    def test_fails_if_a_count_is_off(self, data: Any, check_: Any, number: int, fields: str) -> None:
        for field in fields.split():
            wrong = copy.deepcopy(data)
            wrong["events"][number][field] += 1
            with pytest.raises(AssertionError, match=f"event {number} "):
                check_(wrong)

    def test_fails_if_a_push_is_said_to_send_an_update(self, data: Any, check_: Any) -> None:
        data["events"][0]["sends_update"] = True
        with pytest.raises(AssertionError, match="event 0 of push: sends_update"):
            check_(data)

    def test_fails_if_two_events_changed_places(self, data: Any, check_: Any) -> None:
        events = data["events"]
        events[60], events[61] = events[61] | {"index": 60}, events[60] | {"index": 61}
        with pytest.raises(AssertionError, match="event 60 "):
            check_(data)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda data: data.update(events=[]), "it has no events"),
            (lambda data: data.pop("events"), r"lacks the fields \['events'\]"),
            (lambda data: data.update(more=1), r"has the unknown fields \['more'\]"),
            (lambda data: data["events"].pop(), "it ends at 432 steps"),
            (lambda data: data["events"].pop(60), "event 60 has the index 61"),
            (lambda data: data["events"][60].pop("parameters"), r"event 60 lacks the fields \['parameters'\]"),
            (lambda data: data["events"][60].update(t=1), r"event 60 .* the unknown fields \['t'\]"),
            (lambda data: data["events"][60].update(server="gps"), "event 60, a push of lps 0, is at gps, not at lps0"),
            (lambda data: data["final_parameters"].reverse(), "its final version, steps and parameters"),
            (lambda data: data.update(final_version=13), "its final version, steps and parameters"),
            (lambda data: data["initial_parameters"].reverse(), "its initial parameters"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_is_refused_by_its_name(self, data: Any, check_: Any, damage: Callable[[Any], Any], message: str) -> None:
        damage(data)
        with pytest.raises(ValueError, match=rf"recorded\.json is not a complete recording: .*{message}"):
            check_(data)


def check(path: Path) -> None:
    """Fails unless the servers follow the file's record."""
    recording = golden.load(path)
    golden.assert_equal(replay(recording.config, recording.events), recording.events)


def replay(config: Config, record: list[Event]) -> list[Event]:
    """Drives servers and workers through the order of a record. Returns what they did, at the times of the record."""
    cluster = {"halos": Regions, "async_local_sgd": OneServer, "diloco": Lockstep}[config["algorithm"]](config)
    return [cluster.handle(event) for event in record]


class Cluster(ABC):
    """Servers and workers. It has no clock: the record says what comes next."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.workers = [Worker(rank, config) for rank in range(len(reference.local_steps(config)))]
        self.cursor = 0

    @abstractmethod
    def handle(self, event: Event) -> Event:
        """Does what an event's kind, server and worker say. Returns the event as it happened here."""

    def take(self, worker: int) -> tuple[int, int]:
        """Hands out the data of a worker's next round. Returns its first index, and the one after its last."""
        first = self.cursor
        self.cursor += reference.local_steps(self.config)[worker] * self.config["local_batch_size"]
        return first, self.cursor

    def state(self, event: Event, server: ParameterServer, steps: int, **facts: Any) -> Event:
        """Describes the server after an event."""
        happened = Event(event.time, event.kind, event.lps, event.worker, server.version, steps, server.model.numpy())
        return dataclasses.replace(happened, parameters=happened.parameters.copy(), **facts)


class Asynchronous(Cluster):
    """The common part of algorithms with rounds of single workers."""

    def __init__(self, config: Config, servers: list[LocalServer]) -> None:
        super().__init__(config)
        self.servers = servers
        self.pushes: dict[int, tuple[Push, dict[str, Any]]] = {}
        for worker in self.workers:
            server = servers[worker.rank * len(servers) // len(self.workers)]
            self.dispatch(0.0, worker, server.version, server.model.clone())

    def dispatch(self, now: float, worker: Worker, version: int, model: Tensor | None) -> None:
        """Sends a worker into its next round, whose result waits for its event."""
        first, end = self.take(worker.rank)
        steps, position = reference.local_steps(self.config)[worker.rank], first // self.config["global_batch_size"]
        push = worker.run(Pull(version, steps, position, stop=False, vector=model), first)
        facts = {"local_steps": push.steps, "start": now, "samples": (first, end), "position": worker.round.position}
        self.pushes[worker.rank] = push, facts

    def push(self, event: Event) -> tuple[RegionUpdate | None, dict[str, Any]]:
        """Gives a worker's result to its server. Returns the update that it sends, and what is known of the round."""
        push, facts = self.pushes.pop(event.worker)
        server = self.servers[event.lps]
        model, update = receive(server, push)
        self.dispatch(event.time, self.workers[event.worker], server.version, model)
        return update, facts


class Regions(Asynchronous):
    """HALoS."""

    def __init__(self, config: Config) -> None:
        self.gps = GlobalServer(start(), golden.optimizer(config["global_optimizer"]), servers=config["num_lps"])
        self.updates: dict[int, RegionUpdate] = {}
        self.answers: dict[int, GlobalModel] = {}
        self.steps = 0
        servers = [
            LocalServer(index, start(), golden.optimizer(config["local_optimizer"]), config["accumulation"],
                        config["merge_weight"], workers=config["workers_per_lps"])
            for index in range(config["num_lps"])
        ]  # fmt: skip
        super().__init__(config, servers)

    def handle(self, event: Event) -> Event:
        server = self.servers[event.lps]
        if event.kind == "push":
            update, facts = self.push(event)
            if update is not None:
                self.updates[event.lps] = update
            facts |= {"merged_version": server.state_dict()["merged_at"], "sends_update": update is not None}
            return self.state(event, server, self.steps, **facts)
        if event.kind == "update":
            assert event.lps in self.updates, f"the local server {event.lps} has sent no update before {event}"
            update = self.updates.pop(event.lps)
            self.steps += update.steps
            self.answers[event.lps] = self.gps.receive(update)
            return self.state(event, self.gps, self.steps, local_steps=update.steps)
        server.merge(self.answers.pop(event.lps))
        return self.state(event, server, self.steps, merged_version=server.state_dict()["merged_at"])


class OneServer(Asynchronous):
    """Async-Local-SGD."""

    def __init__(self, config: Config) -> None:
        workers, factory = len(reference.local_steps(config)), golden.optimizer(config["global_optimizer"])
        super().__init__(config, [LocalServer(0, start(), factory, None, 1.0, workers=workers)])
        self.steps = 0

    def handle(self, event: Event) -> Event:
        update, facts = self.push(event)
        assert update is None
        self.steps += facts["local_steps"]
        return self.state(event, self.servers[0], self.steps, **facts)


class Lockstep(Cluster):
    """DiLoCo."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.server = SynchronousServer(start(), golden.optimizer(config["outer_optimizer"]))
        self.steps = 0

    def handle(self, event: Event) -> Event:
        begin, mean, brings, positions = self.cursor, torch.zeros_like(self.server.model), 0, []
        rounds = reference.local_steps(self.config)
        for worker, steps in zip(self.workers, rounds, strict=True):
            first, _ = self.take(worker.rank)
            position = first // self.config["global_batch_size"]
            position -= position % steps if len(set(rounds)) == 1 else 0
            push = worker.run(
                Pull(self.server.version, steps, position, False, vector=self.server.model.clone()), first
            )
            assert push.vector is not None
            mean += push.vector / len(rounds)
            brings += push.steps
            positions.append(worker.round.position)
        self.server.receive(mean)
        self.steps += brings
        facts = {"local_steps": brings, "samples": (begin, self.cursor), "position": tuple(positions)}
        return self.state(event, self.server, self.steps, **facts)


class Worker:
    """A worker of the toy problem: a module, its optimizer on its loss, and the package's round and vector."""

    def __init__(self, rank: int, config: Config) -> None:
        self.rank = rank
        self.config = config
        self.module = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(6, dtype=torch.float64))})
        self.optimizer = golden.optimizer(config["worker_optimizer"])(self.module.parameters())
        self.vector = ModelVector(self.module)
        self.round = WorkerRound(rank, 0)

    def run(self, pull: Pull, cursor: int) -> Push:
        """Trains from a model, on the data that begins at an index."""
        assert pull.vector is not None
        self.round.receive(pull, waited=0.0)
        self.vector.write(pull.vector)
        while not self.round.over:
            step = self.round.position + self.round.batches + 1
            self.optimizer.param_groups[0]["lr"] = reference.learning_rate(self.config["worker_lr_schedule"], step)
            indices = torch.arange(cursor, cursor + self.config["local_batch_size"], dtype=torch.float64)
            cursor += len(indices)
            batch = torch.sin(0.37 * indices[:, None] + torch.arange(6))
            loss = 0.5 * (self.module["weight"] - batch.mean(0)).square().sum()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.round.count(steps=1, seconds=1.0)
        return self.round.push(self.vector.pseudo_gradient_(pull.vector))


def start() -> Tensor:
    """The initial model."""
    return torch.linspace(-1, 1, 6, dtype=torch.float64)
