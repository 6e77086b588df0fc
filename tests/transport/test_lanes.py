"""Lanes: every lane of a worker handles the same messages in the same order, each with its slice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_halos.core import messages
from lightning_halos.core.reslicing import Reslicing
from lightning_halos.training.lane_findings import add_findings
from tests.integration.harness import end_workers, run_workers
from tests.transport.lane_processes import (
    REGIONS,
    SHAPES,
    WORKERS,
    Plan,
    make_global_node,
    make_region_node,
    start_model,
    work,
)

Result = dict[str, Any]


def test_lanes_stay_equal_and_compute_what_one_lane_does(tmp_path: Path) -> None:
    """Pushes of three workers race, each lane measures other times, and one push is spoiled in lane 1 only.

    Then the run is resumed from a snapshot with the same lanes, with one lane, and with several again.
    """
    plan, shards, state, states = Plan(), list[Result](), None, None
    for number, lanes in enumerate((2, 2, 1, 3)):
        folder = tmp_path / str(number)
        folder.mkdir()
        following = Plan(lanes, shards=((0, (6, 0, 0)[:lanes]),), spoiled=(1, 3), snapshot=2)
        if shards:
            states = [resliced(plan, following, lane, shards) for lane in range(lanes)]
            state = resliced(plan, Plan(lanes=1), 0, shards)
        plan = following
        results = run_workers(work, plan, states, folder=folder, environments=plan.environments())
        workers = [results[lanes * worker : lanes * (worker + 1)] for worker in range(WORKERS)]
        check(plan, workers, state)
        shards = snapshot_of(workers)


def check(plan: Plan, workers: list[list[Result]], state: Result | None) -> None:
    """Checks that all lanes are equal, and that one lane would have computed the same in the same order."""
    for lanes in workers:
        for name in ("pulls", "leases"):
            assert all(lane[name] == lanes[0][name] for lane in lanes)
            assert lanes[0][name]
        for name in ("handled", "region", "global", "shards"):
            assert all(without_tensors(lane[name]) == without_tensors(lanes[0][name]) for lane in lanes)
    finals = [plan.layout.join([result["final"] for result in lanes]) for lanes in workers]
    assert all(torch.equal(final, finals[0]) for final in finals)
    assert torch.isfinite(finals[0]).all()
    rejections = [workers[ranks[0]][0]["region"]["server"]["rejections"] for ranks in REGIONS]
    assert rejections == [{1: 1}, {}] or state is not None

    for index, ranks in enumerate(REGIONS):
        node = make_region_node(index, start_model(), SHAPES, state)
        replay(plan, workers[ranks[0]], "region", node)
        compare(plan, node.state_dict()["server"], [result["region"]["server"] for result in workers[ranks[0]]])
    center = make_global_node(start_model(), SHAPES, state)
    replay(plan, workers[0], "global", center)
    compare(plan, center.state_dict()["server"], [result["global"]["server"] for result in workers[0]])
    assert torch.equal(center.model, finals[0])


def snapshot_of(workers: list[list[Result]]) -> list[Result]:
    """The parts of the snapshot of all servers, by lane. Lane 0's global server has heard of all of them."""
    leaders = [workers[ranks[0]] for ranks in REGIONS]
    shards = [
        {name: shard for lanes in leaders for name, shard in lanes[lane]["shards"].items()}
        for lane in range(len(workers[0]))
    ]
    names = ["global", *(f"server-{index}" for index in range(len(REGIONS)))]
    assert all(sorted(shard) == names for shard in shards)
    written = [f"{name}.lane-{lane}" for name in names for lane in range(len(shards))]
    assert workers[0][0]["written"] == sorted(written)
    return shards


def resliced(plan: Plan, following: Plan, lane: int, shards: list[Result]) -> Result:
    """The state of a snapshot for a lane of the following run."""
    shapes = SHAPES if following.lanes == 1 else following.layout.shapes(lane)
    state = {}
    for name in shards[0]:
        reslicing = Reslicing(plan.layout, following.layout, lane, shapes)
        for old in reslicing.lanes:
            reslicing.add(old, shards[old][name]["state"])
        state[name] = reslicing.state
    if following.lanes > 1 and plan.lanes == 1:
        center = make_global_node(start_model(), SHAPES)
        assert center.server is not None
        center.server.become_slice(warns=True)
        complete = [dict(update) for update in shards[0]["global"]["state"]["updates"]]
        add_findings(complete, center.server)
        for update, found in zip(state["global"]["updates"], complete, strict=True):
            update["finding"] = found["finding"]
    return {**state, **shards[0]["global"]["progress"]}


def replay(plan: Plan, lanes: list[Result], which: str, node: Any) -> None:
    """Gives one node with the complete model what the nodes of all lanes have handled, in their order."""
    for send in node.start():
        send.complete()
    for events in zip(*(result["handled"][which] for result in lanes), strict=True):
        peer, kind, _ = events[0]
        fields = joined(plan, [fields for _, _, fields in events])
        for send in node.handle(peer, getattr(messages, kind)(**fields)):
            send.complete()


def compare(plan: Plan, one: Result, lanes: list[Result]) -> None:
    """Compares the state of a server with those of its lanes, bit for bit."""
    for name in ("model", "base"):
        if name in one:
            assert torch.equal(one[name], plan.layout.join([lane[name] for lane in lanes])), name
    assert one["version"] == lanes[0]["version"]
    assert one["optimizer"]["state"].keys() == lanes[0]["optimizer"]["state"].keys()
    for number, own in one["optimizer"]["state"].items():
        pieces = [lane["optimizer"]["state"][number] for lane in lanes]
        assert own["step"] == pieces[0]["step"]
        assert torch.equal(own["momentum"].view(-1), torch.cat([piece["momentum"].view(-1) for piece in pieces]))


def without_tensors(state: Any) -> Any:
    """A state whose tensors are replaced by the word."""
    if isinstance(state, torch.Tensor):
        return "tensor"
    if isinstance(state, dict):
        return {key: without_tensors(value) for key, value in state.items() if key != "parameters"}
    return [without_tensors(value) for value in state] if isinstance(state, (list, tuple)) else state


def joined(plan: Plan, states: list[Any]) -> Any:
    """A state with the complete vectors, of the states of all lanes."""
    first = states[0]
    if isinstance(first, torch.Tensor):
        return plan.layout.join(states)
    if isinstance(first, dict):
        return {key: joined(plan, [state[key] for state in states]) for key in first}
    if isinstance(first, (list, tuple)):
        return [joined(plan, list(values)) for values in zip(*states, strict=True)]
    return first


@pytest.mark.parametrize("process", [1, 3, 4], ids=lambda p: f"lane {p % 2} of worker {p // 2}")
def test_all_processes_fail_as_one_when_one_dies_in_the_middle_of_a_push(tmp_path: Path, process: int) -> None:
    plan = Plan(killed=(process, 3))
    ends = end_workers(work, plan, folder=tmp_path, environments=plan.environments(), patience=60)
    assert ends[process].code == -9
    for number, end in enumerate(ends):
        if number != process:
            assert end.code == 1, end.log
            assert "PeerLostError" in end.log or "PeerFailedError" in end.log
    # Those that are connected with it say so; the others may see the end of these first, which nobody keeps alive here.
    assert any(f"lane {process % 2} of worker {process // 2} disappeared" in end.log for end in ends)
