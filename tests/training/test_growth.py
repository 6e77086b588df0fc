"""A model that grows without bound is noticed once, with the remedy; other models are not."""

from __future__ import annotations

import warnings

import pytest
import torch

from lightning_halos.core.topology import Topology
from lightning_halos.training.growth import GrowthWatch

TOPOLOGY = Topology.build([[0, 1], [2, 3]], servers_per_region=1)


def test_a_model_that_doubles_in_every_round_is_noticed_once() -> None:
    watch = GrowthWatch(TOPOLOGY)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(300):
            watch.look(torch.full((10,), 0.1) * 2.0**step)
    assert len(caught) == 1
    assert "local_optimizer=lambda p: torch.optim.SGD(p, lr=0.5)" in str(caught[0].message)


@pytest.mark.parametrize(
    "size", [lambda step: min(0.01 * 2**step, 5.0), lambda step: 1e6, lambda step: min(2**step - 1, 9)]
)
def test_a_model_that_only_starts_small_is_not(size) -> None:
    watch = GrowthWatch(TOPOLOGY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(100):
            watch.look(torch.full((10,), float(size(step))))


def test_a_jump_from_one_round_to_the_next_is_noticed() -> None:
    watch = GrowthWatch(TOPOLOGY)
    watch.look(torch.full((10,), 0.5))
    with pytest.warns(UserWarning, match="grows without bound"):
        watch.look(torch.full((10,), 700.0))
