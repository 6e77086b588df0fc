"""The samples that a worker trains on with leased parts of an epoch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.data import DistributedSampler

from lightning_halos.core.cursor import Lease
from lightning_halos.training.shared_data import Leases, Share, SharedSampler

SAMPLES = 103


def shared(leases: list[Lease], shuffle: bool) -> SharedSampler:
    sampler = DistributedSampler(range(SAMPLES), num_replicas=4, rank=1, shuffle=shuffle, seed=5)  # type: ignore[arg-type]
    return SharedSampler(sampler, Leases(iter(leases)), step_samples=10, samples=SAMPLES)


def trained_on(sampler: SharedSampler) -> list[int]:
    with sampler.training():
        return list(sampler)


def test_leases_are_parts_of_the_epochs_shuffled_order() -> None:
    sampler = shared([Lease(0, 2, 3), Lease(0, 9, 2), Lease(1, 0, 1)], shuffle=True)
    orders = [torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(5 + epoch)).tolist() for epoch in (0, 1)]
    indices = trained_on(sampler)
    assert indices == orders[0][20:50] + orders[0][90:103]
    assert all(type(index) is int for index in indices)
    sampler.set_epoch(1)
    assert trained_on(sampler) == orders[1][:10]


def test_without_shuffling_they_are_parts_of_the_dataset() -> None:
    assert trained_on(shared([Lease(0, 2, 3), Lease(0, 10, 1)], shuffle=False)) == [*range(20, 50), 100, 101, 102]


def test_who_only_looks_gets_the_shard_of_ddp_and_takes_nothing() -> None:
    sampler = shared([Lease(0, 2, 3), Lease(1, 0, 1)], shuffle=True)
    with sampler.training():
        training = iter(sampler)
    first = next(training)
    ddp = DistributedSampler(range(SAMPLES), num_replicas=4, rank=1, shuffle=True, seed=5)  # type: ignore[arg-type]
    assert list(sampler) == list(sampler) == list(ddp)
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(5)).tolist()
    assert [first, *training] == order[20:50]
    sampler.set_epoch(1)
    ddp.set_epoch(1)
    assert list(sampler) == list(ddp)
    assert len(trained_on(sampler)) == 10


def test_the_order_of_an_epoch_takes_the_memory_of_a_tensor_not_of_a_list() -> None:
    sampler = shared([Lease(0, 0, 1)], shuffle=True)
    trained_on(sampler)
    kept = [value for value in vars(sampler).values() if isinstance(value, tuple)]
    assert [type(order) for _, order in kept] == [torch.Tensor]


def test_what_another_region_leaves_of_an_earlier_epoch_is_used_in_the_present_one() -> None:
    sampler = shared([Lease(0, 2, 3), Lease(1, 0, 1), Lease(0, 9, 1), Lease(1, 1, 1)], shuffle=False)
    assert trained_on(sampler) == list(range(20, 50))
    sampler.set_epoch(1)
    assert trained_on(sampler) == [*range(10), *range(90, 100), *range(10, 20)]


def test_the_rest_of_an_epoch_that_the_trainer_leaves_is_dropped_and_reported() -> None:
    leases = Leases(iter([Lease(0, 0, 2), Lease(0, 4, 2), Lease(1, 0, 1)]))
    given = leases.of_epoch(0)
    assert next(given) == Lease(0, 0, 2)
    assert leases.use() == Lease(0, 0, 1)
    assert list(leases.of_epoch(1)) == [Lease(1, 0, 1)]
    assert leases.dropped == [Lease(0, 1, 1), Lease(0, 4, 2)]


def test_a_simulation_does_not_wait_for_data_of_an_epoch_that_a_hook_has_left() -> None:
    last = Lease(0, 4, 2)  # which it repeats, for DataLoader workers that read ahead
    leases = Leases(itertools.chain([Lease(0, 0, 4)], itertools.repeat(last)))
    next(leases.of_epoch(0))
    with pytest.raises(RuntimeError, match="must not return -1 with simulate="):
        list(leases.of_epoch(1))


def of_worker(leases: list[Lease], processes: int, samples: int = SAMPLES) -> list[list[int]]:
    """The samples of each process of a worker, whose batches have 2 samples per process, and 2 batches per step."""
    sampler = DistributedSampler(range(SAMPLES), num_replicas=4, rank=1, shuffle=False)  # type: ignore[arg-type]
    step = 2 * 2 * processes
    return [
        trained_on(SharedSampler(sampler, Leases(iter(leases)), step, samples, Share(lane, processes, batch_size=2)))
        for lane in range(processes)
    ]


def test_the_processes_of_a_worker_divide_each_of_its_batches() -> None:
    assert of_worker([Lease(0, 1, 1)], processes=2) == [[8, 10, 12, 14], [9, 11, 13, 15]]
    first, second, third = of_worker([Lease(0, 0, 1)], processes=3)
    assert [first[:2], second[:2], third[:2]] == [[0, 3], [1, 4], [2, 5]]


def test_the_last_batch_of_an_epoch_is_as_long_in_all_processes_of_a_worker() -> None:
    assert of_worker([Lease(0, 0, 1)], processes=2, samples=7) == [[0, 2, 4, 6], [1, 3, 5, 4]]
    assert of_worker([Lease(0, 0, 1)], processes=4, samples=9) == [[0, 4, 8], [1, 5, 8], [2, 6, 8], [3, 7, 8]]
