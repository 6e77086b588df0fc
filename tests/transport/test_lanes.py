"""Lanes: every lane of a worker handles the same messages in the same order, each with its slice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_halos.core import messages
from tests.integration.harness import run_workers
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


def replay(plan: Plan, lanes: list[Result], which: str, node: Any) -> None:
    """Gives one node with the complete model what the nodes of all lanes have handled, in their order."""
    for send in node.start():
        send.complete()
    for events in zip(*(result["handled"][which] for result in lanes), strict=True):
        peer, kind, _ = events[0]
        fields = joined(plan, [fields for _, _, fields in events])
        for send in node.handle(peer, getattr(messages, kind)(**fields)):
            send.complete()


def test_lanes_stay_equal_and_compute_what_one_lane_does(tmp_path: Path) -> None:
    """Pushes of three workers race, each lane measures other times, and one push is spoiled in lane 1 only."""
    plan = Plan(spoiled=(1, 3))
    results = run_workers(work, plan, folder=tmp_path, environments=plan.environments(), timeout=100)
    workers = [results[plan.lanes * worker : plan.lanes * (worker + 1)] for worker in range(WORKERS)]
    for lanes in workers:
        for name in ("pulls", "leases"):
            assert lanes[0][name] == lanes[1][name]
            assert lanes[0][name]
        for name in ("handled", "region", "global"):
            assert without_tensors(lanes[0][name]) == without_tensors(lanes[1][name])
    finals = [plan.layout.join([result["final"] for result in lanes]) for lanes in workers]
    assert all(torch.equal(final, finals[0]) for final in finals)
    assert torch.isfinite(finals[0]).all()
    rejections = [workers[ranks[0]][0]["region"]["server"]["rejections"] for ranks in REGIONS]
    assert rejections == [{1: 1}, {}]

    for index, ranks in enumerate(REGIONS):
        node = make_region_node(index, start_model(), SHAPES)
        replay(plan, workers[ranks[0]], "region", node)
        compare(plan, node.state_dict()["server"], [result["region"]["server"] for result in workers[ranks[0]]])
    center = make_global_node(start_model(), SHAPES)
    replay(plan, workers[0], "global", center)
    compare(plan, center.state_dict()["server"], [result["global"]["server"] for result in workers[0]])
    assert torch.equal(center.model, finals[0])


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
        assert torch.equal(own["momentum"].view(-1), torch.cat([piece["momentum"] for piece in pieces]))
