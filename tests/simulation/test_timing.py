from dataclasses import replace
from itertools import permutations

import pytest

from lightning_halos.core.wire_formats import WireFormats
from lightning_halos.planning.random_cluster import random_cluster
from lightning_halos.simulation.cluster import SimulatedCluster
from lightning_halos.simulation.timing import Timing, _bound_of_rings

from .paper import PAPER

# 1 MB is 8 Mbit: 8 ms at 1 Gbit/s.
CLUSTER = SimulatedCluster([[8, 4], [2, 1]], [[1, 0.5], [0.3]], step_ms=100)
TIMING = Timing(CLUSTER, 1_000_000)
PART_BYTES = 2**22


class TestDurations:
    def test_of_a_transfer_are_bits_by_the_bandwidth_of_that_direction(self):
        assert [TIMING.transfer(a, b) for a in (0, 1) for b in (0, 1)] == pytest.approx([1, 2, 4, 8])

    def test_of_a_transfer_are_shorter_in_a_narrow_format_except_for_buffers_and_all_reduces(self):
        timing = Timing(CLUSTER, 1_000_000, plain_bytes=360_000).on(WireFormats.of({"between": "int4"}))
        assert (timing.bytes_within, timing.bytes_between) == (1_000_000, 160_000 * 34 // 64 + 360_000)
        assert timing.transfer(0, 0) == pytest.approx(1)
        assert timing.transfer(0, 1) == pytest.approx(2 * 0.445)
        assert timing.all_reduce() == Timing(CLUSTER, 1_000_000).all_reduce()

    def test_of_computing_are_steps_by_relative_speed(self):
        assert [TIMING.compute(worker, 3) for worker in range(3)] == pytest.approx([300, 600, 1000])

    def test_of_a_round_are_two_messages_from_the_server_and_the_steps(self):
        assert TIMING.round(0, 0, 3) == pytest.approx(2 * 1 + 300)
        assert TIMING.round(2, 0, 3) == pytest.approx(2 * 2 + 1000)  # the link to the worker counts, both ways
        assert TIMING.round(0, 1, 3) == pytest.approx(2 * 4 + 300)

    def test_of_rounds_differ_for_workers_that_are_alike_in_the_order_of_their_ranks(self):
        timing = Timing(SimulatedCluster([[1]], [[1, 1, 1]], 100), 1000)
        rounds = [timing.round(worker, 0, 8) for worker in range(3)]
        assert rounds[0] < rounds[1] < rounds[2] < rounds[0] + 1e-5

    def test_of_an_all_reduce_in_a_ring_are_those_of_its_slowest_link(self):
        ring = Timing(replace(CLUSTER, all_reduce="ring"), 1_000_000)
        assert ring.all_reduce() == pytest.approx(2 * 2 / 3 * 8 / 2)  # 3 workers; the ring's slowest link is 2 Gbit/s

    @pytest.mark.parametrize("kind", ["ring", "star"])
    def test_of_an_all_reduce_of_one_worker_are_none(self, kind):
        assert Timing(SimulatedCluster([[1]], [[1]], 100, all_reduce=kind), 1000).all_reduce() == 0

    def test_of_an_all_reduce_in_a_star_of_a_small_model_are_all_ways_up_and_down(self):
        # The leader in region 0 has a worker and another leader; region 1 has no other worker.
        assert TIMING.all_reduce() == pytest.approx(2 * 2 * 1 + 4 + 2)

    def test_of_an_all_reduce_in_a_star_of_a_large_model_are_those_of_the_slowest_link(self):
        large = Timing(CLUSTER, 1000 * PART_BYTES)
        assert large.all_reduce() == pytest.approx(large.transfer(1, 0), rel=0.01)  # the ways overlap
        wide = SimulatedCluster([[8, 4], [2, 1]], [[1] * 9, [1] * 3], step_ms=100)  # each leader has many workers
        assert Timing(wide, 1000 * PART_BYTES).all_reduce() == pytest.approx(2 * large.transfer(1, 1), rel=0.01)
        home = replace(wide, global_region=1)
        assert Timing(home, 1000 * PART_BYTES).all_reduce() == pytest.approx(3 * large.transfer(1, 1), rel=0.01)

    def test_of_an_all_reduce_in_the_papers_environment(self):
        assert Timing(PAPER, 281_706_496).all_reduce() == pytest.approx(2 * 15 / 16 * 281_706_496 * 8 / 0.127e9 * 1e3)


class TestLocalSteps:
    def test_are_fewer_for_slower_workers_if_dynamic(self):
        assert TIMING.local_steps(8, dynamic=True) == [8, 4, 3]
        assert TIMING.local_steps(8, dynamic=False) == [8, 8, 8]


class TestRing:
    def test_in_one_region_is_its_own_network(self):
        assert Timing(SimulatedCluster([[7]], [[1, 1]], 100), 1000).ring_bandwidth() == 7

    @pytest.mark.parametrize("regions", [2, 10])
    def test_goes_through_each_region_of_several_workers(self, regions):
        links = [[0.1 if a == b else 9 for b in range(regions)] for a in range(regions)]
        bandwidths = [
            Timing(SimulatedCluster(links, [[1] * workers] * regions, 100), 1000).ring_bandwidth() for workers in (1, 2)
        ]
        assert bandwidths == [9, 0.1]

    def test_goes_around_slow_links(self):
        table = [[100, 5, 1, 5], [5, 100, 5, 1], [1, 5, 100, 5], [5, 1, 5, 100]]
        assert Timing(SimulatedCluster(table, [[1]] * 4, 100), 1000).ring_bandwidth() == 5

    def test_has_a_direction(self):
        table = [[100, 5, 1], [1, 100, 5], [5, 1, 100]]
        assert Timing(SimulatedCluster(table, [[1]] * 3, 100), 1000).ring_bandwidth() == 5

    @pytest.mark.parametrize("seed", range(5))
    def test_up_to_8_regions_is_the_best_there_is(self, seed):
        cluster = random_cluster(6, 1, seed)
        assert Timing(cluster, 1000).ring_bandwidth() == best_ring(cluster.bandwidths)

    @pytest.mark.parametrize("seed", range(10))
    def test_is_bounded_by_the_best_links_of_each_region(self, seed):
        table = random_cluster(7, 1, seed).bandwidths
        one_way = [[bandwidth * (1 + a + 7 * b) for b, bandwidth in enumerate(row)] for a, row in enumerate(table)]
        for links in (table, one_way):
            assert best_ring(links) <= _bound_of_rings(links) < 2 * best_ring(links)

    def test_of_many_regions_needs_two_links_of_each(self):
        # Region 0 has one fast neighbor, so a ring that comes from there leaves on a slow link.
        table = [[0.1 if 0 in (a, b) and a + b > 1 else 9 for b in range(10)] for a in range(10)]
        assert Timing(SimulatedCluster(table, [[1]] * 10, 100), 1000).ring_bandwidth() == 0.1

    def test_of_many_regions_is_found_where_there_is_one(self):
        # Fast links form a single ring, 0, 7, 14 and so on; all other links are slow.
        table = [[9 if (b - a) % 40 == 7 else 0.1 for b in range(40)] for a in range(40)]
        assert Timing(SimulatedCluster(table, [[1]] * 40, 100), 1000).ring_bandwidth() == 9

    def test_of_many_regions_goes_around_slow_links(self):
        cluster = random_cluster(40, 1)
        fastest = min(max(row[:a] + row[a + 1 :]) for a, row in enumerate(cluster.bandwidths))
        assert 0.5 < Timing(cluster, 1000).ring_bandwidth() <= fastest  # at best, each region's fastest link


def best_ring(table):
    """The best of all rings, tried one by one."""
    rings = [(0, *rest) for rest in permutations(range(1, len(table)))]
    return max(min(table[a][b] for a, b in zip(ring, ring[1:] + ring[:1], strict=True)) for ring in rings)
