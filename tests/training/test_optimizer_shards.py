"""The state of an optimizer of a divided model survives another division, and none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_halos.core.sharding import complete
from lightning_halos.optim import MuonAdamW
from lightning_halos.training.optimizer_shards import join_pieces, load_pieces, optimizer_pieces, wanted_pieces
from tests.fsdp2 import CommDebugMode, Shard, distribute_tensor, divides_on_cpus
from tests.integration.harness import run_workers
from tests.transport.test_worker_processes import by_rows, flat, make_module

PROCESSES = 3
MATRICES = [(8, 4), (5, 7), (1, 6)]  # the last one is in one process only
DIVIDING = {"FSDP2": by_rows, "FSDP": flat}


def trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def with_muon(shape: tuple[int, int], mesh: DeviceMesh | None) -> tuple[torch.optim.Optimizer, torch.Tensor]:
    """Steps of Muon with the same gradients, however the matrix is divided. Returns the complete matrix, too."""
    made = torch.Generator().manual_seed(0)

    def distributed(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if mesh is None else distribute_tensor(tensor, mesh, [Shard(0)])

    matrix = nn.Parameter(distributed(torch.randn(shape, generator=made)))
    optimizer = MuonAdamW([("layers.0.weight", matrix)], lr=0.1)
    for _ in range(3):
        matrix.grad = distributed(torch.randn(shape, generator=made))
        optimizer.step()
    return optimizer, complete(matrix.detach())


def everybody(value: Any) -> list[Any]:
    values: list[Any] = [None] * PROCESSES
    dist.all_gather_object(values, value)
    return values


def scenario(folder: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", PROCESSES), rank=rank, world_size=PROCESSES)
    group = dist.group.WORLD
    assert group is not None
    plain = trained(make_module()).state_dict()
    result: dict[str, Any] = {"plain": plain["state"]}
    for name, divide in DIVIDING.items():
        model = divide(make_module(), group)
        optimizer = trained(model)
        pieces = everybody(optimizer_pieces(optimizer, model, rank))
        result[name] = join_pieces(pieces)["state"]
        for source, states in (("pieces", pieces), ("complete", [plain])):
            again = divide(make_module(), group)
            new = torch.optim.AdamW(again.parameters(), lr=0.1)
            wanted = wanted_pieces(new, again, rank)
            load_pieces(new, join_pieces(states, wanted), wanted)
            result[f"{name} from {source}"] = join_pieces(everybody(optimizer_pieces(new, again, rank)))["state"]
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("data_parallel",))
    for shape in MATRICES if hasattr(torch.optim, "Muon") else []:
        divided, matrix = with_muon(shape, mesh)
        whole, expected = with_muon(shape, None)
        pieces = everybody(optimizer_pieces(divided, OneMatrix(divided), rank))
        states = [state["state"][0]["momentum_buffer"] for state in (join_pieces(pieces), whole.state_dict())]
        result.setdefault("muon", []).append((matrix, expected, *states))
        with CommDebugMode() as counted:
            divided.step()
        result.setdefault("collectives", []).append(counted.get_total_counts())
    dist.destroy_process_group()
    return result


class OneMatrix(nn.Module):
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.matrix = optimizer.param_groups[0]["params"][0]


@divides_on_cpus
def test_pieces_are_joined_and_divided_again(tmp_path: Path) -> None:
    environments = [{"RANK": str(rank)} for rank in range(PROCESSES)]
    results = run_workers(scenario, str(tmp_path), folder=tmp_path, environments=environments)
    expected = results[0].pop("plain")
    for matrix, complete_matrix, momentum, complete_momentum in results[0].pop("muon", []):
        assert torch.allclose(matrix, complete_matrix, rtol=0, atol=1e-6)
        assert torch.equal(momentum, complete_momentum)
    assert set(results[0].pop("collectives", [])) <= {1}
    assert results[0].keys() == {
        f"{name}{rest}" for name in DIVIDING for rest in ("", " from pieces", " from complete")
    }
    for name, found in results[0].items():
        assert found.keys() == expected.keys(), name
        for number, own in expected.items():
            for key, value in own.items():
                assert torch.allclose(found[number][key], value, rtol=0, atol=1e-6), (name, number, key)
