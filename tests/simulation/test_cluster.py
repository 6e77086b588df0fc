import dataclasses
import json
import math
from pathlib import Path

import pytest

from lightning_halos.simulation.cluster import SimulatedCluster

from .paper import PAPER, PAPER_FILE

GOLDEN = Path(__file__).parents[1] / "golden"
RIGHT = {"bandwidths": [[10, 1], [2, 10]], "worker_speeds": [[1, 2], [4]], "step_ms": 100}


class TestDescription:
    def test_numbers_workers_region_by_region(self):
        cluster = SimulatedCluster(**RIGHT)
        assert cluster.regions == [[0, 1], [2]]
        assert cluster.region_of == [0, 0, 1]
        assert cluster.num_workers == 3

    def test_speeds_are_relative_to_the_fastest(self):
        assert SimulatedCluster(**RIGHT).relative_speeds == [0.25, 0.5, 1.0]

    def test_has_defaults(self):
        cluster = SimulatedCluster(**RIGHT)
        assert (cluster.names, cluster.global_region, cluster.message_bytes) == (("0", "1"), 0, None)

    def test_keeps_its_own_copy(self):
        speeds = [[1, 2], [4]]
        cluster = SimulatedCluster(RIGHT["bandwidths"], speeds, 100)
        speeds[0][0] = 99
        assert cluster.worker_speeds == ((1.0, 2.0), (4.0,))

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"worker_speeds": "fast"}, TypeError, r"worker_speeds='fast' must be a list of lists of numbers"),
            ({"worker_speeds": [1, 2]}, TypeError, r"worker_speeds=\[1, 2\] must be a list of lists"),
            ({"worker_speeds": []}, ValueError, r"worker_speeds=\[\] must have a list for at least one region"),
            ({"worker_speeds": [[1], []]}, ValueError, r"worker_speeds: region 1 has no workers"),
            ({"worker_speeds": [[1], [0]]}, ValueError, r"worker_speeds: region 1 has 0; .* positive"),
            ({"worker_speeds": [[1], ["2"]]}, ValueError, r"worker_speeds: region 1 has '2'"),
            ({"worker_speeds": [[1], [True]]}, ValueError, r"worker_speeds: region 1 has True"),
            ({"worker_speeds": [[1], [math.inf]]}, ValueError, r"worker_speeds: region 1 has inf"),
            ({"bandwidths": 10}, TypeError, r"bandwidths=10 must be a list of lists"),
            ({"bandwidths": [[10]]}, ValueError, r"bandwidths has rows of \[1\] numbers, but .* 2 region"),
            ({"bandwidths": [[10, 1], [1]]}, ValueError, r"rows of \[2, 1\] numbers.* must be 2 rows of 2"),
            ({"bandwidths": [[10, -1], [1, 10]]}, ValueError, r"bandwidths: region 0 has -1"),
            ({"bandwidths": [[10, 1], [math.nan, 10]]}, ValueError, r"bandwidths: region 1 has nan"),
            ({"step_ms": 0}, ValueError, r"step_ms=0 must be a positive number of milliseconds"),
            ({"step_ms": "1"}, ValueError, r"step_ms='1' must be a positive number"),
            ({"message_bytes": 0}, ValueError, r"message_bytes=0 must be a positive whole number, or None"),
            ({"devices_per_worker": 0}, ValueError, r"devices_per_worker=0 must be a whole number of at least 1"),
            (
                {"server_gigabytes_per_second": 0},
                ValueError,
                r"server_gigabytes_per_second=0 must be a positive number",
            ),
            ({"message_bytes": 1.5}, ValueError, r"message_bytes=1.5 must be a positive whole number"),
            ({"global_region": 2}, ValueError, r"global_region=2 must be the index of a region, from 0 to 1"),
            ({"global_region": -1}, ValueError, r"global_region=-1 must be the index"),
            ({"global_region": True}, ValueError, r"global_region=True must be the index"),
            ({"all_reduce": "tree"}, ValueError, r"all_reduce='tree' must be one of \('star', 'ring'\)"),
            ({"names": None}, TypeError, r"names=None must be a list of names, one for each region"),
            ({"names": "eu"}, TypeError, r"names='eu' must be a list of names"),
            ({"names": ["eu"]}, ValueError, r"names=\['eu'\] must have one name for each of the 2 region"),
            ({"names": ["eu", ""]}, ValueError, r"names=.* must have one name for each"),
            ({"names": ["eu", 3]}, ValueError, r"names=\['eu', 3\] must be texts, but 3 is none"),
            ({"names": [False, "us"]}, ValueError, r'must be texts, but False is none. .*quotes make a text.*"no"'),
            ({"record_parameters": "no"}, TypeError, r"record_parameters='no' must be True or False"),
            ({"worker_speeds": [[1], [1e-308]]}, ValueError, r"region 1 has 1e-308; .* positive number, from 1e-12"),
            ({"worker_speeds": [[1e308], [1]]}, ValueError, r"region 0 has 1e\+308"),
            ({"bandwidths": [[10, 1e-320], [1, 10]]}, ValueError, r"bandwidths: region 0 has 1e-320"),
            ({"step_ms": 1e308}, ValueError, r"step_ms=1e\+308 must be a positive number of .*, from 1e-12 to 1e\+12"),
            ({"server_gigabytes_per_second": 1e-320}, ValueError, r"server_gigabytes_per_second=1e-320 must be"),
            ({"message_bytes": 10**400}, ValueError, r"message_bytes=1000.* must be a positive whole number"),
            ({"names": ["eu", "eu"]}, ValueError, r"names=.* must all be different"),
        ],
        ids=str,
    )
    def test_refuses_what_is_wrong(self, change, error, message):
        with pytest.raises(error, match=message):
            SimulatedCluster(**{**RIGHT, **change})


class TestFile:
    @pytest.fixture
    def write(self, tmp_path):
        def write(text):
            path = tmp_path / "cluster.yaml"
            path.write_text(text)
            return path

        return write

    def test_of_the_paper_is_its_environment(self):
        config = json.loads((GOLDEN / "halos_paper_env.json").read_text())["config"]
        assert [list(row) for row in PAPER.bandwidths] == config["network_bandwidths_gbps"]
        assert [list(row) for row in PAPER.worker_speeds] == config["worker_speeds"]
        assert PAPER.step_ms == config["local_step_time_ms"]
        assert PAPER.message_bytes == config["message_bytes"]
        assert PAPER.global_region == 0
        assert PAPER.all_reduce == "ring"
        assert SimulatedCluster.from_yaml(str(PAPER_FILE)) == PAPER

    def test_may_name_the_global_region(self, write):
        path = write(
            "{bandwidths: [[9, 1], [1, 9]], worker_speeds: [[1], [1]], step_ms: 5, names: [us, eu], global_region: eu}"
        )
        cluster = SimulatedCluster.from_yaml(path)
        assert (cluster.global_region, cluster.names) == (1, ("us", "eu"))

    def test_may_leave_keys_blank_whose_defaults_it_wants(self, write):
        optional = [f.name for f in dataclasses.fields(SimulatedCluster) if f.default is not dataclasses.MISSING]
        text = "bandwidths: [[9]]\nworker_speeds: [[1]]\nstep_ms: 5\n"
        blank = write(text + "".join(f"{name}:\n" for name in optional))
        assert SimulatedCluster.from_yaml(blank) == SimulatedCluster([[9]], [[1]], 5)

    def test_may_have_numbers_with_an_exponent(self, write):
        cluster = SimulatedCluster.from_yaml(
            write("{bandwidths: [[1e-1]], worker_speeds: [[1]], step_ms: 2E+1, message_bytes: 5e8, global_region: 0.0}")
        )
        assert cluster == SimulatedCluster([[0.1]], [[1]], step_ms=20, message_bytes=500_000_000)

    @pytest.mark.parametrize(
        ("text", "error", "message"),
        [
            ("", ValueError, r"cluster.yaml must be a YAML mapping with the keys bandwidths, worker_speeds, step_ms"),
            ("[1, 2]", ValueError, r"must be a YAML mapping"),
            ("{bandwidths: [[9]", ValueError, r"cluster.yaml is not YAML"),
            ("{step_ms: 5, speed: 3, 7: 8}", ValueError, r"has the unknown key\(s\) 7, speed\. Known are bandwidths"),
            (
                "{bandwidths: , worker_speeds: , step_ms: 5}",
                ValueError,
                r"lacks the key\(s\) bandwidths, worker_speeds\.",
            ),
            (
                "{bandwidths: [[9]], worker_speeds: [[1]], step_ms: 5, names: 7, global_region: eu}",
                TypeError,
                r"cluster.yaml: names=7 must be a list of names",
            ),
            ("{step_ms: 5, step_ms: 6}", ValueError, r"cluster.yaml is not YAML: the key step_ms is there twice"),
            ("{step_ms: 2024-13-01}", ValueError, r"cluster.yaml is not YAML: month must be"),
            (
                f"{{bandwidths: [[{10**400}]], worker_speeds: [[1]], step_ms: 5}}",
                ValueError,
                r"cluster.yaml: bandwidths: region 0 has 10000",
            ),
            ("{step_ms: 5}", ValueError, r"lacks the key\(s\) bandwidths, worker_speeds\."),
            (
                "{bandwidths: [[9]], worker_speeds: [[1]], step_ms: 5, names: [us], global_region: eu}",
                ValueError,
                r"global_region='eu' is none of the names \['us'\]",
            ),
            ("{bandwidths: [[9]], worker_speeds: [[1]], step_ms: -5}", ValueError, r"cluster.yaml: step_ms=-5"),
            ("{bandwidths: 9, worker_speeds: [[1]], step_ms: 5}", TypeError, r"cluster.yaml: bandwidths=9"),
        ],
    )
    def test_refuses_what_is_wrong_and_names_itself(self, write, text, error, message):
        with pytest.raises(error, match=message):
            SimulatedCluster.from_yaml(write(text))

    def test_must_be_in_utf8(self, tmp_path):
        (tmp_path / "cluster.yaml").write_bytes("names: [Zürich]".encode("latin-1"))
        with pytest.raises(ValueError, match=r"cluster\.yaml is not a text in UTF-8"):
            SimulatedCluster.from_yaml(tmp_path / "cluster.yaml")

    def test_must_be_there(self, tmp_path):
        with pytest.raises(ValueError, match=r"is a folder\. Give the YAML file that describes the cluster"):
            SimulatedCluster.from_yaml(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"none\.yaml does not exist.*describes the cluster"):
            SimulatedCluster.from_yaml(tmp_path / "none.yaml")
