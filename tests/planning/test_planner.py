"""A plan has the events of the nodes on the same cluster, one by one."""

import dataclasses
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lightning_halos.core.algorithms import ALGORITHMS, AsyncLocalSGD, Diloco, Halos, SyncSGD
from lightning_halos.core.global_server import GlobalServer
from lightning_halos.core.messages import Pull, Push
from lightning_halos.core.schedule import StepBudget
from lightning_halos.planning.planner import MS_PER_HOUR, make_timing, plan
from lightning_halos.planning.random_cluster import random_cluster
from lightning_halos.planning.sweep import Trial, recommend, sweep, sweep_table
from lightning_halos.simulation.cluster import SimulatedCluster
from lightning_halos.simulation.network import Work
from lightning_halos.simulation.networks import make_network
from tests.simulation.paper import PAPER

UNEQUAL = SimulatedCluster(  # asymmetric links, regions of 2, 5 and 3, the global server in none of the ends
    bandwidths=[[10, 0.3, 0.05], [1.5, 20, 0.4], [0.2, 0.8, 5]],
    worker_speeds=[[1, 0.4], [3, 2.5, 0.1, 1, 1], [0.7, 0.7, 2]],
    step_ms=120,
    message_bytes=40_000_000,
    global_region=1,
)


@dataclass(frozen=True)
class Event:
    time: float
    kind: str  # "push", "update" or "merge"
    server: int
    worker: int  # of a push; else -1
    version: int  # of the server that it happened to, afterwards
    staleness: int  # of a merge: 0
    steps: int  # local steps that the server has counted; of a merge: 0


def events_of_nodes(algorithm, timing, horizon, monkeypatch):
    """The events of the nodes with a model that has no elements."""
    cluster = timing.cluster
    counted = []  # by the global server, after each update
    receive = GlobalServer.receive

    def count(server, *arguments):
        answer = receive(server, *arguments)
        counted.append(server.steps)
        return answer

    monkeypatch.setattr(GlobalServer, "receive", count)
    topology = algorithm.arrange(cluster.regions, cluster.names, cluster.global_region)
    work, shapes = Work(StepBudget(cluster.num_workers)), [torch.Size([0])]
    network = make_network(algorithm, topology, timing, work, shapes, torch.empty(0))
    network.start()
    versions = [0] * cluster.num_workers
    while (ended := network.due())[0].end <= horizon:
        (r,) = ended
        network.finish([Push(r.worker, versions[r.worker], r.steps, r.steps, 1.0, vector=torch.empty(0))])
        for worker, message in network.outbox:
            if isinstance(message, Pull):
                versions[worker] = message.version
        network.outbox.clear()

    events, total, own = [], 0, [0] * len(topology.groups)
    for e in network.history:
        steps = 0
        if e.kind == "push":
            own[e.server] += e.steps - total
            total, steps = e.steps, own[e.server]
        elif e.kind == "update":
            steps = counted.pop(0)
        if e.time <= horizon:
            events.append(Event(e.time, e.kind, e.server, e.worker, e.version, e.staleness, steps))
    return in_order(events)


def planned(result, steps):
    """The plan's events, in the same form and order."""
    recording, events, taken = result.recording, [], {}
    for group, pushes in zip(recording.groups, recording.pushes, strict=True):
        counted = 0
        rows = zip(pushes.times.tolist(), pushes.senders.tolist(), pushes.staleness.tolist(), strict=True)
        for version, (time, worker, staleness) in enumerate(rows, start=1):
            counted += steps[worker]
            taken[group.index, version] = counted
            events.append(Event(time, "push", group.index, worker, version, staleness, counted))
    sent = {}
    for group, own in zip(recording.groups, recording.exchanges, strict=False):
        before = 0
        for arrived, version in zip(own.arrived.tolist(), own.sent_versions.tolist(), strict=True):
            sent[group.index, arrived] = taken[group.index, version] - before
            before = taken[group.index, version]
        for merged, version in zip(own.merged.tolist(), own.merged_versions.tolist(), strict=True):
            if merged <= recording.until_ms:
                events.append(Event(merged, "merge", group.index, -1, version, 0, 0))
    if recording.updates is not None:
        counted, updates = 0, recording.updates
        rows = zip(updates.times.tolist(), updates.senders.tolist(), updates.staleness.tolist(), strict=True)
        for version, (time, index, staleness) in enumerate(rows, start=1):
            counted += sent[index, time]
            events.append(Event(time, "update", index, -1, version, staleness, counted))
    return in_order(events)


def in_order(events):
    """Puts simultaneous events of different kinds into one order: they are at different servers."""
    ranks = {"push": 0, "update": 1, "merge": 2}
    return sorted(events, key=lambda event: (event.time, ranks[event.kind], event.server * (event.kind == "merge")))


def draw(seed):
    """A random cluster and random settings."""
    rng = random.Random(seed)
    regions = rng.randint(1, 4)
    cluster = SimulatedCluster(
        [[10 ** rng.uniform(-1.0, 2.0 if a == b else 0.5) for b in range(regions)] for a in range(regions)],
        [[rng.uniform(0.1, 1.0) for _ in range(rng.randint(1, 4))] for _ in range(regions)],
        step_ms=rng.uniform(20, 400),
        message_bytes=int(10 ** rng.uniform(5, 8.5)),
        global_region=rng.randrange(regions),
    )
    halos = Halos(
        local_steps=rng.randint(1, 10),
        dynamic_local_steps=rng.random() < 0.7,
        accumulate_updates=rng.choice([None, rng.randint(1, 12)]),
        updates_per_worker=rng.randint(1, 4),
        servers_per_region=rng.randint(1, min(2, *map(len, cluster.regions))),
    )
    return cluster, halos


CASES = {
    "paper": (PAPER, Halos()),
    "paper, each worker H steps, K=3": (PAPER, Halos(local_steps=5, dynamic_local_steps=False, accumulate_updates=3)),
    "paper, 2 servers per region": (PAPER, Halos(servers_per_region=2)),
    "paper, 4 servers per region, K=1": (PAPER, Halos(local_steps=2, accumulate_updates=1, servers_per_region=4)),
    "unequal": (UNEQUAL, Halos()),
    "unequal, 2 servers per region, K=5": (UNEQUAL, Halos(local_steps=3, accumulate_updates=5, servers_per_region=2)),
    "one region": (SimulatedCluster([[1.0]], [[1, 2, 3]], 50, 10**6), Halos()),
    "one worker": (SimulatedCluster([[1.0]], [[1]], 50, 10**6), Halos(accumulate_updates=1)),
    "alike": (
        SimulatedCluster([[1, 0.1], [0.1, 1]], [[1, 1], [1, 1]], 50, 10**7),
        Halos(local_steps=4, accumulate_updates=2),
    ),
    "paper, int4 between regions": (PAPER, Halos(wire={"between": "int4"})),
    "unequal, bfloat16 and int8": (UNEQUAL, Halos(wire={"within": "bfloat16", "between": "int8"})),
    "one server": (PAPER, AsyncLocalSGD()),
    "one server, int8": (PAPER, AsyncLocalSGD(wire="int8")),
    "one server, unequal": (UNEQUAL, AsyncLocalSGD(local_steps=5)),
    **{f"random {seed}": draw(seed) for seed in range(50)},
}
CASES |= {
    f"{name}, overlap": (cluster, dataclasses.replace(algorithm, overlap=True))
    for number, (name, (cluster, algorithm)) in enumerate(CASES.items())
    if number % 4 == 0
}
# Servers that are busy for a little or for most of the time, so that pushes wait.
CASES |= {
    f"{name}, {speed:g} GB/s": (dataclasses.replace(cluster, server_gigabytes_per_second=speed), algorithm)
    for number, (name, (cluster, algorithm)) in enumerate(CASES.items())
    if number % 5 == 0
    for speed in ([5.0, 0.2][number // 5 % 2],)
}


class TestEvents:
    @pytest.mark.parametrize(("cluster", "algorithm"), CASES.values(), ids=CASES)
    def test_are_those_of_the_nodes(self, cluster, algorithm, monkeypatch):
        timing = make_timing(cluster)
        steps = timing.local_steps(algorithm.local_steps, algorithm.dynamic_local_steps)
        slowest = max(timing.round(w, cluster.region_of[w], steps[w]) for w in range(cluster.num_workers))
        horizon = 25.5 * slowest  # no event is at the horizon, where rounding would decide
        expected = events_of_nodes(algorithm, timing, horizon, monkeypatch)

        result = plan(algorithm, timing, horizon / MS_PER_HOUR, record_ms=horizon)

        assert planned(result, steps) == expected
        check_numbers(result, expected, cluster, timing.on(algorithm.wire))

    @pytest.mark.parametrize(
        ("overlap", "times"), [(False, [102, 102, 214, 224, 326, 336]), (True, [101, 101, 201, 201, 301, 301])]
    )
    def test_pushes_wait_for_a_server_that_is_busy(self, overlap, times):
        """Models take 1 ms, rounds 100 ms, and the server 10 ms for each push."""
        cluster = SimulatedCluster([[8.0]], [[1, 1]], 50, 10**6, server_gigabytes_per_second=0.1)
        result = plan(Halos(local_steps=2, overlap=overlap), make_timing(cluster), record_ms=340.0)
        assert result.recording.pushes[0].times[:6].tolist() == pytest.approx(times, abs=1e-3)

    def test_are_recorded_up_to_the_time_asked_for_and_change_nothing_else(self):
        timing = make_timing(PAPER)
        complete, part = (plan(Halos(), timing, record_ms=ms) for ms in (MS_PER_HOUR, 100_000.0))
        steps = timing.local_steps(8, True)
        early = [event for event in planned(complete, steps) if event.time <= 100_000]
        assert planned(part, steps) == early
        assert (part.pushes, part.updates) == (complete.pushes, complete.updates)
        assert part.bytes_between == complete.bytes_between


def check_numbers(result, events, cluster, timing):
    """The plan's sums are those over the events."""
    pushes, updates, merges = ([e for e in events if e.kind == kind] for kind in ("push", "update", "merge"))
    for number in range(len(result.recording.groups)):
        own = [event for event in pushes if event.server == number]
        assert result.recording.pushes[number].missed_steps.tolist() == missed_steps(own, lambda event: event.worker)
    check_staleness(result.pushes, pushes)
    if result.updates is not None:
        check_staleness(result.updates, updates)
        missed = missed_steps(updates, lambda event: event.server)
        assert result.recording.updates.missed_steps.tolist() == missed
        assert result.updates.missed_steps == pytest.approx(np.mean(missed), rel=1e-12)
        assert result.sent_share == pytest.approx(sent_share(result, events))
    assert result.global_updates == (len(pushes) if result.updates is None else len(updates))
    assert result.rounds.tolist() == [sum(e.worker == w for e in pushes) for w in range(cluster.num_workers)]
    local_steps = sum(int(result.local_steps[event.worker]) for event in pushes)
    seconds = result.elapsed_ms / 1e3 * cluster.num_workers / local_steps
    assert result.seconds_per_global_step == pytest.approx(seconds, rel=1e-12)

    groups = result.recording.groups
    inside = between = 0
    for event in events:
        server = groups[event.server].region
        is_push = event.kind == "push"
        messages = 2 if is_push else 1
        if server == (cluster.region_of[event.worker] if is_push else cluster.global_region):
            inside += messages * timing.bytes_within
        else:
            between += messages * timing.bytes_between
    assert (result.bytes_inside, result.bytes_between) == (inside, between)
    assert merges or result.updates is None


def sent_share(result, events):
    """Share of pushes that arrived outside of an exchange, up to the last merges."""
    counted = {
        server: [0, 0] for server in range(len(result.accumulate_updates))
    }  # since the merge, and held by updates
    totals = []
    for server, count in counted.items():
        own, total = [], 0
        for event in events:
            if event.server != server:
                continue
            if event.kind == "push":
                total += 1
                if count[0] < result.accumulate_updates[server]:
                    count[0] += 1
                    own.append(total)
            elif event.kind == "merge":
                count[1], count[0] = len(own), 0
                merged = total
        totals.append((count[1], merged if count[1] else 0))
    return sum(held for held, _ in totals) / sum(total for _, total in totals)


def missed_steps(events, sender):
    """Local steps that a server counted between a sender's updates, without the sender's own."""
    answered, missed, before = {}, [], 0
    for event in events:
        missed.append(before - answered.get(sender(event), 0))
        answered[sender(event)] = before = event.steps
    return missed


def check_staleness(staleness, events):
    values = [event.staleness for event in events]
    assert staleness.count == len(values)
    assert staleness.mean == pytest.approx(np.mean(values), rel=1e-12)
    assert staleness.p95 == np.percentile(values, 95, method="inverted_cdf")
    assert staleness.maximum == max(values)


class TestMissedSteps:
    def test_are_the_local_steps_that_others_finished_meanwhile(self):
        cluster = SimulatedCluster(
            [[1000.0]], [[1.0, 0.25]], 100, 1000
        )  # rounds of about 800 and 800 ms: 8 and 2 steps
        result = plan(Halos(), make_timing(cluster), hours=0.02)
        # The faster worker's pushes come first (rank 0): it misses the other's 2 steps, which misses its 8.
        assert result.local_steps.tolist() == [8, 2]
        pairs = result.pushes.count // 2
        assert result.pushes.missed_steps == pytest.approx((8 * pairs + 2 * (pairs - 1)) / (2 * pairs))
        assert result.updates is None  # a single server exchanges nothing

    def test_of_region_updates_are_the_steps_of_other_servers(self):
        cluster = SimulatedCluster([[1000, 1], [1, 1000]], [[1.0], [1.0]], 100, 1000)
        result = plan(Halos(local_steps=4, accumulate_updates=3), make_timing(cluster), hours=0.1)
        # Both servers exchange in turn: each update but the very first misses one of the other's, of about 3 rounds.
        assert result.updates.maximum == 1
        assert result.updates.missed_steps == pytest.approx(12 * (result.updates.count - 1) / result.updates.count)


class TestLockstep:
    @pytest.mark.parametrize(
        ("algorithm", "local_steps", "dynamic"),
        [("sync_sgd", 1, False), ("diloco", 32, False), ("diloco_dynamic", 32, True)],
    )
    @pytest.mark.parametrize("cluster", [PAPER, UNEQUAL], ids=["paper", "unequal"])
    def test_rounds_take_the_slowest_worker_and_an_all_reduce(self, algorithm, local_steps, dynamic, cluster):
        timing = make_timing(cluster)
        steps = timing.local_steps(local_steps, dynamic)
        compute = [timing.compute(worker, steps[worker]) for worker in range(cluster.num_workers)]
        duration = max(compute) + timing.all_reduce()
        ends, now = [], 0.0
        while (now := now + duration) <= MS_PER_HOUR:
            ends.append(now)

        result = plan(ALGORITHMS[algorithm](), timing, record_ms=MS_PER_HOUR)

        assert result.recording.rounds.tolist() == ends
        assert result.rounds.tolist() == [len(ends)] * cluster.num_workers
        assert result.elapsed_ms == ends[-1]
        assert result.seconds_per_global_step == pytest.approx(duration / 1e3 * len(steps) / sum(steps), rel=1e-9)
        computing, communicating, waiting = result.round_ms.T
        assert computing.tolist() == compute
        assert set(communicating) == {timing.all_reduce()}
        assert waiting.min() == 0
        assert (computing + waiting).tolist() == pytest.approx([max(compute)] * len(compute))
        assert (result.pushes.maximum, result.updates) == (0, None)
        assert result.updates_per_second == pytest.approx(1e3 / duration, rel=1e-9)

    @pytest.mark.parametrize("kind", ["ring", "star"])
    def test_a_ring_crosses_as_many_links_as_there_are_regions_and_a_star_one_for_each_other_region(self, kind):
        result = plan(SyncSGD(), make_timing(dataclasses.replace(UNEQUAL, all_reduce=kind)), hours=0.1)
        rounds, workers = int(result.rounds[0]), 10
        total = rounds * 2 * (workers - 1) * 40_000_000
        assert result.bytes_between == (total * 3 // workers if kind == "ring" else rounds * 2 * 2 * 40_000_000)
        assert result.bytes_inside + result.bytes_between == total

    def test_a_single_region_sends_nothing_outside(self):
        result = plan(Diloco(), make_timing(SimulatedCluster([[1.0]], [[1, 1, 1]], 50, 1000)), hours=0.1)
        assert result.bytes_between == 0
        assert result.bytes_inside == result.rounds[0] * 2 * 2 * 1000

    def test_a_single_worker_reduces_nothing(self):
        result = plan(SyncSGD(), make_timing(SimulatedCluster([[1.0]], [[1]], 50, 1000)), hours=0.1)
        assert result.bytes_inside == result.bytes_between == 0
        assert result.shares.tolist() == [1, 0, 0]


class TestThePapersFinding:
    """Section 1 of the paper, in its environment."""

    @pytest.mark.parametrize("algorithm", ["sync_sgd", "diloco", "diloco_dynamic"])
    def test_synchronous_methods_spend_over_80_percent_of_the_time_not_computing(self, algorithm):
        assert 1 - plan(ALGORITHMS[algorithm](), make_timing(PAPER)).shares[0] > 0.8

    def test_async_local_sgd_spends_about_30_percent_of_a_mean_round_in_communication(self):
        result = plan(AsyncLocalSGD(), make_timing(PAPER))
        assert result.round_shares[1] == pytest.approx(0.29, abs=0.01)
        assert result.shares[1] == pytest.approx(0.41, abs=0.01)  # of the workers' time

    def test_halos_keeps_workers_busy_and_is_fastest_per_global_step(self):
        plans = {algorithm: plan(ALGORITHMS[algorithm](), make_timing(PAPER)) for algorithm in ALGORITHMS}
        assert plans["halos"].shares[0] > 0.97
        assert min(plans, key=lambda a: plans[a].seconds_per_global_step) == "halos"


class TestShares:
    def test_are_of_all_workers_alike_or_of_all_rounds_alike(self):
        # Worker 0 communicates 0 % of a round of 1 s, worker 1 half of a round of 2 s.
        cluster = SimulatedCluster([[1e6, 0.008], [0.008, 1e6]], [[1.0], [1.0]], 1000, 500_000)
        result = plan(AsyncLocalSGD(local_steps=1), make_timing(cluster))
        assert result.worker_shares[:, 1] == pytest.approx([0, 0.5], abs=1e-3)
        assert result.shares == pytest.approx([0.75, 0.25, 0], abs=1e-3)
        assert result.round_shares == pytest.approx([5 / 6, 1 / 6, 0], abs=1e-3)


class TestErrors:
    @pytest.mark.parametrize("hours", [0, -1, float("inf"), float("nan")])
    def test_hours_that_are_no_duration(self, hours):
        with pytest.raises(ValueError, match=rf"hours={hours} must be a positive number"):
            plan(Halos(), make_timing(PAPER), hours)

    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_a_time_in_which_nothing_is_finished(self, algorithm):
        with pytest.raises(ValueError, match=r"hours=0.0001 is too short: the first round of .* Give at least that"):
            plan(ALGORITHMS[algorithm](), make_timing(PAPER), 0.0001)

    def test_a_model_of_unknown_size(self):
        with pytest.raises(ValueError, match=r"message_bytes is missing.*--message-bytes"):
            make_timing(SimulatedCluster([[1.0]], [[1]], 50))

    def test_a_size_that_is_none(self):
        with pytest.raises(ValueError, match=r"message_bytes=0 must be"):
            make_timing(PAPER, 0)

    def test_more_servers_than_workers(self):
        with pytest.raises(ValueError, match=r"servers_per_region=3 is more than the 2 worker"):
            plan(Halos(servers_per_region=3), make_timing(UNEQUAL))


@pytest.fixture(scope="module")
def trials():
    return sweep(make_timing(PAPER), 0.3, local_steps=(1, 8), updates_per_worker=(2, 8), servers_per_region=(1, 4, 5))


class TestSweep:
    def test_tries_every_combination_that_the_smallest_region_has_workers_for(self, trials):
        tried = [(trial.local_steps, trial.updates_per_worker, trial.servers_per_region) for trial in trials]
        assert sorted(tried) == [(h, k, s) for h in (1, 8) for k in (2, 8) for s in (1, 4)]
        for trial in trials:
            assert set(trial.plan.accumulate_updates) == {trial.updates_per_worker * 4 // trial.servers_per_region}

    def test_recommends_the_least_staleness_among_busy_settings(self, trials):
        busy = [trial for trial in trials if trial.local_steps == 8]  # one step per round keeps nobody busy
        assert recommend(trials) is min(busy, key=lambda trial: trial.behind)
        assert recommend(trials, keep=0) is min(trials, key=lambda trial: trial.behind)
        assert recommend(trials, keep=0).local_steps == 1

    def test_recommends_only_what_sends_as_many_pushes_as_asked_for(self, trials):
        sent = sorted(trial.sent for trial in trials if trial.local_steps == 8)
        assert sent[0] < recommend(trials, sent=sent[-1]).sent == sent[-1]
        assert recommend(trials, sent=1.0) is None

    def test_marks_what_nothing_beats(self, trials):
        unbeaten = [trial for trial in trials if not any(other.beats(trial) for other in trials)]
        assert recommend(trials) in unbeaten
        assert 0 < len(unbeaten) < len(trials)
        assert sweep_table(trials, make_timing(PAPER)).count("*\n") + 1 == len(unbeaten)  # one has the mark *< too
        assert not any(trial.beats(trial) for trial in trials)

    def test_counts_staleness_in_global_steps(self):
        result = plan(Halos(), make_timing(PAPER))
        steps = result.pushes.missed_steps + result.updates.missed_steps
        assert Trial(8, 8, 1, result).behind == pytest.approx(steps / 16)

    def test_wants_enough_time_for_an_exchange(self):
        with pytest.raises(ValueError, match=r"hours=0.01 is too short"):
            sweep(make_timing(PAPER), 0.01, local_steps=(32,))


class TestRandomCluster:
    def test_is_the_same_for_the_same_seed_only(self):
        assert random_cluster(3, 2, 5) == random_cluster(3, 2, 5) != random_cluster(3, 2, 6)

    def test_is_in_the_ranges_of_the_paper(self):
        cluster = random_cluster(20, 30)
        speeds, links = np.array(cluster.worker_speeds), np.array(cluster.bandwidths)
        between = links[~np.eye(20, dtype=bool)]
        assert (speeds.shape, links.shape) == ((20, 30), (20, 20))
        assert 0.1 <= speeds.min() < 0.12 < 0.98 < speeds.max() <= 1
        assert 0.1 <= between.min() < 0.12 < 0.9 < between.max() <= 1
        assert speeds.mean() == pytest.approx(0.55, abs=0.03)
        assert between.mean() == pytest.approx(0.39, abs=0.05)
        assert (links == links.T).all()
        assert set(links.diagonal()) == {100}
        assert (cluster.step_ms, cluster.message_bytes) == (PAPER.step_ms, PAPER.message_bytes)

    @pytest.mark.parametrize(
        ("arguments", "name"),
        [
            ((0, 4), "regions"),
            ((4, 0), "workers_per_region"),
            ((4, 4, -1), "seed"),
            ((99999999, 1), "regions=99999999 with workers_per_region"),
            ((2, 10**9), "regions=2 with workers_per_region"),
        ],
    )
    def test_refuses_wrong_numbers(self, arguments, name):
        with pytest.raises(ValueError, match=f"{name}="):
            random_cluster(*arguments)


@pytest.mark.parametrize(
    ("algorithm", "change", "hours"),
    [
        (Halos(), {}, 1e9),
        (Diloco(), {}, 1e9),
        (Halos(), {"worker_speeds": [[1.0, 1e-12]]}, 1e6),
        (Diloco(), {"step_ms": 1e-7, "message_bytes": 1}, 1e3),
    ],
    ids=["hours", "hours of synchronous rounds", "a slow worker", "short steps"],
)
def test_more_rounds_than_fit_into_memory_are_refused(algorithm, change, hours):
    right = {"bandwidths": [[1e6]], "worker_speeds": [[1.0, 1.0]], "step_ms": 1.0, "message_bytes": 1}
    with pytest.raises(ValueError, match=r"In hours=.* rounds, and a plan has at most 1e\+09\. .* step_ms"):
        plan(algorithm, make_timing(SimulatedCluster(**{**right, **change})), hours)
