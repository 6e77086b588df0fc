"""Servers of other lanes go on as the old ones would, from one lane to several and back."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_halos.core.delayed_nesterov import DelayedNesterov
from lightning_halos.core.finding import Finding, combine
from lightning_halos.core.layout import Layout
from lightning_halos.core.local_server import LocalServer
from lightning_halos.core.messages import Push
from lightning_halos.core.reslicing import Reslicing
from tests.core.receiving import receive

SHAPES = [torch.Size([]), torch.Size([2, 3]), torch.Size([3])]
SIZES = [1, 6, 3, 4]
ONE = Layout.build(SIZES, 3, 1)
LAYOUTS = {
    "one lane": ONE,
    "equal parts": Layout.build(SIZES, 3, 2),
    "rows": Layout.build(SIZES, 3, 3, {1: [3, 3, 0], 2: [1, 1, 1]}),
}
every_layout = pytest.mark.parametrize("name", LAYOUTS)
OPTIMIZERS = {
    "DelayedNesterov": partial(DelayedNesterov, lr=0.2, momentum=0.9, delay=2),
    "AdamW": partial(torch.optim.AdamW, lr=0.01),
    "NAdam": partial(torch.optim.NAdam, lr=0.01),
}


class Servers:
    """The servers of all lanes of one local server."""

    def __init__(self, layout: Layout, optimizer: str) -> None:
        self.layout = layout
        shapes = [SHAPES] if layout.lanes == 1 else [layout.shapes(lane) for lane in range(layout.lanes)]
        start = torch.linspace(-1, 1, sum(SIZES))
        self.all = [
            LocalServer(0, layout.cut(start, lane), OPTIMIZERS[optimizer], 100, 0.25, shapes[lane])
            for lane in range(layout.lanes)
        ]
        self.shapes = shapes
        for lane, server in enumerate(self.all) if layout.lanes > 1 else ():
            server.become_slice(warns=lane == 0)

    def push(self, vector: Tensor) -> None:
        slices = [self.layout.cut(vector, lane) for lane in range(self.layout.lanes)]
        found: Finding = combine([server.inspect(part) for server, part in zip(self.all, slices, strict=True)])
        for server, part in zip(self.all, slices, strict=True):
            server.agree = lambda _: found
            receive(server, Push(0, 0, 8, 8, 1.0, vector=part))

    @property
    def model(self) -> Tensor:
        return self.layout.join([server.model for server in self.all])

    def load(self, layout: Layout, states: list[dict[str, Any]]) -> None:
        for lane, server in enumerate(self.all):
            reslicing = Reslicing(layout, self.layout, lane, self.shapes[lane])
            for old in reslicing.lanes:
                reslicing.add(old, {"server": states[old], "speeds": [1.0]})
            assert reslicing.state["speeds"] == [1.0]
            server.load_state_dict(reslicing.state["server"])
            assert reslicing.state["server"]["parameters"] == self.layout.parameters_of(lane)


def gradient(number: int) -> Tensor:
    vector = torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(number))
    vector[7:10] *= torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])[number % 3]
    return vector


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("after", LAYOUTS)
@every_layout
def test_a_run_with_other_lanes_goes_on_bit_for_bit(name: str, after: str, optimizer: str) -> None:
    """Also where a lane's piece of a parameter is empty, or is not touched while another lane's piece is."""
    reference, old, new = Servers(ONE, optimizer), Servers(LAYOUTS[name], optimizer), Servers(LAYOUTS[after], optimizer)
    for number in range(5):
        reference.push(gradient(number))
        old.push(gradient(number))
    new.load(old.layout, [server.state_dict() for server in old.all])
    for number in range(5, 12):
        reference.push(gradient(number))
        new.push(gradient(number))
    assert torch.equal(new.model, reference.model)
    assert {server.version for server in new.all} == {12}


@pytest.mark.parametrize("after", LAYOUTS)
@every_layout
def test_what_updates_lack_goes_on_in_other_lanes(name: str, after: str) -> None:
    old, new = Servers(LAYOUTS[name], "DelayedNesterov"), Servers(LAYOUTS[after], "DelayedNesterov")
    parameters = sum(SIZES[:3])
    residual = torch.arange(1.0, parameters + 1)
    complete = torch.cat([residual, torch.zeros(SIZES[3])])
    for servers in (old, new):
        for lane, server in enumerate(servers.all):
            server.round_updates("int4")
            if servers is old:
                own = old.layout.cut(complete, lane)[: old.layout.parameters_of(lane)]
                server.feedback.residual.copy_(own)  # type: ignore[union-attr]
    new.load(old.layout, [server.state_dict() for server in old.all])
    for lane, server in enumerate(new.all):
        expected = new.layout.cut(complete, lane)[: new.layout.parameters_of(lane)]
        assert torch.equal(server.feedback.residual, expected)  # type: ignore[union-attr]


def test_a_fault_in_one_slice_rejects_the_update_in_all_lanes() -> None:
    servers = Servers(LAYOUTS["rows"], "DelayedNesterov")
    before = servers.model
    spoiled = gradient(0)
    spoiled[5] = torch.inf
    servers.push(spoiled)
    assert torch.equal(servers.model, before)
    assert [server.rejections for server in servers.all] == [{0: 1}] * 3


def test_an_optimizer_that_needs_complete_parameters_is_refused() -> None:
    class Muon(torch.optim.SGD): ...

    server = LocalServer(0, torch.zeros(4), partial(Muon, lr=0.1), None, 0.0)
    with pytest.raises(ValueError, match=r"The server optimizer Muon may need complete parameters.*worker=1"):
        server.become_slice(warns=True)


def test_slices_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="elements in the old slices"):
        Reslicing(ONE, Layout.build([1, 6, 3, 5], 3, 1), 0, SHAPES)
