"""Synchronous rounds: the node applies the mean, plans the next round, and ends the run when all have finished."""

from __future__ import annotations

import pytest
import torch

from lightning_halos.core.global_server import SynchronousServer
from lightning_halos.core.messages import GlobalModel, Pull, Push
from lightning_halos.core.schedule import RoundPlanner, StepBudget
from lightning_halos.core.synchronous_node import SynchronousNode

WORKERS = 3


def make(max_steps: int | None = None, model: torch.Tensor | None = None) -> SynchronousNode:
    server = None if model is None else SynchronousServer(model, lambda params: torch.optim.SGD(params, lr=1.0))
    return SynchronousNode(server, RoundPlanner(4, False, WORKERS, max_steps), StepBudget(WORKERS, max_steps))


def push(worker: int, steps: int = 4, **fields: bool) -> Push:
    return Push(worker, version=0, steps=steps, batches=steps, seconds=1.0, **fields)


def pulls(answers: dict[int, Pull | GlobalModel]) -> dict[int, Pull]:
    assert all(isinstance(answer, Pull) for answer in answers.values())
    return answers  # type: ignore[return-value]


def test_a_round_applies_the_mean_and_begins_the_next() -> None:
    node = make(model=torch.ones(2))
    answers = pulls(node.finish_round([push(rank) for rank in range(WORKERS)], torch.full((2,), 0.25)))
    assert node.model is not None
    assert node.model.tolist() == [0.75, 0.75]
    assert node.version == 1
    assert answers.keys() == {0, 1, 2}
    assert {(p.version, p.local_steps, p.position, p.stop) for p in answers.values()} == {(1, 4, 4, False)}


def test_without_a_server_rounds_are_counted() -> None:
    node = make()
    node.finish_round([push(rank, 1) for rank in range(WORKERS)], None)
    assert (node.version, node.model) == (1, None)


def test_an_exhausted_budget_stops_everybody() -> None:
    node = make(max_steps=8)
    assert not any(p.stop for p in pulls(node.finish_round([push(rank) for rank in range(WORKERS)], None)).values())
    assert all(p.stop for p in pulls(node.finish_round([push(rank) for rank in range(WORKERS)], None)).values())


def test_a_worker_that_asks_to_stop_stops_everybody() -> None:
    node = make()
    answers = pulls(node.finish_round([push(0), push(1, stop=True, final=True), push(2)], None))
    assert {rank: p.stop for rank, p in answers.items()} == {0: True, 2: True}
    final = node.finish_round([push(0, 0, final=True), push(1, 0, final=True), push(2, 0, final=True)], None)
    assert final.keys() == {0, 1, 2}
    assert all(isinstance(model, GlobalModel) and model.final and model.stopped for model in final.values())
    assert node.version == 1, "a round without a step is none"


def test_what_is_published_is_in_the_next_answers_once() -> None:
    node = make()
    node.publish([(0, 0.5)], {"loss": 1.0})
    first = pulls(node.finish_round([push(rank) for rank in range(WORKERS)], None))
    assert {(tuple(p.plateau_steps), p.metrics["loss"]) for p in first.values()} == {(((0, 0.5),), 1.0)}
    second = pulls(node.finish_round([push(rank) for rank in range(WORKERS)], None))
    assert {(tuple(p.plateau_steps), p.metrics["loss"]) for p in second.values()} == {((), 1.0)}


@pytest.mark.parametrize("model", [None, torch.ones(2)], ids=["without a server", "with a server"])
def test_an_equal_node_goes_on_from_its_state(model: torch.Tensor | None) -> None:
    node = make(model=model)
    mean = None if model is None else torch.full((2,), 0.25)
    node.finish_round([push(rank) for rank in range(WORKERS)], mean)
    other = make(model=None if model is None else torch.zeros(2))
    other.load_state_dict(node.state_dict())
    assert other.version == node.version
    if model is not None:
        assert torch.equal(other.model, node.model)  # type: ignore[arg-type]
