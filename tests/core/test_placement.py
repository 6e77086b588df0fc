"""Processes are grouped into workers, and wrong sizes are refused with what to do."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_halos.core.placement import Placement, by_worker, check_worker

TWO_NODES = [0, 0, 0, 0, 1, 1]


def test_every_process_is_a_worker_by_default() -> None:
    placement = Placement.build([0, 0, 1], 1)
    assert placement.is_single
    assert placement.is_even
    assert [placement.worker_of(process) for process in range(3)] == [0, 1, 2]
    assert placement.lanes == 1


def test_consecutive_processes_of_a_node_are_a_worker() -> None:
    placement = Placement.build(TWO_NODES, 2)
    assert placement.workers == ((0, 1), (2, 3), (4, 5))
    assert placement.lanes == 2
    assert [placement.worker_of(process) for process in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [placement.lane_of(process) for process in range(6)] == [0, 1, 0, 1, 0, 1]
    assert placement.expand([0, 2]) == [0, 1, 4, 5]


def test_a_node_is_a_worker_and_the_smallest_has_the_number_of_lanes() -> None:
    placement = Placement.build(TWO_NODES, "node")
    assert placement.workers == ((0, 1, 2, 3), (4, 5))
    assert placement.lanes == 2
    assert not placement.is_even
    assert placement.common_size == 2
    assert [placement.carries(process) for process in range(6)] == [True, True, False, False, True, True]


def test_a_process_of_a_worker_stands_for_every_process() -> None:
    placement = Placement.build(TWO_NODES, "node")
    assert [placement.in_place_of(process, 1) for process in range(6)] == [4, 5, 4, 5, 4, 5]
    assert [placement.in_place_of(process, 0) for process in range(6)] == [0, 1, 2, 3, 0, 1]


def test_fewer_lanes_than_processes_can_be_chosen() -> None:
    placement = Placement.build([0, 0, 0, 0], 4, lanes=1)
    assert placement.lanes == 1
    assert [placement.carries(process) for process in range(4)] == [True, False, False, False]


def test_a_worker_never_spans_two_nodes() -> None:
    with pytest.raises(ValueError, match=r"worker=4 does not divide the 2 process\(es\) of a node.* worker=2, or"):
        Placement.build(TWO_NODES, 4)


@pytest.mark.parametrize("worker", [0, -1])
def test_a_worker_has_at_least_one_process(worker: int) -> None:
    with pytest.raises(ValueError, match=f"worker={worker} must be at least 1"):
        check_worker(worker)


@pytest.mark.parametrize("worker", [2.0, True, "gpu", None])
def test_the_size_of_a_worker_is_a_number_or_a_node(worker: Any) -> None:
    with pytest.raises(TypeError, match=r"worker=.* must be a number of processes such as 2, or 'node'"):
        check_worker(worker)


def test_a_worker_is_in_one_region() -> None:
    placement = Placement.build([0, 0, 0, 0], 2)
    assert by_worker(placement, ["us", "us", "eu", "eu"]) == ["us", "eu"]
    with pytest.raises(ValueError, match="HALOS_REGION differs between the processes of worker 1: rank 2 has 'us'"):
        by_worker(placement, ["us", "us", "us", "eu"])
