"""The strategies for users. Each makes its algorithm from its arguments, and has a name in Lightning's registry.

The common part of all strategies is in ``strategy``; their differences are in ``core/algorithms``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from lightning_halos.core.algorithms import AsyncLocalSGD, Diloco, Halos, SyncSGD
from lightning_halos.core.algorithms.defaults import Defaults
from lightning_halos.core.delayed_nesterov import OptimizerFactory
from lightning_halos.core.quantization import Format
from lightning_halos.core.wire_formats import WireFormats
from lightning_halos.simulation.cluster import SimulatedCluster
from lightning_halos.training.connected_strategy import StartMethod
from lightning_halos.training.inner import InnerStrategy
from lightning_halos.training.strategy import AlgorithmStrategy


class HalosStrategy(AlgorithmStrategy):
    """Trains any LightningModule with HALoS: hierarchical asynchronous local SGD (arXiv 2506.04531).

    Each device has a process, which is a worker unless ``worker`` says otherwise. Workers run local steps with the
    module's own optimizers and send the difference to their region's server, which applies it at once and answers with
    its model. The regions' servers exchange their accumulated updates with the global server. No worker waits for a
    slower worker or for a link between regions.

    Args:
        regions: Number of regions (with consecutive ranks), or the ranks of each region, such as ``[[0, 1], [2, 3]]``.
            With workers of several processes, these are numbers of workers.
            Default: the environment variable ``HALOS_REGION`` of each process, else one region per node.
        servers_per_region: Number of local servers in every region, which share its workers, or a list with one number
            per region.
        local_steps: Local steps per round (``H``).
        dynamic_local_steps: Whether slower workers run fewer local steps per round, by their measured speed:
            ``max(1, ceil(H * speed / fastest))``.
        accumulate_updates: Pushes that a local server applies between two exchanges with the global server (``K``).
            Default: 1 to 8 per worker of the server, depending on the length of the run.
        merge_weight: Weight of the global model when a local server merges it (``alpha``). Default: 0.5 to 0.25,
            depending on the length of the run.
        local_optimizer: Makes a local server's optimizer from its parameters. Default: :class:`DelayedNesterov` with
            values that depend on the length of the run: from a rate of 1 / workers of the server without momentum to
            0.8 / workers with momentum 0.9, and a delay of 4 per worker. If the run has one local server, as with one
            region: a rate of 1 / workers, and no momentum.
        global_optimizer: Makes the global server's optimizer. Default: :class:`DelayedNesterov` with values that depend
            on the length of the run: from a rate of 1.4 / 2 with two local servers, 1.8 / 3 with three and 2.2 / local
            servers with more, without momentum, to 0.6 / local servers with momentum 0.5, and a delay of half the local
            servers.
        defaults: ``"run"``: defaults are as above; the length of a run is what the Trainer is asked for when it begins,
            and 600 global steps if this is unknown. ``"published"``: those of the HALoS paper, whatever the length; see
            ``docs/defaults.md``.
        max_norm_ratio: Reject a push if its Euclidean norm is more than this many times the median of the last 64
            pushes to its local server. The first 16 pushes are not checked. Default: ``None``, no limit. Pushes with
            NaN or infinite values are always rejected.
        wire: The format in which vectors travel: ``"float32"``, ``"bfloat16"``, ``"int8"`` or ``"int4"`` for all links,
            or a dict with formats for the links ``"within"`` and ``"between"`` regions, such as
            ``{"between": "int4"}``. What one message loses by rounding comes with the next; see ``docs/wire.md``.
        overlap: Whether a worker trains on while its push is answered, instead of waiting. What it has learned
            meanwhile is added to the answer, so that no step is lost; see ``docs/overlap.md``.
        start_method: ``"popen"``, ``"spawn"`` or ``"fork"``, as in Lightning's ``DDPStrategy``.
        timeout: Seconds of silence after which a peer counts as lost during training. A peer that is busy gets 10 times
            this limit, and at least 1800 seconds. Before and after training, workers wait at least 1800 seconds for
            each other, because rank 0 may validate then.
        grace_time: Seconds after SIGTERM that saving a checkpoint may take. All processes have ended 3 seconds later,
            or after their present batch. See ``docs/checkpoints.md``. torchrun and SLURM send SIGKILL after 30 seconds
            by default.
        simulate: A cluster to simulate on this machine, or the path of its YAML file. The simulation has a process for
            each described worker, on the devices of the Trainer, and a virtual clock. Regions are those of the cluster.
        server: Address of the global server, as in ``"halos.example.org:29600"``, where ``lightning-halos serve`` runs.
            This job is then one region of a run; see ``docs/regions-as-jobs.md``. Default: the environment variable
            ``HALOS_SERVER``, else this job is the complete run.
        keys: The file with the region's key and certificates, which ``lightning-halos keys region`` has made. Default:
            the environment variable ``HALOS_KEYS``. Only the job's rank 0 reads it.
        streams: TCP connections to the global server over which a model is sent at once.
        worker: Processes of a worker, which train one copy of the model in step, or ``"node"`` for all of a node. A
            worker never spans two nodes. Regions, servers and the number of workers count workers, not processes.
        inner: The strategy inside a worker of several processes: Lightning's ``DDPStrategy`` (the default),
            ``FSDPStrategy`` or ``ModelParallelStrategy``, or a name such as ``"ddp"``, ``"fsdp"`` or ``"fsdp2"``.
        **kwargs: As in Lightning's strategies: ``accelerator``, ``parallel_devices``, ``cluster_environment``,
            ``checkpoint_io``, ``precision_plugin``.

    With 4 regions of 4 workers and 6,144 global steps or more, as in the paper, the defaults are the paper's values
    (section 5.1): local rate 0.2, momentum 0.9, delay 16; global rate 0.15, momentum 0.5, delay 2; K 32; alpha 0.25.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is invalid; when the Trainer is made, if the regions do not match its workers.
    """

    _names = (("halos", "popen"), ("halos_spawn", "spawn"), ("halos_fork", "fork"), ("halos_notebook", "fork"))

    def __init__(
        self,
        regions: int | Sequence[Sequence[int]] | None = None,
        servers_per_region: int | Sequence[int] = 1,
        local_steps: int = 8,
        dynamic_local_steps: bool = True,
        accumulate_updates: int | None = None,
        merge_weight: float | None = None,
        local_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        global_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        max_norm_ratio: float | None = None,
        overlap: bool = False,
        wire: Format | Mapping[str, Format] = "float32",
        start_method: StartMethod = "popen",
        timeout: float = 1800,
        grace_time: float = 20,
        simulate: SimulatedCluster | str | Path | None = None,
        server: str | None = None,
        keys: str | Path | None = None,
        streams: int = 4,
        worker: int | Literal["node"] = 1,
        inner: InnerStrategy | str | None = None,
        defaults: Defaults = "run",
        **kwargs: Any,
    ) -> None:
        algorithm = Halos(
            local_steps=local_steps,
            dynamic_local_steps=dynamic_local_steps,
            accumulate_updates=accumulate_updates,
            servers_per_region=servers_per_region,
            merge_weight=merge_weight,
            local_optimizer=local_optimizer,
            global_optimizer=global_optimizer,
            max_norm_ratio=max_norm_ratio,
            overlap=overlap,
            wire=WireFormats.of(wire),
            defaults=defaults,
        )
        super().__init__(
            algorithm,
            regions,
            start_method,
            timeout,
            grace_time,
            simulate,
            server,
            keys,
            streams,
            worker,
            inner,
            **kwargs,
        )


class AsyncLocalSGDStrategy(AlgorithmStrategy):
    """Asynchronous local SGD with one server for all workers (arXiv 2401.09135).

    This is HALoS without its hierarchy: every worker pushes to the server on rank 0, also over slow links. In a real
    run the server receives four pushes at a time, so workers with slow links wait for each other.

    Args:
        local_steps: Local steps per round (``H``).
        dynamic_local_steps: Whether slower workers run fewer local steps per round, by their measured speed.
        optimizer: Makes the server's optimizer from its parameters. Default: :class:`DelayedNesterov` with values that
            depend on the length of the run: from a rate of 1 / workers without momentum to 0.8 / workers with momentum
            0.9, and a delay of 2 per worker. These last are the HALoS paper's, for 16 workers and 6,144 global steps.
        max_norm_ratio: As in :class:`~lightning_halos.HalosStrategy`.
        overlap: As there.
        wire: As there.
        defaults: As there.
        **kwargs: As in :class:`~lightning_halos.HalosStrategy`, from ``start_method`` on.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is invalid.
    """

    _names = (("async_local_sgd", "popen"),)

    def __init__(
        self,
        local_steps: int = 32,
        dynamic_local_steps: bool = True,
        optimizer: OptimizerFactory | None = None,
        max_norm_ratio: float | None = None,
        overlap: bool = False,
        wire: Format | Mapping[str, Format] = "float32",
        defaults: Defaults = "run",
        **kwargs: Any,
    ) -> None:
        algorithm = AsyncLocalSGD(
            local_steps=local_steps,
            dynamic_local_steps=dynamic_local_steps,
            optimizer=optimizer,
            max_norm_ratio=max_norm_ratio,
            overlap=overlap,
            wire=WireFormats.of(wire),
            defaults=defaults,
        )
        super().__init__(algorithm, **kwargs)


class DilocoStrategy(AlgorithmStrategy):
    """DiLoCo (arXiv 2311.08105): synchronous rounds of local steps, and an outer optimizer on their mean.

    All workers wait for the slowest of them, and for an all-reduce of the model over the slowest link.

    Args:
        local_steps: Local steps per round (``H``).
        dynamic_local_steps: Whether slower workers run fewer local steps per round, by their measured speed.
        outer_optimizer: Makes the outer optimizer from its parameters. Default: SGD with a rate of 0.7 and a Nesterov
            momentum that depends on the length of the run: from 0.6 to 0.9 for 6,144 global steps and more.
        defaults: As in :class:`~lightning_halos.HalosStrategy`; ``"published"`` are 0.7 and 0.9.
        **kwargs: As in :class:`~lightning_halos.HalosStrategy`, from ``start_method`` on. The ``timeout`` limits the
            wait for other workers, which includes the round of the slowest of them and rank 0's validation.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is invalid.
    """

    _names = (("diloco", "popen"),)

    def __init__(
        self,
        local_steps: int = 32,
        dynamic_local_steps: bool = False,
        outer_optimizer: OptimizerFactory | None = None,
        defaults: Defaults = "run",
        **kwargs: Any,
    ) -> None:
        _refuse_asynchronous("Diloco", kwargs)
        algorithm = Diloco(
            local_steps=local_steps,
            dynamic_local_steps=dynamic_local_steps,
            outer_optimizer=outer_optimizer,
            defaults=defaults,
        )
        super().__init__(algorithm, **kwargs)


class SyncSGDStrategy(AlgorithmStrategy):
    """Fully synchronous SGD in a simulated cluster: gradients are averaged in every step, as with ``"ddp"``.

    For real processes, use Lightning's own ``strategy="ddp"``.

    Args:
        simulate: The cluster.
        **kwargs: As in :class:`~lightning_halos.HalosStrategy`, from ``start_method`` on.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is invalid, or ``simulate`` is missing.
    """

    _names = (("sync_sgd", "popen"),)

    def __init__(self, simulate: SimulatedCluster | str | Path | None = None, **kwargs: Any) -> None:
        if simulate is None:
            raise ValueError(
                "simulate=None: 'sync_sgd' is for simulations. Pass SyncSGDStrategy(simulate=cluster), or use"
                " Lightning's strategy='ddp' for real processes."
            )
        _refuse_asynchronous("SyncSGD", kwargs)
        super().__init__(SyncSGD(), simulate=simulate, **kwargs)


def _refuse_asynchronous(name: str, arguments: dict[str, Any]) -> None:
    """Refuses what only servers have, also with its default, because nobody could set it to anything else."""
    for argument, reason in (
        ("overlap", "its rounds are synchronous: each begins with the result of the one before"),
        ("wire", "its workers average their models, and a mean of rounded models has no residual"),
    ):
        if argument in arguments:
            raise TypeError(
                f"{argument}={arguments[argument]!r}: {name}Strategy has no such argument, because {reason}. Leave it"
                " out, or use HalosStrategy or AsyncLocalSGDStrategy, whose workers push when they are ready."
            )
