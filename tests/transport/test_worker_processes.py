"""The processes of a worker, over gloo: what they carry of a model that torch has divided, and how they complete it."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_halos.core.vector import ModelVector
from lightning_halos.transport.worker_processes import GroupedProcesses
from tests.fsdp2 import divides_on_cpus, fully_shard
from tests.integration.harness import run_workers


def make_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 3, bias=False), nn.BatchNorm1d(3))


def by_rows(module: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """FSDP2. Lane 1 of three has a row less than lane 0, and lane 2 has none of some parameters."""
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("data_parallel",))
    fully_shard(module[0], mesh=mesh)
    return fully_shard(module, mesh=mesh)


def flat(module: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """FSDP1, on the CPU as torch's own tests use it."""
    module[0] = FullyShardedDataParallel(
        module[0], process_group=group, use_orig_params=True, device_id=torch.device("cpu")
    )
    return FullyShardedDataParallel(module, process_group=group, use_orig_params=True, device_id=torch.device("cpu"))


def replicated(module: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    return nn.parallel.DistributedDataParallel(module, process_group=group)


DIVIDING = {  # with the number of lanes
    "FSDP2": (by_rows, 3),
    "FSDP1": (flat, 3),
    "DDP": (replicated, 3),
    "DDP in a worker that is larger than another one": (replicated, 2),
}


PROCESSES = 3


def scenario(folder: str) -> dict[str, Any]:
    """Every way to divide a model gives the same canonical vectors, and the same model when they are written."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", PROCESSES)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    group = dist.group.WORLD
    assert group is not None
    plain = make_module()
    whole = ModelVector(plain)
    start = whole.read(whole.new())
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    targets = start + 1
    result: dict[str, Any] = {}
    for name, (divide, lanes) in DIVIDING.items():
        module = make_module()
        model = divide(module, group)
        vector = ModelVector(module, processes=GroupedProcesses(group, lanes, model))
        mine = vector.read(vector.new())
        assert torch.equal(mine, vector.layout.cut(start, rank) if rank < lanes else start[:0]), name
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(inputs).square().mean().backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            model(inputs)  # FSDP2 leaves the complete parameters of the root in place of the shards
        push = vector.pseudo_gradient_(mine.clone())
        assert not vector.newly_trainable(module)
        vector.write(vector.layout.cut(targets, rank) if rank < lanes else start[:0])
        with torch.no_grad():
            output = model(inputs)
        slices = [torch.empty(vector.layout.elements_of(lane)) for lane in range(lanes)]
        for lane in range(lanes):
            if lane == rank:
                slices[lane].copy_(push)
            dist.broadcast(slices[lane], lane)
        result[name] = [vector.layout.join(slices), output, vector.num_elements]
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    plain(inputs).square().mean().backward()
    optimizer.step()
    push = whole.pseudo_gradient_(start.clone())
    whole.write(targets)
    with torch.no_grad():
        result["plain"] = [push, copy.deepcopy(plain).eval()(inputs), whole.num_elements]
    dist.destroy_process_group()
    return result


@divides_on_cpus
def test_all_ways_to_divide_a_model_have_the_same_canonical_vector(tmp_path: Path) -> None:
    environments = [{"RANK": str(rank)} for rank in range(PROCESSES)]
    results = run_workers(scenario, str(tmp_path), folder=tmp_path, environments=environments)
    push, output, elements = results[0]["plain"]
    for name in DIVIDING:
        for result in results:
            assert torch.allclose(result[name][0], push, rtol=0, atol=1e-6), name
            assert torch.allclose(result[name][1], output, rtol=0, atol=1e-6), name
        assert sum(result[name][2] for result in results) == elements, name
