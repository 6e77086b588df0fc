"""The servers reproduce the published HALoS simulator on the toy problem (design, section 4).

`tests/golden/*.json` were meant to hold what the published simulator's own code gives: every event and its parameters.
**The files that this project was given hold a name and a configuration only.** So the record is computed by
`reference.py`, an independent second writing of the published rules that shares no code with `src`, and the real
servers, rounds and vectors are driven through that record event by event and compared to 1e-9.

A file that does hold recorded events is taken as the truth instead: the i-th recorded event is the i-th event of the
rules. Its exact form is not known to us, so it is read leniently; see `read`. `HALOS_GOLDEN_DIR` names another folder.
"""

import json

import numpy as np
import pytest
import torch
from torch import nn

from lightning_halos.core.messages import GlobalModel, Pull
from lightning_halos.core.servers import GlobalServer, LocalServer
from lightning_halos.core.vector import ModelVector
from lightning_halos.core.worker import WorkerRound

from . import golden, reference

FILES = [path for path in golden.FILES if golden.load(path)["config"]["algorithm"] == "halos"]
TWO_REGIONS = golden.load(golden.SHIPPED / "halos_two_regions.json")["config"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_servers_reproduce_the_record_of(path):
    """A file without events is a configuration only: then the record is the independent reference's."""
    check(path)


def test_there_is_something_to_reproduce():
    assert FILES, f"no configuration with algorithm 'halos' in {golden.FOLDER}"


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
def test_the_servers_reproduce_two_regions_with(change):
    config = TWO_REGIONS | change
    replay(config, reference.record(config))


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
def test_what_the_rules_do_not_say_is_refused(change, message):
    with pytest.raises(AssertionError, match=f"{message}.* is not known here"):
        golden.record_of({"config": TWO_REGIONS | change})


def test_the_first_round_of_the_reference_is_what_a_pocket_calculator_gives():
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
def test_the_reference_runs_until_the_global_server_has_its_steps(path):
    config = json.loads(path.read_text())["config"]
    events = reference.record(config)
    assert events[-2].steps < config["total_local_steps"] <= events[-1].steps
    times = np.array([event.time for event in events])
    assert np.diff(times).min() > 1e-3, "two events so close that rounding decides their order"
    assert {(event.kind, event.lps) for event in events} == {
        (kind, lps) for kind in ("push", "update", "merge") for lps in range(config["num_lps"])
    }


class TestARecordedFile:
    """The reader of files that hold events, tried on files made from the reference."""

    @pytest.fixture
    def recorded(self):
        events = [
            {"virtual_time_ms": e.time, "server": f"lps{e.lps}", "worker_id": e.worker, "version": e.version,
             "params": e.parameters.tolist()}
            for e in reference.record(TWO_REGIONS)
        ]  # fmt: skip
        return {"name": "recorded", "config": TWO_REGIONS, "events": events, "final_params": events[-1]["params"]}

    @pytest.fixture
    def check_(self, tmp_path):
        def check_(recorded):
            (tmp_path / "recorded.json").write_text(json.dumps(recorded))
            check(tmp_path / "recorded.json")

        return check_

    def test_passes_if_it_is_right(self, recorded, check_):
        check_(recorded)

    def test_may_have_other_names_and_nested_parameters(self, recorded, check_):
        recorded["events"] = [
            {"t": e["virtual_time_ms"], "kind": "x", "after": {"weight": [e["params"]]}} for e in recorded["events"]
        ]
        recorded["final"] = {"weight": recorded.pop("final_params")}
        check_(recorded)

    def test_may_go_on_after_the_end_of_the_run(self, recorded, check_):
        events = reference.record(TWO_REGIONS, at_least=len(recorded["events"]) + 50)
        assert any(e.kind == "update" for e in events[-50:])  # the global server applies it no more
        recorded["events"] = [{"time": e.time, "params": e.parameters.tolist()} for e in events]
        check_(recorded)

    @pytest.mark.parametrize("number", [0, 60, -1])
    @pytest.mark.parametrize("amount", [1e-6, -1e-8])
    def test_fails_if_a_parameter_is_off(self, recorded, check_, number, amount):
        recorded["events"][number]["params"] = [*recorded["events"][number]["params"]]
        recorded["events"][number]["params"][3] += amount
        with pytest.raises(AssertionError, match=f"event {number % len(recorded['events'])} .*parameters"):
            check_(recorded)

    def test_fails_if_a_final_parameter_is_off(self, recorded, check_):
        recorded["final_params"] = [value + 1e-6 for value in recorded["final_params"]]
        with pytest.raises(AssertionError, match="final parameters"):
            check_(recorded)

    def test_fails_if_a_time_is_off(self, recorded, check_):
        recorded["events"][60]["virtual_time_ms"] += 1e-5
        with pytest.raises(AssertionError, match=r"event 60 .*ms"):
            check_(recorded)

    def test_fails_if_events_are_missing(self, recorded, check_):
        del recorded["events"][-3:]
        with pytest.raises(AssertionError, match="115 events, but the rules give 118"):
            check_(recorded)

    def test_fails_if_two_events_changed_places(self, recorded, check_):
        events = recorded["events"]
        events[60], events[61] = events[61], events[60]
        with pytest.raises(AssertionError, match="event 60 "):
            check_(recorded)

    def test_fails_if_an_event_has_no_vector(self, recorded, check_):
        del recorded["events"][60]["params"]
        with pytest.raises(AssertionError, match=r"event 60 .*exactly one list of 6 numbers"):
            check_(recorded)


def check(path):
    """Fails unless the real servers follow the file's record, or the reference's if the file holds none."""
    data = golden.load(path)
    record, finals = golden.record_of(data)
    final = replay(data["config"], record)
    if finals:
        distance = min(np.abs(final - np.array(vector)).max() for vector in finals)
        assert distance < golden.PARAMETERS, f"the final parameters are {final}, {path} has {finals}"


def replay(config, record):
    """Drives the real servers through a record; returns the final parameters of the global server."""
    cluster = Cluster(config)
    for number, event in enumerate(record):
        server = getattr(cluster, event.kind)(event.lps, event.worker)
        place = f"event {number} ({event})"
        assert server.version == event.version, f"{place}: version {server.version}"
        assert cluster.gps.steps == event.steps, f"{place}: {cluster.gps.steps} steps counted"
        distance = np.abs(server.model.numpy() - event.parameters).max()
        assert distance < golden.PARAMETERS, f"{place}: parameters {server.model.tolist()} are {distance:.1e} off"
    return cluster.gps.model.numpy()


class Cluster:
    """The real servers and workers, and the messages on their way. It has no clock: the record says what comes next."""

    def __init__(self, config):
        self.config = config
        self.gps = GlobalServer(start(), golden.optimizer(config["global_optimizer"]), servers=config["num_lps"])
        self.lps = [
            LocalServer(index, start(), golden.optimizer(config["local_optimizer"]), config["accumulation"],
                        config["merge_weight"], workers=config["workers_per_lps"])
            for index in range(config["num_lps"])
        ]  # fmt: skip
        self.cursor = 0
        self.updates, self.answers, self.pushes = {}, {}, {}
        self.workers = [Worker(rank, config) for rank in range(config["num_lps"] * config["workers_per_lps"])]
        for worker in self.workers:
            server = self.lps[worker.rank // config["workers_per_lps"]]
            self.dispatch(worker, server.version, server.model.clone())

    def dispatch(self, worker, version, model):
        steps = reference.local_steps(self.config)[worker.rank]
        position = self.cursor // self.config["global_batch_size"]
        pull = Pull(version, steps, position, stop=False, vector=model)
        self.pushes[worker.rank] = worker.run(pull, self.cursor)
        self.cursor += steps * self.config["local_batch_size"]

    def push(self, lps, worker):
        server = self.lps[lps]
        model, update = server.receive(self.pushes.pop(worker))
        if update is not None:
            self.updates[lps] = update
        self.dispatch(self.workers[worker], server.version, model)
        return server

    def update(self, lps, _):
        assert lps in self.updates, f"the local server {lps} has sent no update"
        update = self.updates.pop(lps)
        if self.gps.steps < self.config["total_local_steps"]:
            self.answers[lps] = self.gps.receive(update)
        else:
            self.answers[lps] = GlobalModel(self.gps.version, vector=self.gps.model.clone())
        return self.gps

    def merge(self, lps, _):
        self.lps[lps].merge(self.answers.pop(lps))
        return self.lps[lps]


class Worker:
    """A worker of the toy problem: a module, its optimizer on its loss, and the package's round and vector."""

    def __init__(self, rank, config):
        self.rank = rank
        self.config = config
        self.module = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(6, dtype=torch.float64))})
        self.optimizer = golden.optimizer(config["worker_optimizer"])(self.module.parameters())
        self.vector = ModelVector(self.module)
        self.round = WorkerRound(rank, 0)

    def run(self, pull, cursor):
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
            self.round.compute(steps=1, seconds=1.0)
        return self.round.push(self.vector.pseudo_gradient_(pull.vector))


def start():
    return torch.linspace(-1, 1, 6, dtype=torch.float64)
