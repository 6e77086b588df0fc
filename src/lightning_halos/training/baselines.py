"""The algorithms that HALoS is compared with, as strategies of their own.

Rules of this room: each says only what is different from :class:`~lightning_halos.HalosStrategy`: its arguments, its
servers, and when its workers wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed import PrefixStore

from lightning_halos.checkpoint.resume import Resume
from lightning_halos.core.cursor import Lease
from lightning_halos.core.servers import OptimizerFactory
from lightning_halos.core.settings import Settings, default_one_server_optimizer
from lightning_halos.core.synchronous_node import SynchronousNode
from lightning_halos.core.topology import Topology
from lightning_halos.core.vector import ModelVector
from lightning_halos.core.worker import WorkerRound
from lightning_halos.simulation.algorithms import Algorithm, EveryStep, Lockstep
from lightning_halos.simulation.cluster import SimulatedCluster
from lightning_halos.training.compat import StrategyRegistry, is_accumulating
from lightning_halos.training.shared_data import SharedData
from lightning_halos.training.strategy import HalosStrategy, StartMethod
from lightning_halos.transport.collectives import Collectives
from lightning_halos.transport.lockstep import LockstepClient, LockstepProcess


class AsyncLocalSGDStrategy(HalosStrategy):
    """Asynchronous local SGD with one server for everybody (arXiv 2401.09135).

    As HALoS without its hierarchy: every worker exchanges with the server on rank 0, over whatever link there is. In a
    real run the server takes in one push at a time, so a worker behind a slow link holds up the others meanwhile.

    Args:
        local_steps: Local steps per round (``H``).
        dynamic_local_steps: Whether slower workers run fewer local steps per round, by their measured speed.
        optimizer: Makes the server's optimizer from its parameters. Default: :class:`DelayedNesterov` with a rate of
            0.8 / workers, momentum 0.9, and a delay of 2 per worker: the values of the HALoS paper for 16 workers.
        max_norm_ratio: As in :class:`~lightning_halos.HalosStrategy`.
        start_method: As in :class:`~lightning_halos.HalosStrategy`.
        timeout: As in :class:`~lightning_halos.HalosStrategy`.
        simulate: As in :class:`~lightning_halos.HalosStrategy`.
        **kwargs: ``grace_time`` as in :class:`~lightning_halos.HalosStrategy`; as in Lightning's strategies
            ``accelerator``, ``parallel_devices``, ``cluster_environment``, ``checkpoint_io``, ``precision_plugin``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a wrong value.
    """

    def __init__(
        self,
        local_steps: int = 32,
        dynamic_local_steps: bool = True,
        optimizer: OptimizerFactory | None = None,
        max_norm_ratio: float | None = None,
        start_method: StartMethod = "popen",
        timeout: float = 1800,
        simulate: SimulatedCluster | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            local_steps=local_steps,
            dynamic_local_steps=dynamic_local_steps,
            max_norm_ratio=max_norm_ratio,
            start_method=start_method,
            timeout=timeout,
            simulate=simulate,
            **kwargs,
        )
        self._optimizer = optimizer

    @classmethod
    def register_strategies(cls, strategy_registry: StrategyRegistry) -> None:
        """Registers ``"async_local_sgd"``."""
        strategy_registry.register("async_local_sgd", cls, description="Async-Local-SGD")

    def _arrange(self, regions: Sequence[Sequence[int]], names: Sequence[str] = ()) -> Topology:
        workers = sorted(rank for ranks in regions for rank in ranks)
        self._settings = Settings(
            self._settings.local_steps,
            self._settings.dynamic_local_steps,
            local_optimizer=self._optimizer or default_one_server_optimizer(len(workers)),
            max_norm_ratio=self._settings.max_norm_ratio,
        )
        return Topology.build([workers], servers_per_region=1)


class DilocoStrategy(HalosStrategy):
    """DiLoCo (arXiv 2311.08105): synchronous rounds of local steps, and an outer optimizer on their mean.

    All workers wait for the slowest of them, and for an all-reduce of the model over the slowest link.

    Args:
        local_steps: Local steps per round (``H``).
        dynamic_local_steps: Whether slower workers run fewer local steps per round, by their measured speed.
        outer_optimizer: Makes the outer optimizer from its parameters. Default: SGD with a rate of 0.7 and Nesterov
            momentum of 0.9.
        start_method: As in :class:`~lightning_halos.HalosStrategy`.
        timeout: Seconds that workers may wait for each other. That includes the round of the slowest, and rank 0's
            validation.
        simulate: As in :class:`~lightning_halos.HalosStrategy`.
        **kwargs: ``grace_time`` as in :class:`~lightning_halos.HalosStrategy`; as in Lightning's strategies
            ``accelerator``, ``parallel_devices``, ``cluster_environment``, ``checkpoint_io``, ``precision_plugin``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a wrong value.
    """

    def __init__(
        self,
        local_steps: int = 32,
        dynamic_local_steps: bool = False,
        outer_optimizer: OptimizerFactory | None = None,
        start_method: StartMethod = "popen",
        timeout: float = 1800,
        simulate: SimulatedCluster | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            local_steps=local_steps,
            dynamic_local_steps=dynamic_local_steps,
            global_optimizer=outer_optimizer,
            start_method=start_method,
            timeout=timeout,
            simulate=simulate,
            **kwargs,
        )

    _has_servers = False  # but a replica of one in every worker

    @classmethod
    def register_strategies(cls, strategy_registry: StrategyRegistry) -> None:
        """Registers ``"diloco"``."""
        strategy_registry.register("diloco", cls, description="DiLoCo")

    def _arrange(self, regions: Sequence[Sequence[int]], names: Sequence[str] = ()) -> Topology:
        return Topology.build(regions, 1, names)

    def _start_process(
        self,
        trainer: pl.Trainer,
        vector: ModelVector,
        memory: Tensor | None,
        data: SharedData | None,
        resume: Resume | None,
    ) -> tuple[WorkerRound, Iterator[Lease]]:
        assert memory is not None
        assert self._store is not None
        budget = self._budget(trainer, resume)
        planner = self._settings.planner(self.world_size, budget.max_steps)
        assert self._collectives is not None
        fit = self._collectives.count(f"fits/{self.global_rank}", 1, self._timeout)
        store = PrefixStore(f"lockstep/{fit}", self._store)
        everybody = [range(self.world_size)]  # rounds are all-reduces among all workers
        collectives = Collectives.connect(
            everybody, self.global_rank, store, self._check_interrupted, self._topology.describe, self._timeout
        )
        node = SynchronousNode(self._settings.outer_server(memory.clone(), vector.shapes), planner, budget)
        client = LockstepClient(self.global_rank, collectives, node, planner, self._timeout)
        self._process = LockstepProcess(self._here, client, has_global_model=self.is_global_zero)
        leases = iter(()) if data is None else client.leases(data.steps_per_epoch, data.first, data.end)
        local_steps = planner.local_steps(self.global_rank, budget.total)
        return WorkerRound(self.global_rank, local_steps, trainer.global_step), leases

    def _algorithm(self) -> Algorithm:
        return Lockstep(self._settings)


class SyncSGDStrategy(HalosStrategy):
    """Fully synchronous SGD in a simulated cluster: gradients are averaged in every step, as by Lightning's ``"ddp"``.

    For real processes there is Lightning's own ``strategy="ddp"``.

    Args:
        simulate: The cluster.
        start_method: As in :class:`~lightning_halos.HalosStrategy`.
        timeout: As in :class:`~lightning_halos.HalosStrategy`.
        **kwargs: ``grace_time`` as in :class:`~lightning_halos.HalosStrategy`; as in Lightning's strategies
            ``accelerator``, ``parallel_devices``, ``cluster_environment``, ``checkpoint_io``, ``precision_plugin``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a wrong value, or there is no cluster to simulate.
    """

    _exchanges_models = False
    _shares_data = False  # as with DDP, every worker has a shard

    def __init__(
        self,
        simulate: SimulatedCluster | str | None = None,
        start_method: StartMethod = "popen",
        timeout: float = 1800,
        **kwargs: Any,
    ) -> None:
        if simulate is None:
            raise ValueError(
                "simulate=None: 'sync_sgd' is for simulations. Pass SyncSGDStrategy(simulate=cluster), or train for"
                " real with Lightning's strategy='ddp'."
            )
        super().__init__(
            local_steps=1,
            dynamic_local_steps=False,
            start_method=start_method,
            timeout=timeout,
            simulate=simulate,
            **kwargs,
        )

    @classmethod
    def register_strategies(cls, strategy_registry: StrategyRegistry) -> None:
        """Registers ``"sync_sgd"``."""
        strategy_registry.register("sync_sgd", cls, description="Synchronous SGD in a simulated cluster")

    def post_backward(self, closure_loss: Tensor) -> None:
        """Averages the gradients over all workers, before they are clipped and used."""
        super().post_backward(closure_loss)
        assert self.lightning_module is not None
        if not self._training or is_accumulating(self.lightning_module.trainer):
            return
        assert self._collectives is not None
        gradients = [p.grad for p in self.lightning_module.parameters() if p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        mean = self._collectives.sum_(flat) / self.world_size
        for gradient, part in zip(gradients, torch.split(mean, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _read_global_model(self) -> Tensor:
        """Returns the worker's model, which is the global one: no server has any."""
        assert self._loop is not None
        return self._loop.vector.read(self._loop.vector.new())

    def on_train_end(self) -> None:
        super().on_train_end()
        self._synchronize_module()

    def _algorithm(self) -> Algorithm:
        return EveryStep()
