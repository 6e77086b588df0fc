"""Processes of workers of several lanes: nodes, hosts and links for real, and workers that only count and send."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import TCPStore

from lightning_halos.core.cursor import DataCursor, LeaseStock, Spans
from lightning_halos.core.delayed_nesterov import DelayedNesterov
from lightning_halos.core.global_node import GlobalNode
from lightning_halos.core.global_server import GlobalServer
from lightning_halos.core.layout import Layout
from lightning_halos.core.local_server import LocalServer
from lightning_halos.core.messages import Marker, Publish, ShardWritten
from lightning_halos.core.region_node import RegionNode
from lightning_halos.core.schedule import RoundPlanner, StepBudget
from lightning_halos.core.snapshot import Shard
from lightning_halos.core.topology import Topology
from lightning_halos.core.vector import Advance
from lightning_halos.core.worker import WorkerRound
from lightning_halos.transport.groups import Groups
from lightning_halos.transport.hosts import Host, RegionHost
from lightning_halos.transport.link import wait_all
from lightning_halos.transport.runtime import NodeRuntime
from tests.integration.harness import free_port

REGIONS = [[0, 1], [2]]
WORKERS = 3
SHAPES = [torch.Size([2, 3]), torch.Size([3])]
SIZES = [6, 3, 4]  # two parameters and an averaged tensor
STEPS = 40  # local steps of an epoch
ROUNDS = 7  # of each worker, however fast it is
OPTIMIZER = partial(DelayedNesterov, lr=0.2, momentum=0.9, delay=2)


@dataclass(frozen=True)
class Plan:
    """What all processes do.

    Attributes:
        lanes: Number of lanes.
        shards: Elements of each lane's piece of the tensors that are sharded.
        spoiled: Worker and round of a push that has a NaN in lane 1's slice only; else in no slice.
        killed: Process that is killed in the middle of a push, and the round.
        snapshot: Round of worker 0 after which a snapshot starts.
        timeout: Seconds of silence after which a peer counts as lost.
    """

    lanes: int = 2
    shards: tuple[tuple[int, tuple[int, ...]], ...] = ((0, (6, 0)),)
    spoiled: tuple[int, int] | None = None
    killed: tuple[int, int] | None = None
    snapshot: int | None = None
    timeout: float = 30.0

    @property
    def layout(self) -> Layout:
        return Layout.build(SIZES, 2, self.lanes, dict(self.shards) if self.lanes > 1 else {})

    def environments(self) -> list[dict[str, str]]:
        port = str(free_port())
        return [{"HALOS_TEST_PORT": port, "HALOS_TEST_PROCESS": str(p)} for p in range(WORKERS * self.lanes)]


def gradient(plan: Plan, worker: int, number: int) -> Tensor:
    """The complete vector of a push. The second parameter is touched in one of its lanes only, or in none."""
    vector = torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(100 * worker + number))
    vector[6:9] *= torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])[number % 3]
    if plan.spoiled == (worker, number):
        vector[8] = torch.nan
    return vector


def make_region_node(
    index: int, model: Tensor, shapes: Sequence[torch.Size], state: Mapping[str, Any] | None = None
) -> RegionNode:
    """Makes the node of a local server, in the state of a snapshot."""
    ranks, total = REGIONS[index], 0 if state is None else state["total"]
    server = LocalServer(index, model, OPTIMIZER, 3, 0.25, shapes, len(ranks), max_norm_ratio=50.0)
    node = RegionNode(server, RoundPlanner(4, True, WORKERS), ranks, StepBudget(WORKERS, total=total), LeaseStock(8))
    if state is not None:
        node.load_state_dict(state[f"server-{index}"])
    return node


def make_global_node(model: Tensor, shapes: Sequence[torch.Size], state: Mapping[str, Any] | None = None) -> GlobalNode:
    """Makes the global node, in the state of a snapshot."""
    total, done = (0, []) if state is None else (state["total"], state["done"])
    server = GlobalServer(model, OPTIMIZER, shapes, len(REGIONS))
    cursor = DataCursor(STEPS, None, Spans(done))
    node = GlobalNode(server, len(REGIONS), StepBudget(WORKERS, total=total), cursor, Spans(done))
    if state is not None:
        node.load_state_dict(state["global"])
    return node


def start_model() -> Tensor:
    return torch.linspace(-1, 1, sum(SIZES))


def work(plan: Plan, states: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """A process: one lane of a worker. Returns what it has seen, and the states of its nodes.

    Args:
        plan: What to do.
        states: The states to resume from, by lane.
    """
    process, port = int(os.environ["HALOS_TEST_PROCESS"]), int(os.environ["HALOS_TEST_PORT"])
    worker, lane = divmod(process, plan.lanes)
    store = TCPStore("127.0.0.1", port, is_master=process == 0, wait_for_workers=False)
    topology, layout = Topology.build(REGIONS, 1), plan.layout
    shapes = layout.shapes(lane) if plan.lanes > 1 else SHAPES
    groups = Groups(store, topology, worker, plan.timeout, lambda: None, lane, plan.lanes)
    state = None if states is None else states[lane]
    memory = layout.cut(start_model(), lane)
    index = topology.group_of(worker).index
    if state is not None:
        memory = state[f"server-{index}"]["server"]["model"].clone()
    region_node = make_region_node(index, memory.clone(), shapes, state) if worker == REGIONS[index][0] else None
    global_node = make_global_node(memory.clone(), shapes, state) if worker == 0 else None
    shards: dict[str, Any] = {}
    written: list[str] = []
    handled: dict[str, list[Any]] = {"region": [], "global": []}
    _record(handled, Host, "global")
    _record(handled, RegionHost, "region")
    runtime: NodeRuntime

    def keep(shard: Shard, complete: Any) -> None:
        complete()
        name = "global" if shard.server is None else f"server-{shard.server}"
        shards[name] = {"state": shard.state, "progress": shard.progress}
        runtime.tell(ShardWritten(shard.marker.save, f"{name}.lane-{lane}"))

    runtime = NodeRuntime(
        worker,
        topology,
        groups,
        global_node,
        region_node,
        memory,
        plan.timeout,
        lambda: None,
        keep,
        lambda message: written.append(message.name),
        lane=lane,
        describe=lambda worker, lane: f"lane {lane} of worker {worker}",
    )
    _wait_for_all(store, plan, process, "ready")  # as a fit does
    alarm, client, delays = runtime.alarm, runtime.client, random.Random(process)
    round_, pulls, leases, reads = WorkerRound(worker, 4), [], [], []

    def fill(advance: Advance) -> None:
        if plan.killed == (process, round_.number):
            os.kill(os.getpid(), signal.SIGKILL)
        memory.copy_(layout.cut(gradient(plan, worker, round_.number), lane))

    for lease in client.leases():
        leases.append((lease.epoch, lease.first, lease.steps))
        time.sleep(delays.uniform(0, 0.02))
        round_.count(lease.steps, delays.uniform(0.1, 0.2))  # each lane measures another time
        pull, progress = client.exchange(round_.push(memory), fill)
        wait_all(progress)
        assert pull.vector is not None
        memory = pull.vector
        pulls.append(replace(pull, vector=None))
        round_.receive(pull, 0.0)
        if worker == 0:
            assert runtime.global_host is not None
            runtime.global_host.do("publish", Publish(0, [(0, float(round_.number))], {"loss": 0.5}))
            out = torch.empty_like(memory)
            runtime.global_host.read(out, alarm.check)
            reads.append(out)
            if plan.snapshot == round_.number:
                runtime.global_host.do("snapshot", Marker("save", "folder"))
        if round_.number == ROUNDS:
            break
    final, progress = client.finish(round_.push(None, final=True), fill)
    wait_all(progress)
    while plan.snapshot and process == 0 and len(written) < (1 + len(REGIONS)) * plan.lanes:
        time.sleep(0.01)
    alarm.disarm()
    _wait_for_all(store, plan, process, "finished")
    _wait_for_lane_0(store, plan, worker, lane, handled)
    runtime.alarm.close(10.0)
    _wait_for_all(store, plan, process, "closed")
    return {
        "final": final.vector,
        "pulls": [vars(pull) for pull in pulls],
        "leases": leases,
        "reads": reads,
        "handled": handled,
        "shards": shards,
        "written": sorted(written),
        "region": None if runtime.region_host is None else runtime.region_host.node.state_dict(),
        "global": None if runtime.global_host is None else runtime.global_host.node.state_dict(),
    }


def _wait_for_all(store: TCPStore, plan: Plan, process: int, moment: str) -> None:
    """Waits until all processes have come to a moment; process 0, which has the store, until all have seen that."""
    for step in ("come", "seen"):
        store.add(f"{moment}/{step}", 1)
        while step == "come" or process == 0:
            if store.add(f"{moment}/{step}", 0) == WORKERS * plan.lanes:
                break
            time.sleep(0.01)


def _wait_for_lane_0(store: TCPStore, plan: Plan, worker: int, lane: int, handled: dict[str, list[Any]]) -> None:
    """Waits until this lane has handled as much as lane 0, to which no message has come for a moment.

    The last messages are answered by nobody, so no client waits for them.
    """
    deadline = time.monotonic() + plan.timeout
    if lane == 0:
        before = None
        while before != (before := [len(messages) for messages in handled.values()]):
            time.sleep(0.3)
        store.set(f"handled/{worker}", str(before))
    wanted = store.get(f"handled/{worker}").decode()
    while str([len(messages) for messages in handled.values()]) != wanted and time.monotonic() < deadline:
        time.sleep(0.01)


def _record(handled: dict[str, list[Any]], kind: Any, name: str) -> None:
    """Keeps a copy of what a kind of host handles, before it does."""
    handle = kind.handle

    def record(host: Any, channel: int, message: Any, finding: Any, traffic: Any) -> None:
        if (name == "global") == (type(host) is Host):
            fields = {
                key: value.clone() if isinstance(value, Tensor) else value for key, value in vars(message).items()
            }
            handled[name].append((host._channels[channel - 1], type(message).__name__, fields))
        handle(host, channel, message, finding, traffic)

    kind.handle = record
