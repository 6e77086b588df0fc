"""Starts processes, or asks the launcher that has started them: on how many machines, and how many are on this one.

Ranks and sizes are the launcher's, so machines may have different numbers of processes. Lightning's own check would
refuse that: it expects ``devices * num_nodes`` processes.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.trainer.states import TrainerFn

from lightning_halos.simulation.history import Event
from lightning_halos.training.compat import (
    MultiProcessingLauncher,
    SubprocessScriptLauncher,
    expect_files_elsewhere,
    set_num_threads_if_needed,
)
from lightning_halos.transport.address import unused_port
from lightning_halos.transport.forks import is_store_port


@dataclass(frozen=True)
class Started:
    """What a launcher such as torchrun says of the processes that it has started.

    Attributes:
        nodes: Number of nodes.
        here: Number of processes on this node.
        launcher: The launcher's name, for messages.
        nodes_option: The launcher's option for the number of nodes.
        processes_option: The launcher's option for the number of processes on a node.
    """

    nodes: int
    here: int
    launcher: str
    nodes_option: str
    processes_option: str

    @classmethod
    def by(cls, environment: ClusterEnvironment) -> Started | None:
        """Returns what the launcher says; ``None`` if it starts no processes itself, or does not say it."""
        variables = os.environ
        if isinstance(environment, TorchElasticEnvironment):
            if {"GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"} <= variables.keys():
                nodes, here = int(variables["GROUP_WORLD_SIZE"]), int(variables["LOCAL_WORLD_SIZE"])
                return cls(nodes, here, "torchrun", "--nnodes", "--nproc-per-node")
        elif isinstance(environment, SLURMEnvironment):
            tasks = variables.get("SLURM_STEP_TASKS_PER_NODE") or variables.get("SLURM_TASKS_PER_NODE")
            if tasks:
                sizes = _tasks_of_nodes(tasks)
                return cls(len(sizes), sizes[environment.node_rank()], "SLURM", "--nodes", "--ntasks-per-node")
        return None

    def check_nodes(self, num_nodes: int) -> None:
        """Checks ``Trainer(num_nodes=...)``, which may be left out.

        Raises:
            ValueError: If it is another number than the launcher's.
        """
        if num_nodes not in (1, self.nodes):
            raise ValueError(
                f"Trainer(num_nodes={num_nodes}), but {self.launcher} started this job on {self.nodes} node(s). Leave"
                f" num_nodes out, or start the job with {self.nodes_option} {num_nodes}."
            )

    def devices(self, devices: list[torch.device]) -> list[torch.device]:
        """Returns the device of each process on this node.

        Args:
            devices: The devices of the Trainer. All processes of a node can have the same CPU.

        Raises:
            ValueError: If there are more or fewer devices than processes.
        """
        if len(devices) == 1 and devices[0].type == "cpu":
            return devices * self.here
        if len(devices) != self.here:
            raise ValueError(
                f"The Trainer has {len(devices)} device(s) on this node, but {self.launcher} started {self.here}"
                " process(es) here. Each process has one device, and nodes may have different numbers of them: use"
                f' Trainer(devices="auto") and start as many processes as this node has devices'
                f" ({self.processes_option} {len(devices)}), or use devices={self.here}."
            )
        return devices


def choose_port(environment: ClusterEnvironment) -> None:
    """Chooses ``MASTER_PORT`` for processes that are about to be started here, unless it is set.

    Lightning's own choice is one that a connection may get before rank 0 listens there.
    """
    if isinstance(environment, LightningEnvironment) and not environment.creates_processes_externally:
        os.environ.setdefault("MASTER_PORT", str(unused_port()))


def _prepare(trainer: pl.Trainer | None) -> None:
    """Prepares a Trainer for a fit in a job that is one region of a run."""
    strategy: Any = None if trainer is None else trainer.strategy
    if trainer is not None and strategy.is_member and trainer.state.fn == TrainerFn.FITTING:
        expect_files_elsewhere(trainer)


class ScriptLauncher(SubprocessScriptLauncher):
    """Lightning's launcher, without its check of ``devices * num_nodes`` where the launcher's numbers count."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        choose_port(self.cluster_environment)
        _prepare(trainer)
        if Started.by(self.cluster_environment) is None:
            return super().launch(function, *args, trainer=trainer, **kwargs)
        set_num_threads_if_needed(self.num_processes)
        return function(*args, **kwargs)


class FunctionLauncher(MultiProcessingLauncher):
    """Lightning's launcher of processes that run a function of this one, with a port that stays free until then."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        strategy: Any = trainer.strategy if trainer is not None else None
        if strategy is not None:
            choose_port(strategy.cluster_environment)
        _prepare(trainer)
        with _other_port_than_this_process():
            return super().launch(function, *args, trainer=trainer, **kwargs)


@contextmanager
def _other_port_than_this_process() -> Iterator[None]:
    """Sets another ``MASTER_PORT`` for a ``with`` block, if an earlier fit in this process has the present one."""
    before = os.environ.get("MASTER_PORT", "0")
    if not is_store_port(int(before)):
        yield
        return
    os.environ["MASTER_PORT"] = str(unused_port())
    try:
        yield
    finally:
        os.environ["MASTER_PORT"] = before


class SimulationLauncher(FunctionLauncher):
    """Lightning's launcher, which also returns rank 0's history to the strategy of the calling process."""

    def get_extra_results(self, trainer: pl.Trainer) -> dict[str, Any]:
        extra: dict[str, Any] = super().get_extra_results(trainer)
        strategy: Any = trainer.strategy
        # In a file, as Lightning does with the weights: the parent reads the queue only after its children have ended,
        # and until then the queue's capacity is that of a pipe.
        path = Path(tempfile.mkdtemp()) / "history.pt"
        torch.save([vars(event) for event in strategy.history], path)
        return {**extra, "history": str(path), "virtual_seconds": strategy.virtual_seconds}

    def update_main_process_results(self, trainer: pl.Trainer, extra: dict[str, Any]) -> None:
        super().update_main_process_results(trainer, extra)
        strategy: Any = trainer.strategy
        path = Path(extra["history"])
        events = torch.load(path, weights_only=True)
        shutil.rmtree(path.parent)
        strategy.store_history([Event(**event) for event in events], extra["virtual_seconds"])


def _tasks_of_nodes(text: str) -> list[int]:
    """Returns the number of tasks on each node from SLURM's short form: ``2(x3),1`` is ``[2, 2, 2, 1]``."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in parts for _ in range(int(times or 1))]
