"""What ``torch.distributed`` and the strategy's collectives do in a worker of several processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_halos.core.placement import Placement
from lightning_halos.core.topology import Topology
from lightning_halos.training.agreement import Agreement
from lightning_halos.training.default_group import DefaultGroup
from lightning_halos.training.site import Site
from lightning_halos.transport.process_group import Mode
from lightning_halos.transport.store import open_store
from tests.integration.harness import Result, free_port, run_workers

PROCESSES = 4
RANKS = range(PROCESSES)


def collectives(rank: int, size: int) -> dict[str, Any]:
    """The results of collectives, on values that differ from process to process."""
    mine = torch.tensor([1.0, 10.0]) + rank
    found: dict[str, Any] = {"place": [dist.get_rank(), dist.get_world_size()]}
    for operation in ("SUM", "AVG", "MAX"):
        found[operation] = mine.clone()
        dist.all_reduce(found[operation], getattr(dist.ReduceOp, operation))
    found["broadcast"] = mine.clone()
    dist.broadcast(found["broadcast"], src=1)
    found["objects"] = [f"from {rank}"]
    dist.broadcast_object_list(found["objects"], src=1)
    gathered = [torch.zeros(2) for _ in range(size)]
    dist.all_gather(gathered, mine)
    found["gather"] = [int(row[0]) - 1 for row in gathered]
    names: list[Any] = [None] * size
    dist.all_gather_object(names, {"rank": rank})
    found["names"] = [name["rank"] for name in names]
    found["scattered"] = torch.zeros(1)
    dist.reduce_scatter(found["scattered"], [torch.tensor([float(rank + index)]) for index in range(size)])
    dist.barrier()
    return found


def two_workers_of_two(port: int) -> Result:
    rank = int(os.environ["LOCAL_RANK"])
    mode = Mode.TOGETHER
    placement = Placement.build([0] * PROCESSES, 2)
    topology = Topology.build([[0], [1]], servers_per_region=1)
    store = open_store("127.0.0.1", port, rank, PROCESSES, 60, lambda: None)
    site = Site(store, rank, placement, topology, one_machine=False, timeout=60, interrupted=lambda: None)
    group = DefaultGroup(site, lambda: mode, "gloo")
    group.install()
    result: Result = {"site": [site.rank, site.size, site.process, site.processes, site.lane, site.lanes]}
    result["together"] = collectives(rank, PROCESSES)
    mode = Mode.APART
    if site.rank == 1:  # the other worker takes part in nothing that this one does
        result["apart"] = collectives(rank, PROCESSES)
    mode = Mode.ALONE
    if site.rank == 0:
        result["alone"] = collectives(rank, 2)
    mode = Mode.APART
    assert site.inner_group is not None
    inner = torch.tensor([float(rank)])
    dist.all_reduce(inner, group=site.inner_group)
    own = dist.new_group(list(site.worker_processes), use_local_synchronization=True)
    agreement = Agreement(site)
    agreed = [agreement.of_lane_0(rank), agreement.ask([rank == 3]), agreement.is_same(str(rank // 2))]
    grouped = torch.tensor([float(rank)])
    dist.all_reduce(grouped, group=own)
    mode = Mode.TOGETHER
    lane = site.lane_collectives.gather_texts(str(rank))
    site.collectives.barrier()  # the process with rank 0 has the store
    return {
        **result,
        "inner": inner.item(),
        "own group": grouped.item(),
        "lane": lane,
        "here": site.here,
        "agreed": agreed,
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    environments = [{"LOCAL_RANK": str(rank)} for rank in RANKS]
    folder: Path = tmp_path_factory.mktemp("worker")
    return run_workers(two_workers_of_two, free_port(), folder=folder, environments=environments)


def test_each_process_knows_its_worker_and_its_lane(results: list[Result]) -> None:
    assert [result["site"] for result in results] == [
        [0, 2, 0, 4, 0, 2],
        [0, 2, 1, 4, 1, 2],
        [1, 2, 2, 4, 0, 2],
        [1, 2, 3, 4, 1, 2],
    ]
    assert results[3]["here"] == "rank 3 of worker 1 (region 1)"
    assert [result["lane"] for result in results] == [["0", "2"], ["1", "3"], ["0", "2"], ["1", "3"]]


def test_together_all_processes_combine_their_values(results: list[Result]) -> None:
    for rank in RANKS:
        found = results[rank]["together"]
        assert found["place"] == [rank, 4]
        assert found["SUM"].tolist() == [10, 46]
        assert found["AVG"].tolist() == [2.5, 11.5]
        assert found["MAX"].tolist() == [4, 13]
        assert found["broadcast"].tolist() == [2, 11]
        assert found["objects"] == ["from 1"]
        assert found["gather"] == found["names"] == [0, 1, 2, 3]
        assert found["scattered"].tolist() == [6 + 4 * rank]


def test_apart_a_worker_combines_its_own_values_and_acts_as_if_the_others_had_them(results: list[Result]) -> None:
    for rank in (2, 3):
        found = results[rank]["apart"]
        assert found["place"] == [rank, 4]
        assert found["SUM"].tolist() == [2 * (3 + 4), 2 * (12 + 13)]
        assert found["AVG"].tolist() == [3.5, 12.5]
        assert found["MAX"].tolist() == [4, 13]
        assert found["broadcast"].tolist() == [4, 13], "the process with the lane of rank 1 stands for it"
        assert found["objects"] == ["from 3"]
        assert found["gather"] == found["names"] == [2, 3, 2, 3]
        assert found["scattered"].tolist() == [2 * (2 + 3 + 2 * rank)]


def test_alone_a_worker_is_the_world(results: list[Result]) -> None:
    for rank in (0, 1):
        found = results[rank]["alone"]
        assert found["place"] == [rank, 2]
        assert found["SUM"].tolist() == [3, 21]
        assert found["AVG"].tolist() == [1.5, 10.5]
        assert found["broadcast"].tolist() == [2, 11]
        assert found["objects"] == ["from 1"]
        assert found["gather"] == found["names"] == [0, 1]
        assert found["scattered"].tolist() == [1 + 2 * rank]


def test_a_group_of_a_workers_processes_combines_their_values_during_training(results: list[Result]) -> None:
    assert [result["inner"] for result in results] == [1, 1, 5, 5]
    assert [result["own group"] for result in results] == [1, 1, 5, 5]


def test_the_processes_of_a_worker_agree(results: list[Result]) -> None:
    first, second = [0, [[False], [False]], True], [2, [[False], [True]], True]
    assert [result["agreed"] for result in results] == [first, first, second, second]
