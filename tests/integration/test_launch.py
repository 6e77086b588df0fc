"""All ways to start workers, and to end them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from lightning_halos import HalosStrategy
from tests.integration import script, unequal
from tests.integration.conftest import Run
from tests.integration.harness import Result, ending, free_port, lightning_environments, load_results, torchrun
from tests.integration.script import WORKERS, Script
from tests.integration.toys import (
    LOCAL_STEPS,
    Toy,
    assert_same_model,
    assert_trained,
    loader,
    make_trainer,
    outcome,
    state,
)
from tests.integration.unequal import PROCESSES, assert_unequal

TIMEOUT = 240
SCRIPT = ["-m", "tests.integration.script"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WORKERS}"]


def start(*arguments: Any, folder: Path) -> subprocess.Popen[bytes]:
    """Starts Python in a process group of its own."""
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=Path(__file__).parents[2],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "start_method"),
    [([], "popen"), ([], "spawn"), (TORCHRUN, "popen")],
    ids=["popen", "spawn", "torchrun"],
)
def test_script(tmp_path: Path, launcher: list[str], start_method: str) -> None:
    with ending(start(*launcher, *SCRIPT, tmp_path, start_method, 20, folder=tmp_path)) as process:
        assert process.wait(TIMEOUT) == 0, (tmp_path / "log").read_text()[-4000:]
    assert_trained(load_results(tmp_path, WORKERS), max_steps=20)


def spawning(folder: str) -> Result:
    script.main(folder, "spawn", "20")
    return {}


def test_launching_by_spawn(run: Run, tmp_path: Path) -> None:
    """As :func:`test_script`, but the process that spawns the others need not start first."""
    (tmp_path / "workers").mkdir()
    run(spawning, str(tmp_path / "workers"), environments=[{}], timeout=TIMEOUT)
    assert_trained(load_results(tmp_path / "workers", WORKERS), max_steps=20)


@pytest.mark.slow
def test_sigterm_to_one_process_ends_all(tmp_path: Path) -> None:
    with ending(start(*SCRIPT, tmp_path, "popen", 100_000, folder=tmp_path)) as process:
        files = [tmp_path / f"pid{rank}" for rank in range(WORKERS)]
        wait_until(lambda: all(path.exists() and path.read_text() for path in files))
        processes = [int(path.read_text()) for path in files]
        os.kill(processes[1], signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
        wait_until(lambda: not any(map(is_running, processes)), limit=10)


def wait_until(condition: Callable[[], bool], limit: float = TIMEOUT) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def forking(folder: Path, strategy: str, has_trained: bool) -> Result:
    if has_trained:
        make_trainer("halos", devices=1, max_steps=4).fit(Toy(), loader())
    module = Script(folder)
    trainer = make_trainer(strategy, max_steps=20)
    assert trainer.strategy.launcher is not None
    trainer.fit(module, loader())
    return {
        "state": state(module),
        "interactive": trainer.strategy.launcher.is_interactive_compatible,
        "start_method": trainer.strategy.launcher._start_method,
        "port": int(os.environ["MASTER_PORT"]),
    }


@pytest.mark.parametrize(
    ("strategy", "has_trained"),
    [("halos_fork", False), ("halos_notebook", True)],
    ids=["at once", "after a fit in the same process"],
)
def test_launching_by_fork(run: Run, tmp_path: Path, strategy: str, has_trained: bool) -> None:
    (tmp_path / "workers").mkdir()
    (main,) = run(forking, tmp_path / "workers", strategy, has_trained, environments=[{}])
    results = load_results(tmp_path / "workers", 4)
    assert_trained(results, max_steps=20)
    assert_same_model([main, *results])
    assert main["interactive"]
    assert main["start_method"] == "fork"
    assert 20_000 <= main["port"] < 29_500  # a connection may get one above them before rank 0 listens there


def a_node(port: int, folder: str) -> Result:
    options = f"--nnodes=2 --node-rank={os.environ['NODE_RANK']} --nproc-per-node={os.environ['PROCESSES']}"
    return torchrun(*options.split(), "--master-addr=127.0.0.1", f"--master-port={port}", unequal.__file__, folder)


def test_torchrun_with_nodes_of_unequal_size(run: Run, tmp_path: Path) -> None:
    (tmp_path / "workers").mkdir()
    nodes = [{"NODE_RANK": str(node), "PROCESSES": str(count)} for node, count in enumerate(PROCESSES)]
    run(a_node, free_port(), str(tmp_path / "workers"), environments=nodes, timeout=TIMEOUT)
    assert_unequal(load_results(tmp_path / "workers", sum(PROCESSES)), "TorchElasticEnvironment")


def test_slurm_with_nodes_of_unequal_size(run: Run) -> None:
    shared = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "3",
        "SLURM_NTASKS_PER_NODE": "2",  # at most, since the number of tasks is given
        "SLURM_NNODES": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1,2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    places = [(0, 0), (1, 0), (1, 1)]
    tasks = [
        {**shared, "SLURM_PROCID": str(task), "SLURM_NODEID": str(node), "SLURM_LOCALID": str(place)}
        for task, (node, place) in enumerate(places)
    ]
    assert_unequal(run(unequal.unequal, environments=tasks), "SLURMEnvironment")


def refused(devices: int) -> Result:
    with pytest.raises(ValueError, match="num_nodes \\* devices") as error:
        make_trainer(devices=devices, num_nodes=2, max_steps=20).fit(Toy(), loader())
    return {"error": str(error.value)}


def unequal_without_launcher() -> Result:
    return refused(devices=1 + int(os.environ["NODE_RANK"]))


def test_nodes_of_unequal_size_need_a_launcher_that_knows_all(run: Run) -> None:
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_RANK": "0"}
    environments = [{**shared, "NODE_RANK": str(node)} for node in range(2)]
    errors = [result["error"] for result in run(unequal_without_launcher, environments=environments)]
    assert errors[0].startswith("Rank 0 is one of 2 process(es), but another process is one of 4.")
    assert errors[1].startswith("Rank 2 is one of 4 process(es), but another process is one of 2.")
    assert all("torchrun, with an --nproc-per-node of its own on each machine" in error for error in errors)


def in_named_regions() -> Result:
    module, trainer = Toy(), make_trainer(HalosStrategy(local_steps=LOCAL_STEPS), max_steps=20)
    trainer.fit(module, loader())
    topology = trainer.strategy.topology
    ranks = [list(group.ranks) for group in topology.groups]
    return outcome(trainer, module, names=list(topology.names), ranks=ranks)


def test_regions_from_the_environment(run: Run) -> None:
    regions = ["eu", "us", "eu", "us"]
    environments = [
        {**environment, "HALOS_REGION": region}
        for environment, region in zip(lightning_environments(4), regions, strict=True)
    ]
    results = run(in_named_regions, environments=environments)
    assert_trained(results, max_steps=20)
    for result in results:
        assert (result["names"], result["ranks"]) == (["eu", "us"], [[0, 2], [1, 3]])


class Fitting(Toy):
    def train_dataloader(self) -> DataLoader[Any]:
        return loader()


def from_command_line(config: dict[str, Any]) -> Result:
    Path(f"{os.environ['LOCAL_RANK']}.yaml").write_text(yaml.dump(config))
    arguments = ["fit", "--config", f"{os.environ['LOCAL_RANK']}.yaml"]
    cli = LightningCLI(Fitting, args=arguments, save_config_callback=None)
    strategy = cli.trainer.strategy
    assert isinstance(strategy, HalosStrategy)
    return outcome(cli.trainer, cli.model, regions=len(strategy.topology.names), method=strategy._start_method)


@pytest.mark.parametrize(
    ("strategy", "regions"),
    [
        ("halos", 1),
        pytest.param(
            {"class_path": "lightning_halos.HalosStrategy", "init_args": {"regions": 2, "local_steps": 4}},
            2,
            marks=pytest.mark.slow,
        ),
        (
            {
                "class_path": "lightning_halos.HalosStrategy",
                "init_args": {
                    "regions": [[0, 2], [1, 3]],
                    "local_optimizer": {
                        "class_path": "lightning_halos.DelayedNesterov",
                        "init_args": {"lr": 0.5, "momentum": 0.9, "delay": 4},
                    },
                },
            },
            2,
        ),
    ],
    ids=["name", "class", "server optimizer"],
)
def test_lightning_cli(run: Run, strategy: Any, regions: int) -> None:
    trainer = {"accelerator": "cpu", "devices": 4, "max_steps": 20, "strategy": strategy}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    results = run(from_command_line, {"trainer": {**trainer, **quiet}})
    assert_trained(results, max_steps=20)
    assert all(result["regions"] == regions for result in results)


@pytest.mark.parametrize(
    "inner",
    [
        pytest.param("ddp", marks=pytest.mark.slow),
        {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"process_group_backend": "gloo"}},
    ],
)
def test_lightning_cli_with_workers_of_two_processes(run: Run, inner: Any) -> None:
    strategy = {"class_path": "lightning_halos.HalosStrategy", "init_args": {"regions": 2, "worker": 2, "inner": inner}}
    trainer = {"accelerator": "cpu", "devices": 4, "max_steps": 20, "strategy": strategy}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    results = run(from_command_line, {"trainer": {**trainer, **quiet}})
    assert_same_model(results)
    assert all(result["regions"] == 2 and result["global_step"] == 20 for result in results)
    workers = [results[:2], results[2:]]
    assert sum(first["optimizer_steps"] for first, _ in workers) >= 2 * 20
    for first, second in workers:
        assert first["optimizer_steps"] == second["optimizer_steps"]
        assert not set(first["trained_on"][:16]) & set(second["trained_on"][:16]), "each process has its own samples"
