"""An optimizer's step that is divided among threads computes bit for bit what an undivided one does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from lightning_halos.core import parameter_server
from lightning_halos.core.delayed_nesterov import DelayedNesterov
from lightning_halos.core.divided_step import divide
from lightning_halos.core.local_server import LocalServer
from lightning_halos.core.messages import GlobalModel, Push
from tests.core.receiving import receive

SHAPES = [torch.Size(shape) for shape in [(3,), (50, 7), (), (0,), (2, 2), (5,), (41,)]]
BUFFERS = 13
ELEMENTS = sum(shape.numel() for shape in SHAPES) + BUFFERS

Factory = Callable[[Iterable[nn.Parameter]], Optimizer]
FACTORIES: dict[str, Factory] = {
    "momentum": partial(DelayedNesterov, lr=0.2, momentum=0.9, delay=3),
    "activation": partial(DelayedNesterov, lr=0.2, momentum=0.9, delay=3, activation=0.1),
    "no momentum": partial(DelayedNesterov, lr=0.2, momentum=0.0, delay=3),
    "SGD": partial(SGD, lr=0.2, momentum=0.9, nesterov=True),
    "SGD without momentum": partial(SGD, lr=0.2),
    "Adam, which is not divided": partial(Adam, lr=0.01),
}


@pytest.mark.parametrize(
    ("sizes", "elements", "pieces"),
    [
        ([], 4, []),
        ([0], 4, [(0, 0)]),
        ([2, 2, 1], 4, [(0, 4), (4, 5)]),
        ([1, 9, 1], 4, [(0, 1), (1, 5), (5, 9), (9, 11)]),
        ([4, 4], 4, [(0, 4), (4, 8)]),
        ([3, 0, 3], 9, [(0, 6)]),
    ],
)
def test_pieces_are_consecutive_and_complete(sizes: list[int], elements: int, pieces: list[tuple[int, int]]) -> None:
    found = divide(sizes, elements)
    assert [(piece.start, piece.stop) for piece in found] == pieces
    assert [span.parameter for piece in found for span in piece.spans if span.start == 0] == list(range(len(sizes)))
    assert all(sum(p.stop - p.start for p in piece.spans) == piece.stop - piece.start for piece in found)


@pytest.mark.parametrize("shapes", [SHAPES, None], ids=["parameters and buffers", "one parameter"])
@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_threads_compute_what_one_call_does(
    monkeypatch: pytest.MonkeyPatch, factory: Factory, shapes: list[torch.Size] | None
) -> None:
    """In windows, with a parameter that gets no gradient at first, after a resume, and for every kind of message."""
    with ThreadPoolExecutor(4) as pool:
        complete = history(factory, shapes, None)
        monkeypatch.setattr(parameter_server, "PIECE", 8)
        assert_same(history(factory, shapes, None), complete)
        assert_same(history(factory, shapes, pool), complete)


def history(factory: Factory, shapes: list[torch.Size] | None, pool: ThreadPoolExecutor | None) -> list[Any]:
    """Returns the answers, the update and the states of a server."""
    generator = torch.Generator().manual_seed(1)

    def make() -> LocalServer:
        server = LocalServer(0, torch.linspace(-1, 1, ELEMENTS), factory, 4, 0.25, shapes, workers=2)
        if pool is not None:
            server.map = pool.map
        return server

    server, seen = make(), []
    for number in range(8):
        vector = torch.randn(ELEMENTS, generator=generator)
        if number < 5:
            vector[3 : 3 + 350] = 0
        answer, update = receive(server, Push(0, None, 1, 1, 1.0, vector=vector))
        seen.append(answer.clone())
        if update is not None:
            seen.append(update.vector)
            server.merge(GlobalModel(1, vector=torch.ones(ELEMENTS), number=1))
        if number == 4:
            state, server = server.state_dict(), make()
            server.load_state_dict(state)
        seen.append(server.state_dict())
    seen.append(server.inspect(torch.full((ELEMENTS,), float("inf"))).fault)
    return seen


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same(one[name], other[name])
    elif isinstance(one, list | tuple):
        for first, second in zip(one, other, strict=True):
            assert_same(first, second)
    else:
        assert one == other


def test_the_answer_is_filled_from_front_to_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameter_server, "PIECE", 8)
    server = LocalServer(0, torch.zeros(ELEMENTS), FACTORIES["momentum"], None, 0.25, SHAPES)
    for is_accepted in (True, False):
        reached: list[int] = []
        server.apply(torch.ones(ELEMENTS), is_accepted, torch.empty(ELEMENTS), reached.append)
        assert reached == sorted(set(reached))
        assert reached[-1] == ELEMENTS
        assert len(reached) >= ELEMENTS / 16
