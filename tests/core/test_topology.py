import pytest

from lightning_halos.core.algorithms import AsyncLocalSGD
from lightning_halos.core.topology import REGION_VARIABLE, Topology, assign_regions, check_regions, regions_by_place


@pytest.fixture(autouse=True)
def without_variable(monkeypatch):
    monkeypatch.delenv(REGION_VARIABLE, raising=False)


class TestAssignment:
    @pytest.mark.parametrize(
        ("regions", "world_size", "expected"),
        [
            (1, 3, [[0, 1, 2]]),
            (2, 4, [[0, 1], [2, 3]]),
            (2, 5, [[0, 1, 2], [3, 4]]),
            (4, 6, [[0, 1], [2, 3], [4], [5]]),
            (3, 3, [[0], [1], [2]]),
        ],
    )
    def test_a_number_of_regions_divides_the_ranks_in_order_as_equally_as_possible(self, regions, world_size, expected):
        assert assign_regions(regions, world_size, num_nodes=1) == expected

    def test_lists_name_the_ranks_of_each_region_in_any_order(self):
        assert assign_regions(((3, 1), (0, 2)), 4, num_nodes=1) == [[3, 1], [0, 2]]

    def test_by_default_one_node_is_one_region(self):
        assert assign_regions(None, 3, num_nodes=1) == [[0, 1, 2]]

    def test_by_default_several_nodes_are_regions_which_only_all_processes_together_know(self):
        assert assign_regions(None, 6, num_nodes=3) is None
        assert regions_by_place([""] * 6, [0, 0, 1, 1, 2, 2]) == ([[0, 1], [2, 3], [4, 5]], ["0", "1", "2"])

    def test_nodes_may_have_different_numbers_of_workers_and_any_ranks(self):
        assert regions_by_place([""] * 3, [0, 1, 1]) == ([[0], [1, 2]], ["0", "1"])
        assert regions_by_place([""] * 5, [2, 0, 2, 0, 1]) == ([[0, 2], [1, 3], [4]], ["0", "1", "2"])

    def test_by_default_the_environment_decides_if_it_names_a_region(self, monkeypatch):
        monkeypatch.setenv(REGION_VARIABLE, "eu")
        assert assign_regions(None, 6, num_nodes=1) is None

    def test_an_argument_beats_the_environment(self, monkeypatch):
        monkeypatch.setenv(REGION_VARIABLE, "eu")
        assert assign_regions(2, 4, num_nodes=1) == [[0, 1], [2, 3]]
        assert assign_regions([[0, 3], [1, 2]], 4, num_nodes=1) == [[0, 3], [1, 2]]

    def test_an_empty_variable_names_no_region(self, monkeypatch):
        monkeypatch.setenv(REGION_VARIABLE, "")
        assert assign_regions(None, 2, num_nodes=1) == [[0, 1]]

    def test_processes_that_named_the_same_region_are_together(self):
        regions, names = regions_by_place(["us", "eu", "us", "eu", "asia"], nodes=[0, 0, 1, 1, 1])
        assert regions == [[0, 2], [1, 3], [4]]
        assert names == ["us", "eu", "asia"]


class TestTopology:
    def test_a_region_has_one_server_led_by_its_lowest_rank(self):
        topology = Topology.build([[3, 1], [2, 0]], servers_per_region=1)
        assert [(g.index, g.region, g.ranks) for g in topology.groups] == [(0, 1, (0, 2)), (1, 0, (1, 3))]
        assert topology.leaders == [0, 1]
        assert sum(len(group.ranks) for group in topology.groups) == 4

    def test_servers_of_a_region_share_its_workers(self):
        topology = Topology.build([[0, 1, 2, 3, 4], [5, 6]], servers_per_region=2)
        assert [g.ranks for g in topology.groups] == [(0, 1, 2), (3, 4), (5,), (6,)]
        assert [g.region for g in topology.groups] == [0, 0, 1, 1]
        assert [g.index for g in topology.groups] == [0, 1, 2, 3]

    @pytest.mark.parametrize("servers_per_region", [1, 2])
    def test_rank_0_leads_the_first_server_which_hosts_the_global_one_too(self, servers_per_region):
        topology = Topology.build([[5, 4, 2], [1, 0, 3]], servers_per_region)
        assert topology.leaders[0] == 0
        assert topology.leaders == sorted(topology.leaders)
        assert sorted(rank for group in topology.groups for rank in group.ranks) == list(range(6))

    def test_finds_the_server_of_a_worker(self):
        topology = Topology.build([[0, 2], [1, 3]], servers_per_region=1)
        assert [topology.group_of(rank).index for rank in range(4)] == [0, 1, 0, 1]

    def test_describes_a_worker_by_rank_and_region(self):
        assert Topology.build([[0], [1]], 1, names=["eu", "us"]).describe(1) == "rank 1 (region us)"
        assert Topology.build([[0], [1]], 1).describe(1) == "rank 1 (region 1)"

    def test_a_worker_keeps_its_region_if_one_server_serves_all_regions(self):
        topology = AsyncLocalSGD().arrange([[0, 2], [3, 1]], names=["eu", "us"], home=1)
        assert [group.ranks for group in topology.groups] == [(0, 1, 2, 3)]
        assert topology.regions == ((0, 2), (1, 3))
        assert [topology.describe(rank) for rank in range(2)] == ["rank 0 (region eu)", "rank 1 (region us)"]


class TestErrors:
    """Each error names the argument, its value, and what to do."""

    @pytest.mark.parametrize("regions", [None, 1, 7, [[0]], [[0, 1], [2]], ((1,), (0,)), [range(2), [2]]])
    def test_good_values_pass(self, regions):
        check_regions(regions)

    @pytest.mark.parametrize("regions", ["2", 2.0, True, [0, 1], ["01"], [["0"]], [[0.0]], [[True]], {0: [1]}, [None]])
    def test_a_value_of_the_wrong_type(self, regions):
        with pytest.raises(TypeError) as error:
            check_regions(regions)
        assert f"regions={regions!r}" in str(error.value)
        assert "a number of regions such as 2, or the ranks of each region such as [[0, 1], [2, 3]]" in str(error.value)

    @pytest.mark.parametrize(
        ("regions", "says"),
        [
            (0, ["regions=0", "at least 1"]),
            (-2, ["regions=-2", "at least 1"]),
            ([], ["regions=[]", "at least one region, such as [[0, 1], [2, 3]]"]),
            ([[0, 1], []], ["regions=[[0, 1], []]", "region 1 has no workers", "Give it at least one rank"]),
            ([[0, 1], [1]], ["regions=[[0, 1], [1]]", "rank 1 is in region 0 and in region 1", "exactly one region"]),
            ([[0, 0]], ["regions=[[0, 0]]", "rank 0 is in region 0 and in region 0", "exactly one region"]),
        ],
    )
    def test_a_value_that_is_wrong_whatever_the_number_of_workers(self, regions, says):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            check_regions(regions)
        assert all(part in str(error.value) for part in says), error.value

    @pytest.mark.parametrize(
        ("regions", "says"),
        [
            (5, ["regions=5", "4 worker(s)", "regions=4 or fewer, or more devices"]),
            ([[0, 1], [2]], ["regions=[[0, 1], [2]]", "4 worker(s)", "without a region: [3]", "from 0 to 3"]),
            ([[0, 1], [2, 3, 4]], ["4 worker(s)", "that do not exist: [4]", "from 0 to 3"]),
            ([[0, 1], [2, -1]], ["without a region: [3]", "that do not exist: [-1]"]),
        ],
    )
    def test_a_value_that_does_not_fit_the_workers(self, regions, says):
        with pytest.raises(ValueError, match="of the job") as error:
            assign_regions(regions, world_size=4, num_nodes=1)
        assert all(part in str(error.value) for part in says), error.value

    def test_a_variable_that_only_some_processes_have(self):
        with pytest.raises(ValueError, match=REGION_VARIABLE) as error:
            regions_by_place(["eu", "", "us", ""], nodes=[0, 0, 1, 1])
        assert "not in rank(s) [1, 3]" in str(error.value)
        assert "every process, or pass HalosStrategy(regions=...)" in str(error.value)

    def test_more_servers_than_workers_in_a_region(self):
        with pytest.raises(ValueError, match="servers_per_region=3") as error:
            Topology.build([[0, 1, 2], [3, 4]], 3, names=["eu", "us"])
        assert "the 2 worker(s) of region us" in str(error.value)
        assert "lower servers_per_region to at most 2, or put more workers into the region" in str(error.value)
