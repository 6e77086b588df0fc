"""``strategy="halos"``: the Lightning strategy.

Rules of this room: it connects Lightning with the rest. It launches, groups, starts and ends; what a worker does in the
training loop is in ``worker_loop``, what travels and who answers in ``transport``, the algorithm in ``core``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.trainer.states import RunningStage, TrainerFn, TrainerStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.distributed import PrefixStore, Store
from torch.utils.data import DataLoader

from lightning_halos.checkpoint.errors import CheckpointError
from lightning_halos.checkpoint.files import AtomicCheckpointIO, is_local
from lightning_halos.checkpoint.resume import Resume, available
from lightning_halos.core.algorithms import Algorithm, ServerAlgorithm, SynchronousAlgorithm
from lightning_halos.core.checks import check_seconds
from lightning_halos.core.cursor import DataCursor, Lease, Spans
from lightning_halos.core.schedule import StepBudget
from lightning_halos.core.synchronous_node import SynchronousNode
from lightning_halos.core.topology import REGION_VARIABLE, Topology, assign_regions, check_regions, regions_by_name
from lightning_halos.core.vector import ModelVector
from lightning_halos.core.worker import WorkerRound
from lightning_halos.simulation.algorithms import simulated
from lightning_halos.simulation.cluster import SimulatedCluster
from lightning_halos.simulation.history import Event
from lightning_halos.simulation.process import SimulatedProcess
from lightning_halos.simulation.timing import Timing
from lightning_halos.simulation.world import World
from lightning_halos.training.compat import (
    MultiProcessingLauncher,
    SubprocessScriptLauncher,
    find_trainer,
    is_accumulating,
    optimizers_to_device,
    seed_dataloader_workers,
    show_metrics,
    synchronizes_batch_norm,
)
from lightning_halos.training.launcher import SimulationLauncher
from lightning_halos.training.preemption import OutlivingSigterm, Preemption, let_data_workers_end
from lightning_halos.training.shards import Shards, rebuild
from lightning_halos.training.shared_data import LightningRank, SharedData
from lightning_halos.training.trainer_adapter import TrainerAdapter, callbacks_of, decides, unfreezes
from lightning_halos.training.worker_loop import WorkerLoop
from lightning_halos.training.worker_state import set_random_state
from lightning_halos.transport.alarm import EXIT_CODE
from lightning_halos.transport.collectives import Collectives, is_broadcastable
from lightning_halos.transport.groups import Groups, gather_through, noting_sockets, open_store
from lightning_halos.transport.link import AT_THE_EDGES
from lightning_halos.transport.lockstep import LockstepClient, LockstepProcess
from lightning_halos.transport.process import Process

AnyProcess = Process | SimulatedProcess | LockstepProcess
StartMethod = Literal["popen", "spawn", "fork"]

_GOODBYE = 2.0  # seconds to wait for the peers' goodbyes after an exception


class AlgorithmStrategy(ParallelStrategy):
    """Trains any LightningModule with an algorithm in which workers run local steps and exchange models.

    One process per device is a worker. :class:`~lightning_halos.HalosStrategy` and the other strategies are this one
    with an algorithm of their own.

    Args:
        algorithm: The algorithm.
        regions: Number of regions (consecutive ranks), or the ranks of each, such as ``[[0, 1], [2, 3]]``. Default: the
            environment variable ``HALOS_REGION`` of each process, else one region per node.
        start_method: ``"popen"``, ``"spawn"`` or ``"fork"``, as in Lightning's ``DDPStrategy``.
        timeout: As in :class:`~lightning_halos.HalosStrategy`.
        grace_time: As in :class:`~lightning_halos.HalosStrategy`.
        simulate: As in :class:`~lightning_halos.HalosStrategy`.
        accelerator: As in Lightning's strategies.
        parallel_devices: As in Lightning's strategies.
        cluster_environment: As in Lightning's strategies.
        checkpoint_io: As in Lightning's strategies.
        precision_plugin: As in Lightning's strategies.

    Attributes:
        algorithm: The algorithm.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a wrong value; when the Trainer is made, if the regions do not fit its workers.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        regions: int | list[list[int]] | None = None,
        start_method: StartMethod = "popen",
        timeout: float = 1800,
        grace_time: float = 20,
        simulate: SimulatedCluster | str | None = None,
        accelerator: pl.accelerators.Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            accelerator,
            parallel_devices,
            cluster_environment,
            AtomicCheckpointIO() if checkpoint_io is None else checkpoint_io,
            precision_plugin,
        )
        check_regions(regions)
        check_seconds("timeout", timeout)
        check_seconds("grace_time", grace_time)
        if start_method not in get_args(StartMethod):
            raise ValueError(f"start_method={start_method!r} must be one of {get_args(StartMethod)}.")
        if isinstance(simulate, str):
            simulate = SimulatedCluster.from_yaml(simulate)
        if simulate is not None and not isinstance(simulate, SimulatedCluster):
            raise TypeError(
                f"simulate=<{type(simulate).__name__}> must be a SimulatedCluster, or the path of its file, such as"
                " 'examples/clusters/paper.yaml'."
            )
        if simulate is not None and regions is not None:
            raise ValueError(f"regions={regions!r} must be None with simulate=...: the cluster says which there are.")
        self.algorithm = algorithm
        self._cluster = simulate
        self._regions = regions
        self._start_method = start_method
        self._timeout = float(timeout)
        self._grace_time = float(grace_time)
        self._num_nodes = 1
        self._store: Store | None = None
        self._collectives: Collectives | None = None
        self._made_default_group = False
        self._training = False
        self._loop: WorkerLoop | None = None
        self._process: AnyProcess | None = None
        self._preemption: Preemption | None = None
        self._history: list[Event] = []
        self._virtual_seconds = 0.0
        self._lightning: TrainerAdapter | None = None
        self._data: SharedData | None = None
        self._limit_val_batches: int | float | None = None
        self._worker_model: Tensor | None = None
        self._shards = Shards(self)

    # ------------------------------------------------------------------ who and where

    @property
    def is_distributed(self) -> bool:
        """Whether samplers are to be distributed among the workers."""
        return True

    @property
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_nodes(self) -> int:
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    @property
    def num_processes(self) -> int:
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        if self._is_rank_zero_alone:
            return {"num_replicas": 1, "rank": 0}
        return {"num_replicas": self.num_nodes * self.num_processes, "rank": LightningRank(self.global_rank)}

    @property
    def topology(self) -> Topology:
        """Which worker is in which region. Known once an entry point of the Trainer has started its processes."""
        return self._topology

    @property
    def servers(self) -> AnyProcess | None:
        """What knows the global model and the servers' counters; only on rank 0 and while it fits."""
        return self._process if self._process is not None and self._process.has_global_model else None

    @property
    def history(self) -> list[Event]:
        """Of a simulation, all events of the last fit so far, by virtual time; only on rank 0, and after the fit."""
        return self._world.seen() if self._world is not None else self._history

    @property
    def virtual_seconds(self) -> float:
        """Of a simulation, the virtual time at which rank 0's present round ends; after the fit, at which it ended."""
        return self._world.virtual_ms / 1e3 if self._world is not None else self._virtual_seconds

    @property
    def _world(self) -> World | None:
        return self._process.world if isinstance(self._process, SimulatedProcess) else None

    def _recall(self, history: list[Event], virtual_seconds: float) -> None:
        self._history, self._virtual_seconds = history, virtual_seconds

    @property
    def round(self) -> WorkerRound | None:
        """This worker's round; only while it fits."""
        return self._loop.round if self._loop is not None else None

    # ------------------------------------------------------------------ setup

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if self._cluster is not None:
            self._configure_simulation(self._cluster)
            return
        regions = assign_regions(self._regions, self.num_nodes * self.num_processes, self.num_nodes)
        if regions is not None:
            self._topology = self.algorithm.arrange(regions)
        if self._start_method == "popen":
            self._launcher = SubprocessScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = MultiProcessingLauncher(self, start_method=self._start_method)

    def _configure_simulation(self, cluster: SimulatedCluster) -> None:
        assert self.cluster_environment is not None
        assert self.parallel_devices is not None
        if self.num_nodes > 1 or self.cluster_environment.creates_processes_externally:
            raise ValueError(
                "simulate=... starts a process for each worker of the cluster by itself, on one machine: use"
                " Trainer(num_nodes=1), without torchrun or SLURM."
            )
        devices = self.parallel_devices
        self.parallel_devices = [devices[rank % len(devices)] for rank in range(cluster.num_workers)]
        self._topology = self.algorithm.arrange(cluster.regions, cluster.names, cluster.global_region)
        self._launcher = SimulationLauncher(self, "fork" if self._start_method == "popen" else self._start_method)

    def set_world_ranks(self) -> None:
        """Tells the cluster environment this process's rank, as Lightning's ``DDPStrategy`` does."""
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    def setup_environment(self) -> None:
        super().setup_environment()
        reset_seed()
        self.set_world_ranks()
        if dist.is_initialized():
            raise RuntimeError(
                "torch.distributed has a default process group, and with one Lightning makes all workers wait for each"
                " other in every batch. Call torch.distributed.destroy_process_group() before the Trainer runs."
            )
        if self._store is not None:
            return
        assert self.cluster_environment is not None
        environment, rank, size = self.cluster_environment, self.global_rank, self.world_size
        self._store = open_store(environment.main_address, environment.main_port, rank, size, self._timeout)
        if self._cluster is None and self._regions is None:
            mine = os.environ.get(REGION_VARIABLE, "")
            names = gather_through(
                self._store, REGION_VARIABLE, rank, size, mine, self._check_interrupted, self._timeout
            )
            if any(names):
                regions, region_names = regions_by_name(names)
                self._topology = self.algorithm.arrange(regions, region_names)
        # All processes of a simulation are on one machine.
        on_one_machine = Topology.build([range(size)], servers_per_region=1)
        places = self._topology if self._cluster is None else on_one_machine
        # Rank 0 may validate the final model while the others wait for it.
        patience = max(self._timeout, AT_THE_EDGES)
        self._collectives = Collectives.connect(
            places.regions,
            rank,
            PrefixStore("collectives", self._store),
            self._check_interrupted,
            self._describe,
            patience,
        )
        self._groups = Groups(self._store, places, rank, self._timeout)

    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        assert self.model is not None
        assert self._store is not None
        self.accelerator.setup(trainer)
        if synchronizes_batch_norm(self):
            rank_zero_warn(
                "sync_batchnorm=True has no effect with the halos strategy: the statistics of BatchNorm are averaged"
                " with the model."
            )
        self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        else:
            self._synchronize_module()
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            optimizers_to_device(self.optimizers, self.root_device)
            if not self.is_global_zero and self._limit_val_batches is None:
                self._limit_val_batches, trainer.limit_val_batches = trainer.limit_val_batches, 0
        elif self.world_size > 1:
            # All workers are in step here: torchmetrics and users' own collectives may have a default group.
            self._make_default_group()

    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    def _synchronize_module(self) -> None:
        assert self._collectives is not None
        assert self.lightning_module is not None
        self._collectives.broadcast_([*self.lightning_module.parameters(), *self.lightning_module.buffers()])

    def _make_default_group(self) -> None:
        assert self._store is not None
        assert self._collectives is not None
        number = self._collectives.count(f"default/{self.global_rank}", 1, self._timeout)
        with noting_sockets():
            dist.init_process_group(
                "gloo",
                store=PrefixStore(f"default/{number}", self._store),
                rank=self.global_rank,
                world_size=self.world_size,
                timeout=timedelta(seconds=max(self._timeout, AT_THE_EDGES)),
            )
        self._made_default_group = True

    # ------------------------------------------------------------------ training

    def process_dataloader(self, dataloader: object) -> object:
        """Lets DataLoader workers outlive SIGTERM, as the process that they work for does."""
        if isinstance(dataloader, DataLoader) and not isinstance(dataloader.worker_init_fn, OutlivingSigterm):
            seed_dataloader_workers(dataloader, self.global_rank)  # which Lightning does next, where there is none yet
            dataloader.worker_init_fn = OutlivingSigterm(self._grace_time, dataloader.worker_init_fn)
        return dataloader

    def on_train_start(self) -> None:
        assert self.lightning_module is not None
        assert self._collectives is not None
        trainer = self.lightning_module.trainer
        self._synchronize_module()
        vector = ModelVector(self.lightning_module, all_parameters=unfreezes(callbacks_of(trainer)))
        resume = self._shards.start_fit()
        if resume is not None and resume.manifest.model != vector.identity:
            raise CheckpointError(
                f"The checkpoint is of another model: {resume.manifest.model} travelled of it, and of this one"
                f" {vector.identity}. Train the same module with the same parameters frozen, or remove the folder of"
                " its shards to go on from its .ckpt file alone."
            )
        elements = self._collectives.gather_texts(str(vector.num_elements))
        if others := [rank for rank, count in enumerate(elements) if count != elements[self.global_rank]]:
            raise RuntimeError(
                f"The module of {self._here} has {vector.num_elements} elements that travel, that of"
                f" {self._describe(others[0])} has {elements[others[0]]}. All workers must train the same module with"
                " the same parameters frozen."
            )
        stepping_batches = trainer.estimated_stepping_batches
        limit = int(stepping_batches) if stepping_batches != float("inf") else None
        memory = vector.read(vector.new()) if not self.algorithm.averages_gradients else None
        data = self._data = SharedData.find(trainer) if self.algorithm.shares_data else None
        start = self._start_simulation
        if self._cluster is None:
            start = self._start_servers if isinstance(self.algorithm, ServerAlgorithm) else self._start_lockstep
        worker_round, leases = start(trainer, vector, memory, data, resume)
        assert self._process is not None
        client, alarm = self._process.client, self._process.alarm
        saves = self._shards.saves if self.is_global_zero else None
        self._preemption = Preemption(trainer, alarm, self._grace_time, saves)
        clock = (lambda: self.virtual_seconds) if self._world is not None else None
        state = {} if resume is None else resume.worker
        end = self._end(trainer, data, resume)
        self._lightning = TrainerAdapter(trainer, limit, end, None if data is None else data.batches)
        if self.is_global_zero and self._keeps_servers:
            self._shards.link_when_complete(trainer.checkpoint_callbacks)
        self._loop = WorkerLoop(
            self._lightning,
            vector,
            memory if state.get("memory") is None else state["memory"],
            worker_round,
            client,
            alarm,
            data,
            clock,
            self._shards.write_own,
            state,
            [] if resume is None else resume.manifest.plateaus,
            self._preemption,
            repeats=self._cluster is not None,
        )
        if resume is not None:
            show_metrics(trainer, resume.manifest.metrics)
        self._lightning.install(self._loop)
        self._collectives.barrier()
        self._training = True
        self._loop.take_up()
        # To begin an epoch's data draws a random number: after this state, if it was kept at the end of one.
        if state.get("ends_epoch"):
            set_random_state(state["random"])
        if data is not None:
            data.start(self._loop.stopwatch.excluding(leases))
        if "random" in state and not state.get("ends_epoch"):
            set_random_state(state["random"])
        self._loop.stopwatch.restart()

    def _start_servers(
        self,
        trainer: pl.Trainer,
        vector: ModelVector,
        memory: Tensor | None,
        data: SharedData | None,
        resume: Resume | None,
    ) -> tuple[WorkerRound, Iterator[Lease]]:
        """Starts this process's servers and links. Returns the worker's first round and its data."""
        assert memory is not None
        assert isinstance(self.algorithm, ServerAlgorithm)
        budget = self._budget(trainer, resume)
        done = self._done(data, resume)
        if resume is not None:
            if not resume.fits and self.is_global_zero:
                rebuild(resume, memory, vector.shapes, self.algorithm, len(self._topology.groups), budget.total)
            self._share_model(memory, resume)
            vector.write(memory)
            if not vector.lossless:
                vector.read(memory)
        self._process = process = Process(
            self.global_rank,
            self._topology,
            self._groups,
            self.algorithm,
            memory,
            vector.shapes,
            budget,
            None if data is None else DataCursor(data.steps_per_epoch, data.epochs, Spans(done)),
            self._timeout,
            self._check_interrupted,
            self._shards.saves,
            done,
            resume,
        )
        planner = self.algorithm.planner(self.world_size, budget.max_steps)
        local_steps = planner.local_steps(self.global_rank, budget.total)
        position = trainer.global_step if resume is None else budget.position
        return WorkerRound(self.global_rank, local_steps, position), process.client.leases()

    def _start_lockstep(
        self,
        trainer: pl.Trainer,
        vector: ModelVector,
        memory: Tensor | None,
        data: SharedData | None,
        resume: Resume | None,
    ) -> tuple[WorkerRound, Iterator[Lease]]:
        """Connects all workers for synchronous rounds. Returns the worker's first round and its data."""
        assert memory is not None
        assert self._store is not None
        assert isinstance(self.algorithm, SynchronousAlgorithm)
        budget = self._budget(trainer, resume)
        planner = self.algorithm.planner(self.world_size, budget.max_steps)
        assert self._collectives is not None
        fit = self._collectives.count(f"fits/{self.global_rank}", 1, self._timeout)
        store = PrefixStore(f"lockstep/{fit}", self._store)
        everybody = [range(self.world_size)]  # rounds are all-reduces among all workers
        collectives = Collectives.connect(
            everybody, self.global_rank, store, self._check_interrupted, self._topology.describe, self._timeout
        )
        node = SynchronousNode(self.algorithm.server(memory.clone(), vector.shapes), planner, budget)
        client = LockstepClient(self.global_rank, collectives, node, planner, self._timeout)
        self._process = LockstepProcess(self._here, client, has_global_model=self.is_global_zero)
        leases = iter(()) if data is None else client.leases(data.steps_per_epoch, data.first, data.end)
        local_steps = planner.local_steps(self.global_rank, budget.total)
        return WorkerRound(self.global_rank, local_steps, trainer.global_step), leases

    def _share_model(self, memory: Tensor, resume: Resume) -> None:
        """Gives the workers the model that they go on from: that of their server, or the global one if that is new."""
        assert self._collectives is not None
        if resume.server is not None:
            memory.copy_(resume.server["server"]["model"])
        if not resume.fits:
            self._collectives.broadcast_([memory])
        elif self._groups.region is not None:
            assert self._store is not None
            group = self._topology.group_of(self.global_rank)
            Collectives(
                [range(len(group.ranks))],
                group.ranks.index(self.global_rank),
                self._groups.region,
                None,
                PrefixStore(f"calls/server/{group.index}", self._store),
                self._check_interrupted,
                lambda rank: self._describe(group.ranks[rank]),
            ).broadcast_([memory])

    def _done(self, data: SharedData | None, resume: Resume | None) -> Spans:
        """The data that was trained on before."""
        if data is None:
            return Spans()
        if resume is not None and resume.manifest.data == data.identity:
            return Spans(resume.manifest.done)
        if resume is not None and resume.manifest.data is not None:
            rank_zero_warn(
                f"The checkpoint was saved with other training data ({resume.manifest.data}, now {data.identity}):"
                " which samples of this epoch were used is not known."
            )
        return Spans([(0, data.first)] if data.first else [])

    def _start_simulation(
        self,
        trainer: pl.Trainer,
        vector: ModelVector,
        memory: Tensor | None,
        data: SharedData | None,
        resume: Resume | None,
    ) -> tuple[WorkerRound, Iterator[Lease]]:
        """Starts the world on rank 0, and a link to it. Returns the worker's first round and its data."""
        cluster = self._cluster
        assert cluster is not None
        budget = self._budget(trainer, resume)
        running, offset, used = None, 0 if data is None else data.first - budget.total, 0
        if resume is not None:
            world = resume.manifest.world
            assert world is not None
            running = world["rounds"]
            if data is not None and resume.manifest.data == data.identity:
                offset = world["offset"]
            if running is not None:
                budget.total = world["base"]
                used = resume.worker.get("used", self._planned(running))
            if "model" in resume.worker:
                vector.write(resume.worker["model"])
        self._process = process = SimulatedProcess(
            self.global_rank,
            self._topology.describe,
            self._groups,
            simulated(self.algorithm, self._topology),
            Timing(cluster, cluster.message_bytes or vector.num_elements * vector.dtype.itemsize),
            memory,
            vector.shapes,
            budget,
            math.inf if data is None else data.end - budget.total - offset,
            self._timeout,
            self._check_interrupted,
            self._shards.saves,
            offset,
            running,
            None if resume is None else resume.globals,
        )
        leases = iter(()) if data is None else process.leases(data.steps_per_epoch, used)
        return process.first_round(), leases

    @property
    def _algorithm_name(self) -> str:
        return f"{self.algorithm.title}{'' if self._cluster is None else ' in a simulated cluster'}"

    def _budget(self, trainer: pl.Trainer, resume: Resume | None) -> StepBudget:
        max_steps = trainer.max_steps if trainer.max_steps != -1 else None
        total = trainer.global_step * self.world_size
        if resume is not None:
            # With other workers the global step stays, since schedules follow it.
            was = resume.manifest
            step = was.total // was.workers
            total = was.total if was.workers == self.world_size else step * self.world_size
        return StepBudget(self.world_size, max_steps, total)

    def _end(self, trainer: pl.Trainer, data: SharedData | None, resume: Resume | None) -> float:
        """Global steps at which the run ends by itself; infinite if only somebody can end it."""
        ends = [math.inf if trainer.max_steps == -1 else float(trainer.max_steps)]
        if data is not None:
            total, used = self._budget(trainer, resume).total, data.first
            if resume is not None and resume.manifest.data == data.identity:
                world, done = resume.manifest.world, resume.manifest.done
                used = sum(stop - start for start, stop in done) if world is None else total + world["offset"]
            ends.append((total + data.end - used) / self.world_size)
        return min(ends)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        assert self._loop is not None
        if self.is_global_zero and (stepped := self._loop.schedulers.plateaus()):
            self._publish(stepped)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Averages the gradients over all workers before they are clipped and used, if the algorithm does that."""
        super().post_backward(closure_loss)
        assert self.lightning_module is not None
        if (
            not self.algorithm.averages_gradients
            or not self._training
            or is_accumulating(self.lightning_module.trainer)
        ):
            return
        assert self._collectives is not None
        gradients = [p.grad for p in self.lightning_module.parameters() if p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        mean = self._collectives.sum_(flat) / self.world_size
        for gradient, part in zip(gradients, torch.split(mean, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def on_validation_start(self) -> None:
        if self._is_training_elsewhere:
            assert self._loop is not None
            self._loop.stopwatch.restart()  # since the end of the last batch there was only the start of this
            self._put_global_model_in()

    def on_validation_end(self) -> None:
        if self._worker_model is not None:
            self._put_worker_model_back()
            self._publish([])

    @contextmanager
    def global_model(self) -> Iterator[None]:
        """Makes the module hold the present global model in a ``with`` block, as validation does, to look at it.

        For callbacks of rank 0 while it fits; the other workers train on, and this one's speed does not suffer. In
        validation and after the fit the module holds the global model already; on other ranks nothing happens.
        """
        if not self._is_training_elsewhere or self._worker_model is not None:
            yield
            return
        self._put_global_model_in()
        try:
            yield
        finally:
            self._put_worker_model_back()

    def check(self) -> None:
        """Ends this process if it has to: the run has failed, or has saved a checkpoint after SIGTERM.

        For callbacks that take long while it fits, to call now and then. Batches do it by themselves.

        Raises:
            RuntimeError: If the run has failed.
            SystemExit: After SIGTERM.
        """
        if self._loop is not None:
            self._loop.check()

    def _put_global_model_in(self) -> None:
        assert self._loop is not None
        self._loop.stopwatch.pause()
        vector = self._loop.vector
        self._worker_model = vector.read(vector.new())
        vector.write(self._read_global_model())

    def _put_worker_model_back(self) -> None:
        assert self._loop is not None
        assert self._worker_model is not None
        self._loop.vector.write(self._worker_model)
        self._worker_model = None
        self._loop.stopwatch.resume()

    @property
    def _is_training_elsewhere(self) -> bool:
        """On rank 0: whether this worker's model and the global model are different ones now."""
        return self._training and self.servers is not None and self._loop is not None and not self._loop.finished

    def _publish(self, plateaus: Sequence[tuple[int, float]]) -> None:
        assert self.servers is not None
        assert self.lightning_module is not None
        metrics = self.lightning_module.trainer.callback_metrics
        self.servers.publish(plateaus, {name: float(value) for name, value in metrics.items()})

    def _read_global_model(self) -> Tensor:
        assert self._loop is not None
        vector = self._loop.vector
        if self.algorithm.averages_gradients:  # so all workers have the global model
            return vector.read(vector.new())
        assert self.servers is not None
        model = vector.new()
        self.servers.read(model)
        return model

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the state of the *global* model while it fits on rank 0, of the module otherwise."""
        with self._not_computing():
            state = super().lightning_module_state_dict()
            if self._is_training_elsewhere and self._worker_model is None:
                assert self._loop is not None
                assert self.lightning_module is not None
                parts = self._loop.vector.named_parts(self.lightning_module, self._read_global_model())
                state.update({name: part for name, part in parts.items() if name in state})
            return state

    def _not_computing(self) -> AbstractContextManager[None]:
        """Excludes the time of a ``with`` block from this worker's speed."""
        return nullcontext() if self._loop is None else self._loop.stopwatch.paused()

    def _planned(self, rounds: dict[str, Any]) -> int:
        """Local steps of this worker's round in a simulation's checkpoint: it has computed all of it."""
        return sum(steps for worker, _, _, _, steps, _ in rounds["running"] if worker == self.global_rank)

    @property
    def _keeps_servers(self) -> bool:
        """Whether there are servers whose state is worth keeping."""
        if self._cluster is not None:
            return not self.algorithm.averages_gradients
        return isinstance(self.algorithm, ServerAlgorithm)

    @property
    def _keeps_shards(self) -> bool:
        """Whether checkpoints have shards now: not without servers, nor when the run has failed."""
        if not self._keeps_servers:
            return False
        return not self._process.alarm.has_failed if self._process is not None else self._shards.ended is not None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Writes a checkpoint: see ``docs/checkpoints.md``. While it fits only rank 0 does, and nobody waits.

        Raises:
            OSError: If it cannot be written after the fit. While it fits that is a warning.
        """

        def write(content: dict[str, Any], path: Path) -> None:
            self.checkpoint_io.save_checkpoint(content, path)

        is_preempted = self._preemption is not None and self._preemption.saved is not None
        if is_preempted and self._keeps_servers and not self._keeps_shards:
            return  # what callbacks save of an interrupted run would have no shards, and be newer than what has
        if self._training and not self._keeps_shards:
            self._end_failed_run()
        with self._not_computing():
            if not self._keeps_shards or not self._shards.belong_to(checkpoint, filepath, storage_options):
                super().save_checkpoint(checkpoint, filepath, storage_options)
            elif not self._training:
                self._shards.save_together(checkpoint, Path(filepath), write)
            elif self._is_training_elsewhere:
                self._shards.save_while_training(checkpoint, Path(filepath), write)
            elif self.is_global_zero:
                self._shards.save_at_end(checkpoint, Path(filepath), write)

    def _end_failed_run(self) -> None:
        """Raises the failure instead of saving without shards, but not in callbacks that save because of it."""
        assert self.lightning_module is not None
        if self._process is not None and self.lightning_module.trainer.state.status != TrainerStatus.INTERRUPTED:
            self._process.alarm.check(wait=True)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        if self.is_global_zero:
            self._shards.remove(filepath, partial(self.checkpoint_io.remove_checkpoint, filepath))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint. For a fit, what is this worker's own is in the place of rank 0's.

        Raises:
            CheckpointError: If it is incomplete or damaged.
        """
        if is_local(checkpoint_path):
            checkpoint_path = available(Path(checkpoint_path))
        options = {} if weights_only is None else {"weights_only": weights_only}  # since Lightning 2.6
        checkpoint = super().load_checkpoint(checkpoint_path, **options)
        assert self.lightning_module is not None
        is_fit = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        if not is_fit or not self._keeps_servers:
            return checkpoint
        return self._shards.load(Path(checkpoint_path), checkpoint)

    def on_train_end(self) -> None:
        assert self._loop is not None
        assert self._collectives is not None
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        self._training = False
        self._restore(trainer)
        self._share_decisions(trainer)
        if self._keeps_shards:
            self._shards.end_fit(self._timeout)
        if self._preemption is not None:
            self._preemption.forget()
            self._preemption.release()
        self._loop = None
        self._end_process(self._timeout)
        if self.algorithm.averages_gradients:
            self._synchronize_module()  # the workers' buffers differ

    def _share_decisions(self, trainer: pl.Trainer) -> None:
        """Makes known what rank 0 decided: trainer.test(ckpt_path="best") means the same file on all ranks."""
        assert self._collectives is not None
        assert self._loop is not None
        self._loop.schedulers.plateaus()
        self._loop.schedulers.catch_up(self._collectives.broadcast_object(self._loop.schedulers.history))
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        show_metrics(trainer, self._collectives.broadcast_object(metrics))
        deciding = {c.state_key: c for c in callbacks_of(trainer) if decides(c)}
        states: dict[str, Any] = {}
        if self.is_global_zero:
            states = {key: callback.state_dict() for key, callback in deciding.items()}
            for key in [key for key, state in states.items() if not is_broadcastable(state)]:
                rank_zero_warn(
                    f"The state of the callback {key} stays on rank 0: it cannot be sent without pickling it."
                )
                del states[key]
        states = self._collectives.broadcast_object(states)
        if not self.is_global_zero:
            for key in states.keys() & deciding.keys():
                deciding[key].load_state_dict(states[key])

    def _restore(self, trainer: pl.Trainer) -> None:
        """Gives back every attribute of the Trainer that the training loop needed otherwise."""
        if self._lightning is not None:
            self._lightning.restore()
            self._lightning = None
        if self._data is not None:
            self._data.detach()
            self._data = None

    # ------------------------------------------------------------------ collectives

    @property
    def _is_rank_zero_alone(self) -> bool:
        """Whether rank 0 does something that the other workers do not take part in: validation while fitting."""
        trainer = find_trainer(self.lightning_module)
        return (
            trainer is not None
            and trainer.state.fn == TrainerFn.FITTING
            and trainer.state.stage in (RunningStage.SANITY_CHECKING, RunningStage.VALIDATING)
        )

    @property
    def _in_step(self) -> Collectives | None:
        """The collectives over all workers, when these are in step; within a fit each worker is on its own."""
        return None if self._training or self._is_rank_zero_alone else self._collectives

    def barrier(self, name: str | None = None) -> None:
        """Waits for all workers, outside of training; nothing to wait for inside."""
        if collectives := self._in_step:
            collectives.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Returns the object of the worker ``src``, outside of training; the worker's own inside.

        Raises:
            TypeError: If the object is not made of numbers, strings, tensors, lists and dicts: nothing is pickled.
        """
        if collectives := self._in_step:
            return collectives.broadcast_object(obj, src)
        return obj

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduces a tensor over all workers, outside of training; returns the worker's own inside."""
        collectives = self._in_step
        if not isinstance(tensor, Tensor) or collectives is None:
            return tensor
        return collectives.reduce(tensor, "mean" if reduce_op is None else str(reduce_op))

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Gathers a tensor of all workers, outside of training; inside there is one worker: ``tensor[None]``."""
        collectives = self._in_step
        return tensor.unsqueeze(0) if collectives is None else collectives.all_gather(tensor)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:  # noqa: A002
        """Whether all (or any) of the workers decide so, outside of training; the worker's own decision inside."""
        collectives = self._in_step
        if collectives is None:
            return bool(decision)
        return bool(collectives.reduce(torch.tensor(int(decision)), "min" if all else "max"))

    # ------------------------------------------------------------------ the end

    def on_exception(self, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException) and exception.code is None:
            exception.code = EXIT_CODE  # Lightning's own would be a success to whoever starts the run again
        trainer = find_trainer(self.lightning_module)
        if trainer is not None:
            self._restore(trainer)

    def teardown(self) -> None:
        trainer = find_trainer(self.lightning_module)
        if trainer is not None:
            self._restore(trainer)
            if self._limit_val_batches is not None:
                trainer.limit_val_batches, self._limit_val_batches = self._limit_val_batches, None
        self._training = False
        self._loop = None
        if self._preemption is not None:
            self._preemption.release()
            self._preemption = None
        self._worker_model = None
        let_data_workers_end()
        self._end_process(_GOODBYE)
        if self._made_default_group:
            dist.destroy_process_group()
            self._made_default_group = False
        super().teardown()

    def _end_process(self, timeout: float) -> None:
        if self._world is not None:
            self._recall(self._world.seen(), self._world.virtual_ms / 1e3)
        process, self._process = self._process, None
        if process is not None:
            process.close(timeout)

    @property
    def _here(self) -> str:
        return self._describe(self.global_rank)

    def _describe(self, rank: int) -> str:
        """Names a worker; without its region as long as nobody knows the regions."""
        return self._topology.describe(rank) if hasattr(self, "_topology") else f"rank {rank}"

    def _check_interrupted(self) -> None:
        trainer = find_trainer(self.lightning_module)
        if trainer is not None and trainer.received_sigterm:
            raise SIGTERMException(EXIT_CODE)
        if self._preemption is None:
            return
        if self._training and self._cluster is None:
            self._preemption.check()
        else:  # a simulation saves at the end of rank 0's round, and not while that waits
            self._preemption.end_if_late()
