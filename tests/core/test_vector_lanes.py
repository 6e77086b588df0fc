"""The vectors of a worker's processes are slices of the canonical vector.

How real processes complete it is in tests/transport/test_worker_processes.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from lightning_halos.core import vector as module
from lightning_halos.core.sharding import Sharded, WorkerProcesses
from lightning_halos.core.vector import ModelVector


class Lane(WorkerProcesses):
    """One of several processes that hear nothing of each other."""

    def __init__(self, lane: int, lanes: int) -> None:
        self.lane, self.lanes = lane, lanes
        self.model = nn.Module()  # which divides nothing


class Heard(Lane):
    """One of several processes, which gets from each other lane what it is told to."""

    def __init__(self, lane: int, lanes: int, others: dict[int, list[Tensor]]) -> None:
        super().__init__(lane, lanes)
        self._others = others

    def share_(self, tensors: Sequence[Tensor], lane: int) -> None:
        for tensor, values in zip(tensors, self._others[lane], strict=True):
            tensor.copy_(values)


class Telling(Lane):
    """One of several processes, which notes what it tells the others."""

    def share_(self, tensors: Sequence[Tensor], lane: int) -> None:
        if lane == self.lane:
            self.told = [tensor.clone() for tensor in tensors]


def make_module() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.LazyLinear(2))
    module(torch.randn(2, 3, 6, 6))
    return module


@pytest.mark.parametrize("lanes", [2, 3, 5])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_slices_of_all_lanes_are_the_canonical_vector(lanes: int, memory_format: torch.memory_format) -> None:
    module = make_module().to(memory_format=memory_format)
    complete = ModelVector(module)
    vectors = [ModelVector(module, processes=Lane(lane, lanes)) for lane in range(lanes)]
    slices = [vector.read(vector.new()) for vector in vectors]
    assert torch.equal(vectors[0].layout.join(slices), complete.read(complete.new()))
    assert {repr(vector.identity) for vector in vectors} == {repr(complete.identity)}
    assert all(vector.complete_shapes == complete.shapes for vector in vectors)
    sizes = [vector.num_elements for vector in vectors]
    assert max(sizes) - min(sizes) <= 2, "one for the parameters, one for the averaged tensors"
    for vector in vectors:
        assert sum(shape.numel() for shape in vector.shapes) == vector.num_parameters


def test_a_process_beyond_the_lanes_sends_nothing() -> None:
    vector = ModelVector(make_module(), processes=Lane(2, 2))
    assert vector.num_elements == vector.num_parameters == 0
    assert vector.read(vector.new()).shape == (0,)


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_written_slice_is_completed_with_those_of_the_others(lanes: int, memory_format: torch.memory_format) -> None:
    source = make_module()
    with torch.no_grad():
        for tensor in [*source.parameters(), source[1].running_mean, source[1].running_var]:
            tensor.copy_(torch.randn_like(tensor))
    told = {}
    slices = []
    for lane in range(lanes):
        processes = Telling(lane, lanes)
        vector = ModelVector(source, processes=processes)
        slices.append(vector.read(vector.new()))
        vector.write(slices[lane].clone())
        told[lane] = processes.told
    for lane in range(lanes + 1):  # a process beyond the lanes hears from all others
        module = make_module().to(memory_format=memory_format)
        vector = ModelVector(module, processes=Heard(lane, lanes, told))
        vector.write(slices[lane] if lane < lanes else vector.new(), iter([vector.num_elements]))
        for name, value in module.state_dict().items():
            assert torch.equal(value, source.state_dict()[name]), name


def test_the_pseudo_gradients_of_all_lanes_are_that_of_the_complete_vector() -> None:
    module = make_module()
    complete = ModelVector(module)
    vectors = [ModelVector(module, processes=Lane(lane, 2)) for lane in range(2)]
    starts = [vector.read(vector.new()) for vector in vectors]
    start = complete.read(complete.new())
    with torch.no_grad():
        for tensor in [*module.parameters(), module[1].running_mean]:
            tensor.add_(1.0)
    slices = [vector.pseudo_gradient_(begun) for vector, begun in zip(vectors, starts, strict=True)]
    assert torch.equal(vectors[0].layout.join(slices), complete.pseudo_gradient_(start))


def test_a_parameter_that_is_frozen_during_training_keeps_its_value_in_every_slice() -> None:
    module = nn.Linear(3, 2)
    vectors = [ModelVector(module, processes=Lane(lane, 2)) for lane in range(2)]
    starts = [vector.read(vector.new()) for vector in vectors]
    for vector in vectors:
        vector.begin_batch()
    module.weight.requires_grad_(False)
    frozen = module.weight.detach().clone()
    for vector in vectors:
        vector.begin_batch()
        vector.end_batch()
    for vector, start in zip(vectors, starts, strict=True):
        vector.pseudo_gradient_(start)
        vector.write(start.fill_(7.0))
        assert torch.equal(module.weight, frozen)
    expected = torch.cat([frozen.flatten(), torch.full((2,), 7.0)])
    assert torch.equal(vectors[0].layout.join(starts), expected)


def test_a_parameter_that_every_process_has_as_its_only_shard_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 3)
    shards = {id(model.weight): Sharded(model.weight.shape, [6])}  # as with fully_shard over a mesh of one process
    monkeypatch.setattr(module, "find_shards", lambda _: shards)
    with pytest.raises(ValueError, match=r"weight is divided among 1 process\(es\), but must be divided among all 2"):
        ModelVector(model, processes=Lane(0, 2))
