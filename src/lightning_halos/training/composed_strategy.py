"""The part of the strategy that lets Lightning's own strategy work inside a worker of several processes.

The inner strategy sees the worker as its world: it wraps and divides the module, runs its steps, averages gradients and
collects its state, among the worker's processes. This file passes Lightning's calls on to it. It does nothing if each
worker is one process, and knows nothing of rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.plugins.precision import (
    DoublePrecision,
    FSDPPrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
)
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from lightning_halos.core.sharding import find_shards, local
from lightning_halos.training.compat import (
    AVERAGING_CALLBACKS,
    MultiProcessingLauncher,
    evaluation_loops,
    find_trainer,
    has_precision_plugin,
    limit_to_group,
    parallel_sizes,
    save_in_one_file,
    set_device_mesh,
    set_layer_sync,
)
from lightning_halos.training.connected_strategy import ConnectedStrategy
from lightning_halos.training.inner import InnerStrategy, backend_for
from lightning_halos.training.optimizer_shards import join_pieces, load_pieces, wanted_pieces
from lightning_halos.training.same_model import broadcast_module
from lightning_halos.training.site import Site
from lightning_halos.training.trainer_adapter import callbacks_of
from lightning_halos.transport.process_group import worker_group


class WorkerEnvironment(ClusterEnvironment):
    """A cluster environment in which the processes of a worker are the world.

    Args:
        environment: That of all processes.
        site: This process's place.
    """

    def __init__(self, environment: ClusterEnvironment, site: Site) -> None:
        super().__init__()
        self._environment = environment
        self._site = site

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self._environment.main_address

    @property
    def main_port(self) -> int:
        return self._environment.main_port

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return len(self._site.worker_processes)

    def set_world_size(self, size: int) -> None:
        """Does nothing: the worker's size is known."""

    def global_rank(self) -> int:
        return self._site.lane

    def set_global_rank(self, rank: int) -> None:
        """Does nothing: the lane is known."""

    def local_rank(self) -> int:
        return self._environment.local_rank()

    def node_rank(self) -> int:
        return 0


def refuse_averages_of_parts(trainer: pl.Trainer, inner: InnerStrategy) -> None:
    """Refuses callbacks that average a copy of the module, if a strategy divides the module.

    Raises:
        ValueError: If there are any.
    """
    names = [type(callback).__name__ for callback in callbacks_of(trainer) if isinstance(callback, AVERAGING_CALLBACKS)]
    if names and not isinstance(inner, DDPStrategy):
        raise ValueError(
            f"{names[0]} keeps a copy of the complete module, but inner=<{type(inner).__name__}> divides the module"
            " among the processes of a worker. Average the checkpoints afterwards, or use inner=DDPStrategy()."
        )


def refuse_precision_plugin(trainer: pl.Trainer | None, plugin: Precision) -> None:
    """Refuses a user's precision plugin with ``FSDPStrategy``, which needs one of its own kind.

    Raises:
        TypeError: If it was passed to the Trainer, or is of a kind that Lightning's Trainer does not make.
    """
    if has_precision_plugin(trainer) or type(plugin) not in (Precision, MixedPrecision, HalfPrecision, DoublePrecision):
        raise TypeError(
            f"inner=<FSDPStrategy> needs an FSDPPrecision plugin, but the Trainer has <{type(plugin).__name__}>. Pass"
            f" Trainer(precision={plugin.precision!r}), or Trainer(plugins=FSDPPrecision({plugin.precision!r}))."
        )


def check_sizes(inner: ModelParallelStrategy, size: int) -> None:
    """Checks how a strategy divides a model among the processes of a worker.

    Raises:
        ValueError: If it is not by rows among all of them.
    """
    data, tensor = parallel_sizes(inner)
    if data not in ("auto", size) or tensor not in ("auto", 1):
        raise ValueError(
            f"ModelParallelStrategy(data_parallel_size={data!r}, tensor_parallel_size={tensor!r}) must have"
            f" data_parallel_size={size}, the number of processes of a worker, and tensor_parallel_size=1, or neither:"
            " workers can only exchange models that are divided by rows."
        )


class ComposedStrategy(ConnectedStrategy):
    """Launches and connects processes, and composes the strategy inside a worker; see ``AlgorithmStrategy``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._worker != "node" and isinstance(self.inner, ModelParallelStrategy):
            check_sizes(self.inner, self._worker)
        self._inference_modes: list[tuple[Any, bool]] = []
        self._reduced: set[int] = set()  # id of the parameters whose gradients DDP averages

    # ------------------------------------------------------------------ setup

    @property
    def model(self) -> nn.Module | None:
        """The module, as the inner strategy wraps it."""
        return super().model if self.inner is None else self.inner.model

    @model.setter
    def model(self, model: nn.Module | None) -> None:
        if self.inner is None:
            self._model = model
        else:
            self.inner.model = model

    @property
    def _inner_or_own(self) -> Any:
        """The inner strategy; in a worker of one process, what this one inherits."""
        return self.inner or super()

    def connect(self, model: pl.LightningModule) -> None:
        if self.inner is not None:
            self.inner.connect(model)
        super().connect(model)

    def setup_environment(self) -> None:
        super().setup_environment()
        if self.inner is not None:
            trainer = find_trainer(self.lightning_module)
            if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
                refuse_averages_of_parts(trainer, self.inner)
            self._compose(self.inner)

    def _compose(self, inner: InnerStrategy) -> None:
        """Gives the inner strategy what Lightning's own setup of an environment would give it."""
        site, environment = self.site, self.cluster_environment
        assert site.inner_group is not None
        assert environment is not None
        assert self.accelerator is not None
        inner.accelerator = self.accelerator
        inner.checkpoint_io = self.checkpoint_io
        inner.parallel_devices = self.parallel_devices
        inner.cluster_environment = WorkerEnvironment(environment, site)
        set_layer_sync(inner, self)
        if isinstance(inner, FSDPStrategy) and not isinstance(self.precision_plugin, FSDPPrecision):
            refuse_precision_plugin(find_trainer(self.lightning_module), self.precision_plugin)
            self.precision_plugin = FSDPPrecision(self.precision_plugin.precision)  # type: ignore[arg-type]
        inner.precision_plugin = self.precision_plugin
        size = len(site.worker_processes)
        if not isinstance(inner, DDPStrategy) and not site.placement.is_even:
            raise ValueError(
                f"inner=<{type(inner).__name__}> divides the model among the processes of a worker, so all workers need"
                f" the same number of them, but they have {[len(ranks) for ranks in site.placement.workers]}. Use"
                f" worker={site.placement.common_size}, or inner=DDPStrategy()."
            )
        if isinstance(inner, ModelParallelStrategy):
            self._make_mesh(inner, size)
            save_in_one_file(inner)
            return
        if isinstance(inner, FSDPStrategy):
            if "device_mesh" in inner.kwargs or "HYBRID" in inner.sharding_strategy.name:
                raise ValueError(
                    "FSDPStrategy(device_mesh=..., sharding_strategy='HYBRID_SHARD') is not possible inside a worker,"
                    " whose processes have one shard each. Use 'FULL_SHARD' or 'SHARD_GRAD_OP'."
                )
            save_in_one_file(inner)
        limit_to_group(inner, site.inner_group)

    def _make_mesh(self, inner: ModelParallelStrategy, size: int) -> None:
        """Makes the device mesh of the worker's processes, which a module uses in ``configure_model``."""
        site, device = self.site, self.root_device
        check_sizes(inner, size)
        assert site.inner_group is not None
        alone = worker_group((site.process,), backend_for(device), site.patience)
        mesh = DeviceMesh.from_group(
            [site.inner_group, alone],
            device.type,
            mesh=[[process] for process in site.worker_processes],
            mesh_dim_names=("data_parallel", "tensor_parallel"),
        )
        assert self.lightning_module is not None
        set_device_mesh(inner, self.lightning_module, mesh)

    def setup_inner(self, trainer: pl.Trainer) -> None:
        """Lets the inner strategy wrap the module and make the optimizers."""
        assert self.inner is not None
        self.inner.setup(trainer)
        self._reduced = self._trainable()
        self.optimizers, self.lr_scheduler_configs = self.inner.optimizers, self.inner.lr_scheduler_configs
        for loop in evaluation_loops(trainer):  # gloo and modules that are divided do not support inference mode
            self._inference_modes.append((loop, loop.inference_mode))
            loop.inference_mode = False

    def wrap_unfrozen(self) -> None:
        """Lets DDP also average the gradients of parameters that have become trainable since it wrapped the module.

        It ignores them otherwise, and the processes of a worker would train different models. All processes of the
        worker must call it.
        """
        if not isinstance(self.inner, DDPStrategy) or self._trainable() <= self._reduced:
            return
        self._reduced = self._trainable()
        self.inner.model = self.lightning_module
        self.inner.configure_ddp()

    def _trainable(self) -> set[int]:
        assert self.lightning_module is not None
        return {id(parameter) for parameter in self.lightning_module.parameters() if parameter.requires_grad}

    @property
    def divides_model(self) -> bool:
        """Whether each process of a worker has only a part of the module."""
        return bool(find_shards(self.model)) if self.inner is not None else False

    def synchronize_module(self) -> None:
        """Copies the first worker's parameters and buffers to all workers, and the complete ones from rank 0."""
        assert self.lightning_module is not None
        shards = {} if self.inner is None else find_shards(self.model)
        broadcast_module(self.site.collectives, self.lightning_module, except_for=shards)
        if shards:
            parameters = [p for p in self.lightning_module.parameters() if id(p) in shards]
            self.site.lane_collectives.broadcast_([local(p) for p in parameters])

    def teardown(self) -> None:
        if self.inner is None:
            super().teardown()
            return
        self._keep_complete_state()
        while self._inference_modes:
            loop, mode = self._inference_modes.pop()
            loop.inference_mode = mode
        if self.inner.cluster_environment is not None:  # else this process has only launched the others
            self.inner.teardown()
        self.release()
        assert self.cluster_environment is not None
        self.cluster_environment.teardown()
        self.checkpoint_io.teardown()

    def _keep_complete_state(self) -> None:
        """Collects the complete state of a divided module for the process that has launched this one, after a fit.

        Only the first worker of each machine does so, because its first process returns it.
        """
        trainer, launcher = find_trainer(self.lightning_module), self._launcher
        if trainer is None or not isinstance(launcher, MultiProcessingLauncher) or self._site is None:
            return
        if trainer.state.fn == TrainerFn.FITTING and trainer.state.status == TrainerStatus.RUNNING:
            launcher.complete_state = None
            if self.divides_model:
                is_first = self.local_rank == self.site.lane
                launcher.complete_state = self.lightning_module_state_dict() if is_first else {}

    def tensor_init_context(self, empty_init: bool | None = None) -> Any:
        return self._inner_or_own.tensor_init_context(empty_init)

    def model_sharded_context(self) -> Any:
        return self._inner_or_own.model_sharded_context()

    def on_exception(self, exception: BaseException) -> None:
        if self.inner is not None:
            self.inner.on_exception(exception)

    # ------------------------------------------------------------------ steps

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner_or_own.training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner_or_own.validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner_or_own.test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner_or_own.predict_step(*args, **kwargs)

    def pre_backward(self, closure_loss: Tensor) -> None:
        self._inner_or_own.pre_backward(closure_loss)

    def post_backward(self, closure_loss: Tensor) -> None:
        self._inner_or_own.post_backward(closure_loss)

    def optimizer_step(self, optimizer: Optimizer, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        return self._inner_or_own.optimizer_step(optimizer, closure, model, **kwargs)

    # ------------------------------------------------------------------ state

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False if self.inner is None else self.inner.restore_checkpoint_after_setup

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True if self.inner is None else self.inner.lightning_restore_optimizer

    def lightning_module_state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._inner_or_own.lightning_module_state_dict()
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state: dict[str, Any] = self._inner_or_own.optimizer_state(optimizer)
        return state

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self._inner_or_own.load_model_state_dict(checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        self._inner_or_own.load_optimizer_state_dict(checkpoint)

    def clear_optimizers(self) -> None:
        """Clears the history of optimizers that :meth:`load_checkpoint` has given rank 0's state."""
        if not self.lightning_restore_optimizer:
            for optimizer in self.optimizers:
                optimizer.state.clear()

    def load_optimizers(self, states: Sequence[Sequence[Mapping[str, Any]]], is_new: bool) -> None:
        """Gives the optimizers of a divided model this worker's own state in place of rank 0's.

        Args:
            states: Their states, by lane of the checkpoint.
            is_new: Whether the checkpoint does not have this worker.
        """
        if self.site.rank == 0:
            return
        if is_new:
            self.clear_optimizers()
        for optimizer, pieces in zip(self.optimizers, zip(*states, strict=True), strict=False):
            wanted = wanted_pieces(optimizer, self.model, self.site.lane)
            load_pieces(optimizer, join_pieces(pieces, wanted), wanted)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        options = {} if weights_only is None else {"weights_only": weights_only}  # since Lightning 2.6
        strategy: Any = super()
        if self.inner is not None and self.inner.restore_checkpoint_after_setup:
            strategy = self.inner
            is_fit = self.trainer.state.fn == TrainerFn.FITTING
            self.inner.optimizers = self.optimizers if is_fit else []  # else there may be those of an earlier fit
        contents: dict[str, Any] = strategy.load_checkpoint(checkpoint_path, **options)
        return contents
