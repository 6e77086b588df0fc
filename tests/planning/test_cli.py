import json
import subprocess
import sys

import pytest

from lightning_halos.cli import main
from lightning_halos.core.algorithms import ALGORITHMS
from tests.simulation.paper import PAPER_FILE

PAPER = str(PAPER_FILE)
BUSY_SERVER = ["--server-gigabytes-per-second", "0.1"]
SMALL = ["--random-cluster", "2x3", "--hours", "0.1"]


@pytest.fixture
def run(capsys):
    def run(*arguments):
        status = main(["plan", *arguments])
        return status, *capsys.readouterr()

    return run


def span(event):
    """Start and end of a slice in nanoseconds."""
    return round(event["ts"] * 1e3), round(event["ts"] * 1e3) + round(event["dur"] * 1e3)


class TestPlan:
    def test_prints_a_column_for_each_algorithm_and_writes_nothing(self, run, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        status, out, err = run(PAPER)
        assert (status, err) == (0, "")
        lines = out.splitlines()
        assert lines[0] == (
            "16 workers in 4 regions, 281.7 MB per model on a link, 238.391 ms per local step of the fastest worker"
        )
        assert lines[2].split() == list(ALGORITHMS)
        cells = {line[:36].strip(): line[36:].split() for line in lines[3:]}
        assert cells["seconds per global step"] == ["35.293", "3.061", "2.051", "0.667", "0.394"]
        assert cells["share of all workers' time: computing"[:36]][-5:] == ["1.7%", "20.0%", "19.0%", "59.0%", "98.0%"]
        assert not list(tmp_path.iterdir())

    def test_workers_of_several_devices_share_their_link(self, run, tmp_path):
        (tmp_path / "several.yaml").write_text(PAPER_FILE.read_text() + "devices_per_worker: 4\n")
        _, one, _ = run(PAPER)
        _, several, _ = run(str(tmp_path / "several.yaml"))
        assert several.splitlines()[0] == (
            "16 workers of 4 devices in 4 regions, 281.7 MB per model on a link (70.4 MB per device), 238.391 ms per"
            " local step of the fastest worker"
        )
        assert several.splitlines()[1:] == one.splitlines()[1:]

    def test_a_number_of_bytes_may_have_an_exponent(self, run):
        status, out, _ = run(PAPER, "--message-bytes", "4e9")
        assert (status, out) == (0, run(PAPER, "--message-bytes", "4000000000")[1])

    def test_one_worker_is_called_one(self, run, tmp_path):
        (tmp_path / "alone.yaml").write_text("{bandwidths: [[9]], worker_speeds: [[1]], step_ms: 5}")
        assert run(str(tmp_path / "alone.yaml"), "--message-bytes", "1")[1].startswith("1 worker in 1 region, ")

    def test_is_for_the_algorithms_asked_for_in_their_usual_order(self, run):
        _, out, _ = run("--algorithm", "halos", "--algorithm", "diloco", PAPER)
        assert out.splitlines()[2].split() == ["diloco", "halos"]

    def test_takes_the_settings_of_halos(self, run):
        arguments = [
            "--local-steps",
            "4",
            "--same-local-steps",
            "--accumulate-updates",
            "5",
            "--servers-per-region",
            "2",
        ]
        _, out, _ = run(PAPER, "--algorithm", "halos", *arguments)
        rows = dict(line.rsplit(maxsplit=1) for line in out.splitlines() if line.startswith(("local", "pushes per")))
        assert rows == {"local steps per round": "4", "pushes per exchange (K)": "5"}

    def test_takes_the_settings_of_a_file(self, run, tmp_path):
        path = tmp_path / "settings.yaml"
        path.write_text("{local_steps: 4, accumulate_updates: 8, overlap: true}")
        _, out, _ = run("--algorithm", "halos", "--local-steps", "4", "--accumulate-updates", "8", "--overlap", PAPER)
        assert run("--settings", str(path), PAPER) == (0, out, "")
        assert run("--settings", str(path), "--algorithm", "halos", PAPER)[0] == 2
        path.write_text("{wire: {between: int4}}")
        _, out, _ = run(PAPER, "--algorithm", "halos", "--wire", "float32", "int4")
        assert run("--settings", str(path), PAPER) == (0, out, "")

    def test_a_setting_that_no_strategy_has_is_an_error(self, run, tmp_path):
        path = tmp_path / "settings.yaml"
        path.write_text("{local_step: 4}")
        status, out, err = run("--settings", str(path), PAPER)
        assert (status, out) == (2, "")
        assert "settings.yaml: HalosStrategy has no argument local_step." in err
        diloco = "class_path: lightning_halos.DilocoStrategy\ninit_args: {local_steps: 4, accumulate_updates: 8}"
        path.write_text(diloco)
        assert "DilocoStrategy has no argument accumulate_updates." in run("--settings", str(path), PAPER)[2]
        path.write_text(diloco.replace("accumulate_updates: 8", "regions: 2, timeout: 60, worker: 2"))
        assert run("--settings", str(path), PAPER)[0] == 0

    @pytest.mark.parametrize(
        ("arguments", "left_out"),
        [
            (["--settings", "s.yaml", "--local-steps", "8"], "--local-steps"),
            (["--settings", "s.yaml", "--overlap", "--wire", "int4"], "--overlap, --wire"),
            (["--settings", "s.yaml", "--algorithm", "halos"], "--algorithm"),
            (["--sweep", "--accumulate-updates", "4", "--local-steps", "4"], "--accumulate-updates, --local-steps"),
            (["--sweep", "--steps", "300"], "--steps"),
            (["--sweep", "--settings", "s.yaml"], "--settings"),
            (["--sweep", "--all-reduce", "ring"], "--all-reduce"),
            (["--algorithm", "halos", "--baseline-local-steps", "4"], "--baseline-local-steps"),
            (["--algorithm", "halos", "--all-reduce", "ring"], "--all-reduce"),
            (["--algorithm", "sync_sgd", "--overlap", "--wire", "int4"], "--overlap, --wire"),
            (
                ["--algorithm", "diloco", "--local-steps", "4", "--same-local-steps"],
                "--local-steps, --same-local-steps",
            ),
            (["--algorithm", "async_local_sgd", "--accumulate-updates", "4"], "--accumulate-updates"),
            (
                ["--algorithm", "async_local_sgd", "--servers-per-region", "2", "--steps", "9"],
                "--servers-per-region, --steps",
            ),
            (["--settings", "s.yaml", "--all-reduce", "ring"], "--all-reduce"),
            (["--seed", "5"], "--seed"),
            (["--timeline-minutes", "-3"], "--timeline-minutes"),
            (["--sweep", "--output", "x", "--timeline-minutes", "3"], "--timeline-minutes"),
        ],
    )
    def test_an_option_that_would_have_no_effect_is_an_error(self, run, tmp_path, monkeypatch, arguments, left_out):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "s.yaml").write_text("{local_steps: 4}")
        status, out, err = run(PAPER, *arguments)
        assert (status, out) == (2, "")
        assert f": leave {left_out} out.\n" in err

    def test_says_by_itself_whether_overlap_pays(self, run):
        only = ["--algorithm", "halos"]
        said = "overlap=True, HALoS: 0.385 s per global step instead of 0.394 (2% less): it gains little here.\n"
        assert run(PAPER, *only)[1].endswith(f"\n\n{said}")
        assert run(PAPER, *only, "--message-bytes", "5600000000")[1].endswith("it pays here.\n")
        longer = run(PAPER, *only, "--message-bytes", "56000000000")[1].splitlines()[-1]
        assert "it pays here. Workers still wait" in longer
        assert longer.endswith("of their time: raise local_steps, too.")
        assert "overlap" not in run(PAPER, "--algorithm", "diloco")[1]

    def test_says_nothing_of_overlap_if_no_round_ends_without_it(self, run, tmp_path):
        path = tmp_path / "cluster.yaml"
        path.write_text("{bandwidths: [[0.01]], worker_speeds: [[1]], step_ms: 1000, message_bytes: 100000000}")
        status, out, err = run(str(path), "--algorithm", "halos", "--overlap", "--hours", "0.03")
        assert (status, err) == (0, "")
        assert "seconds per global step" in out
        assert "overlap=True" not in out

    def test_plans_workers_that_train_on(self, run):
        _, out, _ = run(PAPER, "--algorithm", "halos", "--overlap")
        cells = {line[:36].strip(): line[36:].split() for line in out.splitlines()}
        assert cells["seconds per global step"] == ["0.385"]
        assert cells["share of all workers' time: computing"[:36]][-1] == "100.0%"
        assert out.endswith(
            "overlap=True, HALoS: 0.385 s per global step instead of 0.394 (2% less): it gains little here.\n"
        )

    def test_takes_the_local_steps_of_the_baselines(self, run):
        _, out, _ = run(PAPER, "--algorithm", "diloco", "--baseline-local-steps", "7")
        assert next(line for line in out.splitlines() if line.startswith("local steps")).split()[-1] == "7"

    def test_takes_the_size_of_the_model(self, run):
        assert run(*SMALL, "--message-bytes", "1000000")[1].startswith("6 workers in 2 regions, 1.0 MB per model")

    def test_takes_the_formats_on_links(self, run):
        _, out, _ = run(PAPER, "--algorithm", "halos", "--message-bytes", "64000000", "--wire", "bfloat16", "int4")
        assert "64.0 MB per model on a link (with servers, 32.0 MB inside regions and 8.5 MB between regions)" in out
        _, same, _ = run(PAPER, "--algorithm", "halos", "--message-bytes", "64000000", "--wire", "int8", "int8")
        _, one, _ = run(PAPER, "--algorithm", "halos", "--message-bytes", "64000000", "--wire", "int8")
        assert same == one

    def test_takes_the_speed_of_servers(self, run):
        slow, fast = (run(*SMALL, "--algorithm", "halos", *server)[1] for server in (BUSY_SERVER, []))
        assert slow != fast

    def test_draws_another_cluster_for_another_seed(self, run):
        tables = {run(*SMALL, "--algorithm", "halos", "--seed", seed)[1] for seed in ("0", "1", "0")}
        assert len(tables) == 2

    def test_breaks_the_time_of_many_workers_down_by_region_or_not_at_all(self, run):
        few, many = ["--hours", "0.1", "--algorithm", "halos", "--random-cluster"], "The time of each"
        assert f"{many} worker" in run(*few, "4x8")[1]
        assert f"{many} region" in run(*few, "4x9")[1]
        assert many not in run(*few, "33x1")[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("output") / "new" / "plans"
    assert main(["plan", PAPER, "--hours", "0.1", "--output", str(path), "--timeline-minutes", "1"]) == 0
    return path


class TestOutput:
    def test_is_a_table_a_picture_a_json_and_timelines(self, folder):
        names = {path.name for path in folder.iterdir()}
        assert names == {"paper.txt", "paper.png", "paper.json"} | {f"paper-{name}.trace.json" for name in ALGORITHMS}
        assert (folder / "paper.png").read_bytes().startswith(b"\x89PNG")

    def test_says_what_command_made_it(self, folder, run):
        command = (folder / "paper.txt").read_text().splitlines()[0]
        assert command.startswith("$ lightning-halos plan ")
        assert command[2:] == json.loads((folder / "paper.json").read_text())["command"]
        assert (folder / "paper.txt").read_text().endswith(f"\n\n{run(PAPER, '--hours', '0.1')[1]}")

    def test_json_has_every_number(self, folder):
        plans = json.loads((folder / "paper.json").read_text())["plans"]
        assert list(plans) == list(ALGORITHMS)
        halos = plans["halos"]
        assert halos["simulated_seconds"] == 360
        assert sum(halos["share_of_worker_time"].values()) == pytest.approx(1)
        assert halos["staleness_of_pushes"]["maximum"] >= halos["staleness_of_pushes"]["p95"] > 0
        assert halos["global_updates_per_second"] == halos["global_updates"] / 360
        assert halos["bytes_between_regions"] > 0
        assert [worker["region"] for worker in halos["workers"]] == [r for r in "0123" for _ in range(4)]
        steps = sum(worker["rounds"] * worker["local_steps_per_round"] for worker in halos["workers"])
        assert halos["global_steps"] == steps / 16
        assert plans["diloco"]["staleness_of_region_updates"] is None

    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_timeline_has_a_process_per_region_and_a_lane_per_worker_and_server(self, folder, algorithm):
        events = json.loads((folder / f"paper-{algorithm}.trace.json").read_text())["traceEvents"]
        named = {(e["name"], e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"].endswith("_name")}
        processes = {pid: name for (kind, pid, _), name in named.items() if kind == "process_name"}
        lanes = {(pid, tid): name for (kind, pid, tid), name in named.items() if kind == "thread_name"}
        assert sorted(processes) == [1, 2, 3, 4]
        assert all(name.startswith(f"region {pid - 1} (") for pid, name in processes.items())
        servers = {
            "halos": ["global server", *(f"local server {index}" for index in range(4))],
            "async_local_sgd": ["global server"],
        }.get(algorithm, [])
        assert sorted(lanes.values()) == sorted([*servers, *(f"worker {rank}" for rank in range(16))])
        assert {(e["pid"], e["tid"]) for e in events if e["ph"] != "M"} == set(lanes)

    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_timeline_fills_every_workers_minute_without_overlaps(self, folder, algorithm):
        events = json.loads((folder / f"paper-{algorithm}.trace.json").read_text())["traceEvents"]
        lanes = [
            (e["pid"], e["tid"])
            for e in events
            if e["name"] == "thread_name" and e["args"]["name"].startswith("worker")
        ]
        assert len(lanes) == 16
        is_synchronous = algorithm in ("sync_sgd", "diloco", "diloco_dynamic")
        for lane in lanes:
            own = [e for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == lane]
            gaps = [after[0] - before[1] for before, after in zip(map(span, own), map(span, own[1:]), strict=False)]
            assert set(gaps) <= {0, 1}  # nanoseconds
            assert (span(own[0])[0], span(own[-1])[1]) == (0, 60_000_000_000)
            known = {"compute", "wait", "all-reduce"} if is_synchronous else {"pull", "compute", "push"}
            assert {e["name"] for e in own} <= known

    def test_timeline_of_workers_that_train_on_has_no_gaps(self, tmp_path):
        arguments = ["--algorithm", "halos", "--overlap", "--hours", "0.1", "--timeline-minutes", "1"]
        assert main(["plan", PAPER, *arguments, "--message-bytes", "30000000000", "--output", str(tmp_path)]) == 0
        events = json.loads((tmp_path / "paper-halos.trace.json").read_text())["traceEvents"]
        (lane,) = [
            (e["pid"], e["tid"]) for e in events if e["name"] == "thread_name" and e["args"]["name"] == "worker 0"
        ]
        own = [e for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == lane]
        gaps = [after[0] - before[1] for before, after in zip(map(span, own), map(span, own[1:]), strict=False)]
        assert set(gaps) <= {0, 1}  # nanoseconds
        assert [e["name"] for e in own[:5]] == ["compute", "compute", "wait", "compute", "wait"]

    def test_timeline_shows_exchanges_on_the_lanes_of_the_servers(self, folder):
        events = json.loads((folder / "paper-halos.trace.json").read_text())["traceEvents"]
        spans = [(*span(e), e["pid"], e["name"]) for e in events if e["ph"] == "X"]
        exchanges = [exchange for exchange in spans if exchange[3] == "exchange"]
        assert {pid for _, _, pid, _ in exchanges} == {1, 2, 3, 4}
        for start, end, pid, _ in exchanges:
            arrivals = [s[1] for s in spans if s[3] == "update to the global server" and s[0:3:2] == (start, pid)]
            merges = [s[1] for s in spans if s[3] == "answer" and s[0:3:2] == (*arrivals, pid)]
            assert merges == ([end] if arrivals[0] < 60_000_000_000 else [])
        instants = [e for e in events if e["ph"] == "i"]
        assert {e["name"] for e in instants} == {"push applied", "update applied", "merge"}
        assert all(e["ts"] <= 60e6 for e in instants)

    def test_without_matplotlib_says_how_to_get_it_before_anything_is_written(self, run, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert run(*SMALL)[0] == 0  # the table needs none
        status, out, err = run(*SMALL, "--output", str(tmp_path / "plans"))
        assert (status, out) == (2, "")
        assert 'matplotlib is not installed. Pictures need it: pip install "light' in err
        assert '"lightning-halos[examples]"' in err
        assert not list(tmp_path.iterdir())


class TestSweep:
    def test_prints_all_trials_and_a_choice_and_writes_them(self, run, tmp_path):
        status, out, _ = run("--random-cluster", "2x1", "--sweep", "--hours", "1", "--output", str(tmp_path))
        assert status == 0
        rows = [line for line in out.splitlines() if line[:1].isdigit() and "%" in line]
        assert len(rows) == 6 * 4  # H and K; with one worker per region, one server
        assert "Busy workers at the least staleness:\n  local_steps=" in out
        command, _, text = (tmp_path / "sweep.txt").read_text().partition("\n\n")
        assert command.startswith("$ lightning-halos plan --random-cluster 2x1 --sweep")
        assert text == out


class TestErrors:
    """One line on stderr, exit status 2."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "give either the file that describes the cluster, or --random-cluster RxW such as 4x4"),
            ([PAPER, "--random-cluster", "2x2"], "give either the file"),
            (["none.yaml"], "none.yaml does not exist. Give the YAML file that describes the cluster."),
            ([PAPER, "--settings", "none.yaml"], "none.yaml does not exist. Give the YAML file that has the settings."),
            (["--random-cluster", "2"], "--random-cluster 2 must be RxW, regions and workers per region, such as 4x4"),
            (["--random-cluster", "0x2"], "regions=0 must be a whole number of at least 1"),
            (["--random-cluster", "2x2", "--seed", "-1"], "seed=-1 must be a whole number of at least 0"),
            (["--random-cluster", "99999999x99999999"], "regions=99999999 with workers_per_region=99999999: a random"),
            (["/"], "/ is a folder. Give the YAML file that describes the cluster."),
            (
                ["--random-cluster", "2x2", "--sweep", "--hours", "0.05"],
                "hours=0.05 is too short: with local_steps=64, servers_per_region=1 and accumulate_updates=",
            ),
            ([PAPER, "--hours", "0"], "hours=0.0 must be a positive number of hours"),
            ([PAPER, "--local-steps", "0"], "local_steps=0 must be"),
            ([PAPER, "--baseline-local-steps", "0"], "baseline_local_steps=0 must be"),
            ([PAPER, "--servers-per-region", "9"], "servers_per_region=9 is more than the 4 worker(s)"),
            ([PAPER, "--message-bytes", "-3"], "message_bytes=-3 must be"),
            ([PAPER, "--wire", "int3"], "--wire='int3' must be one of 'float32', 'bfloat16', 'int8', 'int4'"),
            ([PAPER, "--wire", "int8", "int8", "int4"], "--wire int8 int8 int4 must be one format, or two"),
            ([PAPER, "--output", "x", "--timeline-minutes", "0"], "--timeline-minutes 0 must be positive"),
            ([PAPER, "--output", "x", "--timeline-minutes", "nan"], "--timeline-minutes nan must be positive"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_name_what_is_wrong(self, run, tmp_path, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        status, out, err = run(*arguments)
        assert (status, out) == (2, "")
        assert err.startswith("lightning-halos: error: ")
        assert message in err
        assert err.count("\n") == 1
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "command",
        [
            ["plan", PAPER],
            ["plan", PAPER, "--sweep"],
            ["tune", PAPER, "--module", "tests.tuning.toys:make", "--hours", "1"],
            ["evaluate", "nowhere", "--tasks", "hellaswag"],
            ["evaluate", "--compare", "nowhere", "elsewhere", "--tasks", "hellaswag"],
        ],
        ids=" ".join,
    )
    def test_of_the_folder_for_results_come_before_the_work(self, command, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file").write_text("")
        for output in ("file", "file/inside"):
            assert main([*command, "--output", output]) == 2
            err = capsys.readouterr().err
            assert f"--output {output}: " in err
            assert "file is a file. Name a folder to write to." in err

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{bandwidths: [[9]], worker_speeds: [[1]], step_ms: 5}", "message_bytes is missing"),
            ("{bandwidths: 9, worker_speeds: [[1]], step_ms: 5}", "cluster.yaml: bandwidths=9 must be a list"),
            ("{bandwidths: [[9]", "cluster.yaml is not YAML"),
        ],
    )
    def test_in_the_file_name_it(self, run, tmp_path, text, message):
        path = tmp_path / "cluster.yaml"
        path.write_text(text)
        status, _, err = run(str(path))
        assert status == 2
        assert message in err

    def test_of_arguments_show_the_usage(self, capsys):
        for arguments in ([], ["plan", PAPER, "--algorithm", "adam"], ["train"]):
            with pytest.raises(SystemExit, match="2"):
                main(arguments)
            assert "usage: lightning-halos" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_as_a_module_and_shows_an_example_in_its_help():
    command = [sys.executable, "-m", "lightning_halos.cli", "plan", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "lightning-halos plan examples/clusters/paper.yaml" in done.stdout
