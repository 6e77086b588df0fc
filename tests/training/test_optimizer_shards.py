"""The state of an optimizer of a divided model survives another division, and none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_halos.training.optimizer_shards import join_pieces, load_pieces, optimizer_pieces, wanted_pieces
from tests.integration.harness import run_workers
from tests.transport.test_worker_processes import by_rows, flat, make_module

PROCESSES = 3
DIVIDING = {"FSDP2": by_rows, "FSDP": flat}


def trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


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
    dist.destroy_process_group()
    return result


def test_pieces_are_joined_and_divided_again(tmp_path: Path) -> None:
    environments = [{"RANK": str(rank)} for rank in range(PROCESSES)]
    results = run_workers(scenario, str(tmp_path), folder=tmp_path, environments=environments, timeout=200)
    expected = results[0].pop("plain")
    assert results[0].keys() == {
        f"{name}{rest}" for name in DIVIDING for rest in ("", " from pieces", " from complete")
    }
    for name, found in results[0].items():
        assert found.keys() == expected.keys(), name
        for number, own in expected.items():
            for key, value in own.items():
                assert torch.allclose(found[number][key], value, rtol=0, atol=1e-6), (name, number, key)
