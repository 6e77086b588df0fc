"""The part of the strategy that launches and connects processes, and implements Lightning's collectives.

About training it only needs to know whether workers are in step. The connections are in ``site``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor
from torch.distributed import Store

from lightning_halos.core.algorithms import Algorithm
from lightning_halos.core.checks import check_seconds
from lightning_halos.core.placement import Placement, WorkerSize, by_worker, check_divides, check_worker
from lightning_halos.core.topology import Topology, assign_regions, check_regions, regions_by_place
from lightning_halos.simulation.cluster import SimulatedCluster
from lightning_halos.training.compat import (
    all_gather,
    find_trainer,
    keep_sigterm_local,
)
from lightning_halos.training.default_group import DefaultGroup
from lightning_halos.training.inner import InnerStrategy, backend_for, make_inner
from lightning_halos.training.launcher import FunctionLauncher, ScriptLauncher, SimulationLauncher, Started
from lightning_halos.training.membership import Membership, refuse_averages
from lightning_halos.training.server_settings import ServerSettings, check_suits_server
from lightning_halos.training.shared_data import LightningRank
from lightning_halos.training.site import Site, gather_places
from lightning_halos.transport.collectives import Collectives
from lightning_halos.transport.process_group import Mode
from lightning_halos.transport.store import open_store

StartMethod = Literal["popen", "spawn", "fork"]


class ConnectedStrategy(ParallelStrategy):
    """Launches a process per worker, with collectives over them; see ``AlgorithmStrategy`` for the arguments.

    Attributes:
        algorithm: The algorithm.
        cluster: The cluster to simulate; ``None`` for a real run.
        inner: Lightning's strategy inside a worker; ``None`` if each process is a worker.
        membership: The job's membership in a run of several jobs; only during a fit of such a job.
        timeout: Limit for any wait for a peer, in seconds.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        regions: int | Sequence[Sequence[int]] | None,
        start_method: StartMethod,
        timeout: float,
        simulate: SimulatedCluster | str | Path | None,
        server: ServerSettings | None = None,
        worker: WorkerSize = 1,
        inner: InnerStrategy | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_regions(regions)
        check_worker(worker)
        check_seconds("timeout", timeout)
        if start_method not in get_args(StartMethod):
            raise ValueError(f"start_method={start_method!r} must be one of {get_args(StartMethod)}.")
        if isinstance(simulate, (str, Path)):
            simulate = SimulatedCluster.from_yaml(simulate)
        if simulate is not None and not isinstance(simulate, SimulatedCluster):
            raise TypeError(
                f"simulate=<{type(simulate).__name__}> must be a SimulatedCluster, or the path of its file, such as"
                " 'examples/clusters/paper.yaml'."
            )
        if simulate is not None and regions is not None:
            raise ValueError(
                f"regions={regions!r} must be None with simulate=..., because the cluster has the regions."
            )
        if simulate is not None and simulate.devices_per_worker not in (None, worker):
            raise ValueError(
                f"simulate=... describes workers of {simulate.devices_per_worker} device(s), but worker={worker!r}."
                f" Pass worker={simulate.devices_per_worker}, or leave devices_per_worker out of the description."
            )
        if server is not None:
            check_suits_server(algorithm, server, simulate is not None, regions)
        self.algorithm = algorithm
        self.cluster = simulate
        self.inner = make_inner(worker, inner)
        self.membership: Membership | None = None
        self._server = server
        self._regions = regions
        self._worker = worker
        self._lanes: int | None = None  # as many as the smallest worker has processes
        self._start_method = start_method
        self.timeout = float(timeout)
        self.num_nodes = 1  # the Trainer sets it, then the launcher of the processes if it says it
        self._topology: Topology | None = None
        self._store: Store | None = None
        self._site: Site | None = None
        self._default_group: DefaultGroup | None = None

    # ------------------------------------------------------------------ properties

    @property
    def is_distributed(self) -> bool:
        """Whether samplers have to be distributed among the workers."""
        return True

    @property
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """Number of processes on this node. Other nodes may have more or fewer."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    def world_size(self) -> int:
        """Number of processes; those of one worker while only it works, to agree with samplers and collectives."""
        return len(self.site.worker_processes) if self.only_rank_zero_works else super().world_size

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        if self.only_rank_zero_works:
            return {"num_replicas": len(self.site.worker_processes), "rank": self.site.lane}
        if (member := self.membership) is not None:  # the workers of other jobs may have other sizes
            worker = (member.first + self.site.rank) % member.workers
            rank = worker + member.workers * self.site.lane
            return {"num_replicas": member.workers * len(self.site.worker_processes), "rank": LightningRank(rank)}
        return {"num_replicas": super().world_size, "rank": LightningRank(self.global_rank)}

    @property
    def is_member(self) -> bool:
        """Whether the job is one region of the run of a global server."""
        return self._server is not None

    @property
    def topology(self) -> Topology:
        """The regions and servers. Known after an entry point of the Trainer has started its processes."""
        topology = self._topology if self._site is None else self._site.topology
        assert topology is not None
        return topology

    @property
    def site(self) -> Site:
        """This process's place and connections. Known after an entry point of the Trainer has started the processes."""
        assert self._site is not None, "no entry point of the Trainer has started the processes yet"
        return self._site

    @property
    def trainer(self) -> pl.Trainer:
        """The Trainer, while it runs."""
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    # ------------------------------------------------------------------ setup

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if self.cluster is not None:
            self._configure_simulation(self.cluster)
            return
        if (started := Started.by(self.cluster_environment)) is not None:
            assert self.parallel_devices is not None
            started.check_nodes(self.num_nodes)
            self.num_nodes = started.nodes
            self.parallel_devices = started.devices(self.parallel_devices)
        if self._worker != "node":
            check_divides(self._worker, [self.num_processes])
        if self._server is not None:
            self._configure_region(self._server)
            return
        regions = assign_regions(self._regions, self._num_workers, self.num_nodes)
        if regions is not None:
            self._topology = self.algorithm.arrange(regions)
        self._launcher = self._make_launcher()

    def _configure_region(self, server: ServerSettings) -> None:
        """Arranges a job that is one region, with the name in its certificate."""
        is_rank_0 = self.global_rank == 0
        name = "this job"
        with nullcontext() if is_rank_0 else suppress(ValueError):  # only its machine must have the keys
            name = server.read_keys().certificate.name
        self._topology = self.algorithm.arrange([range(self._num_workers)], [name])
        self._launcher = self._make_launcher()

    @property
    def _num_workers(self) -> int:
        return self.num_nodes if self._worker == "node" else self.world_size // self._worker

    def _make_launcher(self) -> ScriptLauncher | FunctionLauncher:
        assert self.cluster_environment is not None
        if self._start_method == "popen":
            return ScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        return FunctionLauncher(self, start_method=self._start_method)

    def _configure_simulation(self, cluster: SimulatedCluster) -> None:
        assert self.cluster_environment is not None
        assert self.parallel_devices is not None
        if self.num_nodes > 1 or self.cluster_environment.creates_processes_externally:
            raise ValueError(
                "simulate=... itself starts a process for each worker of the cluster, on one machine. Use"
                " Trainer(num_nodes=1), without torchrun or SLURM."
            )
        if self._worker == "node":
            raise ValueError(
                "worker='node' has no meaning with simulate=..., which runs on one machine. Use a number of processes."
            )
        devices = self.parallel_devices
        processes = cluster.num_workers * self._worker
        self.parallel_devices = [devices[rank % len(devices)] for rank in range(processes)]
        self._topology = self.algorithm.arrange(cluster.regions, cluster.names, cluster.global_region)
        start_method = "fork" if self._start_method == "popen" else self._start_method
        self._launcher = SimulationLauncher(self, start_method)

    def set_world_ranks(self) -> None:
        """Sets this process's rank in the cluster environment, as Lightning's ``DDPStrategy`` does.

        Environments whose launcher has started the processes ignore it: the ranks and sizes are the launcher's.
        """
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    def setup_environment(self) -> None:
        super().setup_environment()
        reset_seed()
        self.set_world_ranks()
        if self._site is None:
            assert self.cluster_environment is not None
            environment, rank, size = self.cluster_environment, self.global_rank, self.world_size
            topology, interrupted, simulated = self._topology, self.check_interrupted, self.cluster is not None
            address, port = environment.main_address, environment.main_port
            # Kept even if connecting fails, because others may still read the reason from rank 0's store.
            self._store = open_store(address, port, rank, size, self.timeout, interrupted, self.num_nodes)
            place = rank, size, self.node_rank, self.timeout, interrupted
            nodes, names = ([0] * size, [""] * size) if simulated else gather_places(self._store, *place)
            placement = Placement.build(nodes, self._worker, self._lanes)
            if not simulated and self._regions is None and self._server is None:
                nodes = [nodes[processes[0]] for processes in placement.workers]
                topology = self.algorithm.arrange(*regions_by_place(by_worker(placement, names), nodes))
            assert topology is not None
            self._site = Site(self._store, rank, placement, topology, simulated, self.timeout, interrupted)
            backend = backend_for(self.root_device) if self.inner is not None else None
            self._default_group = DefaultGroup(self._site, self._mode, backend)
        assert self._default_group is not None
        self._default_group.install()
        if (trainer := find_trainer(self.lightning_module)) is not None:  # else no entry point of the Trainer runs
            keep_sigterm_local(trainer)
            if self._server is not None and trainer.state.fn == TrainerFn.FITTING:
                refuse_averages(trainer)
                # Here, because the module's setup() may already ask for the number of steps.
                self.membership = Membership(self._server, self._site)

    @abstractmethod
    def check_interrupted(self) -> None:
        """Raises an exception that must end this process, while its main thread waits for other processes."""

    def release(self) -> None:
        """Puts torch's default process group of the user back."""
        if self._default_group is not None:
            self._default_group.release()

    def teardown(self) -> None:
        self.release()
        super().teardown()

    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    # ------------------------------------------------------------------ collectives

    @property
    def only_rank_zero_works(self) -> bool:
        """Whether only rank 0 works here, as it does when it validates during a fit."""
        trainer = find_trainer(self.lightning_module)
        return (
            trainer is not None
            and trainer.state.fn == TrainerFn.FITTING
            and trainer.state.stage in (RunningStage.SANITY_CHECKING, RunningStage.VALIDATING)
        )

    @property
    @abstractmethod
    def trains_at_own_pace(self) -> bool:
        """Whether this worker trains at its own pace now."""

    def _mode(self) -> Mode:
        """Returns what collectives over all workers do now."""
        if self.only_rank_zero_works:
            return Mode.ALONE
        return Mode.APART if self.trains_at_own_pace else Mode.TOGETHER

    @property
    def _in_step(self) -> Collectives | None:
        """The collectives over all processes if these are in step; ``None`` during a fit."""
        return None if self._site is None or self._mode() is not Mode.TOGETHER else self._site.collectives

    @property
    def _in_worker(self) -> Collectives | None:
        """The collectives over this worker's processes; ``None`` if it has one."""
        site = self._site
        return None if site is None or len(site.worker_processes) == 1 else site.worker_collectives

    def barrier(self, name: str | None = None) -> None:
        """Waits for all processes. During training it waits for those of this worker only."""
        if collectives := self._in_step or self._in_worker:
            collectives.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Returns the object of the process ``src``.

        During training, it is that of the process of this worker with the same number inside its worker.

        Raises:
            TypeError: If the object has parts other than numbers, strings, tensors, lists and dicts.
        """
        if collectives := self._in_step:
            return collectives.broadcast_object(obj, src)
        if collectives := self._in_worker:
            return collectives.broadcast_object(obj, self.site.worker_processes.index(self.site.stand_in(src)))
        return obj

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduces a tensor over all processes. During training it reduces it over those of this worker."""
        collectives = self._in_step or self._in_worker
        if not isinstance(tensor, Tensor) or collectives is None:
            return tensor
        return collectives.reduce(tensor, "mean" if reduce_op is None else str(reduce_op))

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Gathers a tensor from all processes. During training it repeats the tensors of this worker.

        Args:
            tensor: The tensor.
            group: Is ignored.
            sync_grads: Whether gradients flow through the result, during training.

        Returns:
            A tensor of shape ``[world_size, *tensor.shape]``.
        """
        if collectives := self._in_step:
            return collectives.all_gather(tensor)
        site = self._site
        here = 1 if site is None else len(site.worker_processes)
        if self.world_size > here and self._default_group is not None:
            self._default_group.warn("self.all_gather")
        own = tensor if sync_grads else tensor.detach()
        if site is None or here == 1:
            return own.expand(self.world_size, *own.shape).clone()
        rows = all_gather(own, site.inner_group, sync_grads)
        processes = site.worker_processes if self.world_size == here else range(self.world_size)
        return rows[[site.worker_processes.index(site.stand_in(process)) for process in processes]]

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:  # noqa: A002
        """Returns whether all (or any) processes decide so. During training only those of this worker take part."""
        collectives = self._in_step or self._in_worker
        if collectives is None:
            return bool(decision)
        return bool(collectives.reduce(torch.tensor(int(decision)), "min" if all else "max"))
