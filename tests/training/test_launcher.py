"""Sizes are the launcher's: nodes may have different numbers of processes, and wrong settings are named at once."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

from lightning_halos.training.launcher import Started

CPU = torch.device("cpu")
GPUS = [torch.device("cuda", index) for index in range(4)]


@pytest.mark.parametrize(
    ("tasks", "sizes"), [("4", [4]), ("1,2", [1, 2]), ("2(x3),1", [2, 2, 2, 1]), ("1,2(x2)", [1, 2, 2])]
)
def test_slurm_says_the_number_of_tasks_on_each_node(
    monkeypatch: pytest.MonkeyPatch, tasks: str, sizes: list[int]
) -> None:
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "8(x100)")  # of the job
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)  # of this srun
    for node, here in enumerate(sizes):
        monkeypatch.setenv("SLURM_NODEID", str(node))
        started = Started.by(SLURMEnvironment())
        assert started is not None
        assert (started.nodes, started.here) == (len(sizes), here)


def test_lightning_itself_starts_processes_and_knows_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert Started.by(LightningEnvironment()) is None
    assert Started.by(TorchElasticEnvironment()) is not None


def test_each_process_has_a_device_and_all_of_a_node_may_have_its_cpu() -> None:
    started = Started(2, 4, "torchrun", "--nnodes", "--nproc-per-node")
    assert started.devices(GPUS) == GPUS
    assert started.devices([CPU]) == [CPU] * 4
    for devices in (GPUS[:1], GPUS[:3], [CPU] * 5):
        with pytest.raises(ValueError, match=rf"has {len(devices)} device\(s\) on this node") as error:
            started.devices(devices)
        assert f"--nproc-per-node {len(devices)}" in str(error.value)
        assert "devices=4" in str(error.value)


def test_the_number_of_nodes_may_be_left_out() -> None:
    started = Started(2, 4, "SLURM", "--nodes", "--ntasks-per-node")
    started.check_nodes(1)
    started.check_nodes(2)
    with pytest.raises(ValueError, match=r"num_nodes=4\), but SLURM started this job on 2 node\(s\).*--nodes 4"):
        started.check_nodes(4)
