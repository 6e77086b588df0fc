"""A snapshot is the state at the moment when it began, whatever happens to the server before it is complete."""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_halos.core import parameter_server
from lightning_halos.core.delayed_nesterov import DelayedNesterov, OptimizerFactory
from lightning_halos.core.global_server import GlobalServer
from lightning_halos.core.local_server import LocalServer
from lightning_halos.core.messages import GlobalModel, Push, RegionUpdate
from lightning_halos.core.parameter_server import ParameterServer
from lightning_halos.core.snapshot import ServerSnapshot

from .receiving import receive

SHAPES = [torch.Size(shape) for shape in ([3], [2, 2], [5], [1], [4, 3], [])]
BUFFERS = 5
ELEMENTS = sum(shape.numel() for shape in SHAPES) + BUFFERS

OPTIMIZERS: dict[str, OptimizerFactory] = {
    "delayed nesterov": partial(DelayedNesterov, lr=0.2, momentum=0.9, delay=3),
    "with activation": partial(DelayedNesterov, lr=0.2, momentum=0.9, delay=3, activation=0.2),
    "without momentum": partial(DelayedNesterov, lr=0.2, momentum=0.0, delay=1),
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adam": partial(torch.optim.Adam, lr=0.1),  # not by parameter: one portion
}


@pytest.fixture(autouse=True)
def small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameter_server, "PART", 4)


def two_groups(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Numbers the parameters in another order than the model has them."""
    first, *others = parameters
    return torch.optim.SGD([{"params": others}, {"params": [first], "lr": 0.3}], lr=0.1, momentum=0.9)


class Peers:
    """Does random, valid things to a server."""

    def __init__(self, seed: int, optimizer: OptimizerFactory, is_global: bool) -> None:
        self.draw = Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.server: ParameterServer
        if is_global:
            self.server = GlobalServer(self.vector(), optimizer, SHAPES, servers=2)
        else:
            self.server = LocalServer(0, self.vector(), optimizer, 3, 0.25, SHAPES, workers=2)
        self.numbers = itertools.count(1)
        self.in_flight: RegionUpdate | None = None
        self.is_flushed = False

    def vector(self) -> Tensor:
        return torch.randn(ELEMENTS, generator=self.generator)

    def go_on(self) -> None:
        """A push, an exchange, a merge, a flush; or an update of a region."""
        if isinstance(self.server, GlobalServer):
            self.server.receive(RegionUpdate(0, 0, 8, vector=self.vector(), number=next(self.numbers)))
            return
        assert isinstance(self.server, LocalServer)
        if self.in_flight is not None and self.draw.random() < 0.5:
            self.server.merge(GlobalModel(1, vector=self.vector(), number=self.in_flight.number))
            self.in_flight = None
        elif self.is_flushed:
            self.server.adopt_final_model(self.vector())
            self.is_flushed = False
        elif self.draw.random() < 0.05:
            self.server.flush()
            self.is_flushed, self.in_flight = True, None
        else:
            push = Push(0, 0, 8, 8, 1.0, vector=self.vector(), number=next(self.numbers))
            self.in_flight = receive(self.server, push)[1] or self.in_flight


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal, bit for bit."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("is_global", [False, True], ids=["local", "global"])
@pytest.mark.parametrize("optimizer", [*OPTIMIZERS.values(), two_groups], ids=[*OPTIMIZERS, "two groups"])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), before=st.integers(0, 12), moves=st.lists(st.booleans(), max_size=30))
def test_a_snapshot_is_the_state_at_its_moment(
    optimizer: OptimizerFactory, is_global: bool, seed: int, before: int, moves: list[bool]
) -> None:
    peers = Peers(seed, optimizer, is_global)
    for _ in range(before):
        peers.go_on()
    expected = copy.deepcopy(peers.server._state())  # not made by a snapshot
    snapshot = peers.server.snapshot()
    for advances in moves:
        if advances:
            snapshot.advance()
        else:
            peers.go_on()
    assert same(snapshot.complete(), expected)
    for _ in range(3):  # and it stays so
        peers.go_on()
    assert same(snapshot.state, expected)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_two_snapshots_in_progress(optimizer: OptimizerFactory) -> None:
    peers, expected, snapshots = Peers(0, optimizer, is_global=False), [], []
    for _ in range(2):
        for _ in range(5):
            peers.go_on()
        expected.append(copy.deepcopy(peers.server._state()))
        snapshots.append(peers.server.snapshot())
        snapshots[0].advance()
    peers.go_on()
    assert all(map(same, [snapshot.complete() for snapshot in snapshots], expected))


def test_a_complete_snapshot_costs_an_update_nothing() -> None:
    """It may exist for as long as it is being written to disk."""
    peers = Peers(0, OPTIMIZERS["sgd"], is_global=True)
    calls = 0

    def counting(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        nonlocal calls
        for item in items:
            calls += 1
            yield function(item)

    peers.server.map = counting
    peers.go_on()
    without, calls = calls, 0
    snapshot = peers.server.snapshot()
    peers.go_on()
    copied, calls = calls - without, 0
    peers.go_on()
    assert calls == without
    assert not snapshot.pending
    assert copied == len(peers.server._portions) + 1


@pytest.mark.parametrize("is_global", [False, True], ids=["local", "global"])
def test_a_server_goes_on_from_a_snapshot_as_from_a_copy(is_global: bool) -> None:
    peers = Peers(1, OPTIMIZERS["with activation"], is_global)
    for _ in range(8):
        peers.go_on()
    snapshot = peers.server.snapshot()
    peers.go_on()
    restarted = Peers(2, OPTIMIZERS["with activation"], is_global).server
    restarted.load_state_dict(snapshot.complete())
    assert same(restarted.state_dict(), snapshot.state)


def counting(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Returns a function that tells how many portions were copied since the last call."""
    copied = []
    take = ServerSnapshot.take

    def noting(snapshot: ServerSnapshot, index: int) -> None:
        if index in snapshot._pending:
            copied.append(index)
        take(snapshot, index)

    monkeypatch.setattr(ServerSnapshot, "take", noting)

    def count() -> int:
        found = len(copied)
        copied.clear()
        return found

    return count


def test_each_portion_is_copied_once_and_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    count = counting(monkeypatch)
    server = Peers(0, OPTIMIZERS["with activation"], is_global=True).server
    snapshot = server.snapshot()
    assert count() == 0  # the start copies no tensor
    steps = 0
    is_complete = False
    while not is_complete:
        is_complete = snapshot.advance()
        assert count() == 1
        steps += 1
    assert steps == len(server._portions) + 1 == 5
    assert snapshot.advance()
    assert count() == 0


def test_an_abandoned_snapshot_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = Peers(0, OPTIMIZERS["sgd"], is_global=True)
    peers.server.snapshot()
    gc.collect()
    count = counting(monkeypatch)
    peers.go_on()
    assert count() == 0


def test_a_rejected_update_overwrites_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    count = counting(monkeypatch)
    peers = Peers(0, OPTIMIZERS["sgd"], is_global=True)
    snapshot = peers.server.snapshot()
    server = peers.server
    assert isinstance(server, GlobalServer)
    server.receive(RegionUpdate(0, 0, 8, vector=torch.full([ELEMENTS], torch.nan), number=1))
    assert count() == 0
    snapshot.complete()
