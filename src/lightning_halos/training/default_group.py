"""Installs torch's default process group for a Trainer, and keeps metrics and BatchNorm from waiting for it in a fit.

What the group's collectives do is in ``transport/process_group``; the strategy knows whether all workers are in step.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any

import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import Metric

from lightning_halos.training.compat import advise_sync_dist_only_if, with_sampler
from lightning_halos.training.site import Site
from lightning_halos.transport.process_group import (
    Mode,
    Workers,
    default_group,
    make_default_group,
    worker_group,
)

_ADVICE = {
    "barrier": "Nothing needs to wait here: remove it, or move it to setup() or on_fit_start().",
    "broadcast": "Broadcast before training, in setup() or on_fit_start(), or compute the same value on all ranks.",
    "reduce": "Use this worker's own value. self.log() needs no reduction; validation metrics are those of all data.",
    "gather": "Compute the loss from this worker's own batch, without gathering; combine results after training.",
}


class DefaultGroup:
    """torch's default process group for the Trainer's entry points.

    A default group that the user has made is put aside while the Trainer runs. Otherwise the group stays until the
    process ends, as with Lightning's DDP, because some hooks run after the strategy's teardown.

    Args:
        site: This process's place and connections.
        mode: Returns what a collective does now.
        backend: Backend of torch's own group of this worker's processes; ``None`` if it needs none.
    """

    def __init__(self, site: Site, mode: Callable[[], Mode], backend: str | None = None) -> None:
        self._site = site
        self._backend = backend
        self._users: dist.ProcessGroup | None = None
        self._has_warned = False
        self._own = Workers(  # each Trainer's stays as it is; the group's becomes like that of the Trainer that runs
            site.process,
            site.processes,
            site.worker_processes,
            site.stand_in,
            mode,
            site.collectives_among,
            self.warn,
            os.getpid(),
        )
        self._workers = replace(self._own)

    def install(self) -> None:
        """Makes the group torch's default process group, when an entry point of the Trainer starts."""
        self._has_warned = False
        if (group := default_group()) is not None and group.workers.is_like(self._own):
            group.workers.adopt(self._own)  # groups that the user made of its workers stay valid
            self._workers = group.workers
            self._make_inner_group()
            return
        if group is not None:
            dist.destroy_process_group()
        elif dist.is_initialized():
            self._users, dist.GroupMember.WORLD = dist.group.WORLD, None
        self._workers = replace(self._own)
        make_default_group(self._workers, self._site.store, self._site.patience)
        self._make_inner_group()
        advise_sync_dist_only_if(_all_values_are_combined)
        Metric.sync = _sync  # type: ignore[assignment, method-assign]

    def _make_inner_group(self) -> None:
        if self._backend is not None:
            group = worker_group(self._site.worker_processes, self._backend, self._site.patience)
            self._site.inner_group = self._workers.inner = group

    def release(self) -> None:
        """Puts the user's own default group back, when the entry point has ended."""
        self._workers.are_running = False
        if self._users is None:
            return
        ours, dist.GroupMember.WORLD, self._users = default_group(), self._users, None
        if ours is not None:
            dist.destroy_process_group(ours)

    def warn(self, call: str, place: str = "") -> None:
        """Warns once per entry point that a collective does not combine the workers' values.

        Args:
            call: Name of the function.
            place: Where it was called, if that is known.
        """
        if self._has_warned:
            return
        self._has_warned = True
        where = f" at {place}" if place else ""
        advice = next((text for part, text in _ADVICE.items() if part in call), "Call it before or after training.")
        rank_zero_warn(
            f"{call}() was called during training{where}. Workers train at their own pace and do not wait for"
            " each other, so this call, and all later ones, act as if all other workers had this worker's value: a"
            " barrier returns at once, a sum is this worker's value times the number of workers, a mean, maximum or"
            f" minimum is this worker's value, a gather repeats it, and a broadcast keeps it. {advice} See"
            " docs/what-your-module-sees.md."
        )


# ---------------------------------------------------------------------- what would combine values on its own


def _all_values_are_combined() -> bool:
    """Whether metrics combine the values of all processes now."""
    group = default_group()
    return group is None or (group.workers.are_running and group.workers.mode() is Mode.TOGETHER)


_sync_metric = Metric.sync


def _sync(metric: Metric, *args: Any, **kwargs: Any) -> None:
    """Replaces ``Metric.sync``, so that during a fit a metric is that of the data that this worker has seen.

    Gathering would repeat the worker's states, which is wrong for sums, and for metrics that compare samples.
    """
    group = default_group()
    if not _all_values_are_combined() and (group is None or len(group.workers.here) == 1):
        return
    call = inspect.signature(_sync_metric).bind(metric, *args, **kwargs)
    if group is not None and group.workers.mode() is Mode.APART:
        own = call.arguments.get("process_group") or metric.process_group
        call.arguments["process_group"] = own or group.workers.inner
    _sync_metric(*call.args, **call.kwargs)


def set_batch_norm_local(module: nn.Module, is_local: bool, group: dist.ProcessGroup | None = None) -> None:
    """Makes the ``SyncBatchNorm`` layers of a module use the samples of this worker only, or undoes it.

    During a fit, their statistics are averaged with the model.

    Args:
        module: The module.
        is_local: Whether to do it.
        group: The group of this worker's processes; ``None`` if it has only one. Then they are plain layers.
    """
    for layer in module.modules():
        if isinstance(layer, SyncBatchNorm):
            vars(layer).pop("forward", None)
            if is_local and group is not None and group.size() > 1:
                vars(layer)["forward"] = partial(_normalize_in, layer, group)
            elif is_local:
                vars(layer)["forward"] = MethodType(nn.BatchNorm1d.forward, layer)


def _normalize_in(layer: SyncBatchNorm, group: dist.ProcessGroup, samples: Tensor) -> Tensor:
    before, layer.process_group = layer.process_group, group
    try:
        return SyncBatchNorm.forward(layer, samples)
    finally:
        layer.process_group = before


def refuse_sharing(module: nn.Module, optimizers: Iterable[Any], processes: Collection[int]) -> None:
    """Refuses optimizers and parameters of which each worker has a part, and for which workers wait in every step.

    With collectives that do not wait, each worker would train its own part only.

    Args:
        module: The module.
        optimizers: Its optimizers.
        processes: Global ranks of this worker's processes, among which a module may be divided.

    Raises:
        ValueError: If there are any.
    """
    shared = [type(optimizer).__name__ for optimizer in optimizers if "torch.distributed" in type(optimizer).__module__]
    for name, parameter in module.named_parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None and (len(processes) == 1 or not {*mesh.mesh.flatten().tolist()}.issubset(processes)):
            shared.append(f"the parameter {name}")
    if not shared:
        return
    if len(processes) == 1:
        advice = (
            "Use an optimizer of torch.optim, and a module that is not sharded; or let several processes be a worker,"
            " with worker=2 or more, among which a module may be divided."
        )
    else:
        advice = "Use an optimizer of torch.optim, and divide the module with mesh=self.device_mesh['data_parallel']."
    raise ValueError(
        f"{shared[0]} is divided among workers that wait for each other in every step, but with this strategy each"
        f" worker trains a complete model at its own pace. {advice}"
    )


# ---------------------------------------------------------------------- data loaders


def use_all_samples(loader: DataLoader[Any], site: Site) -> DataLoader[Any]:
    """Returns a loader of all samples if a user's ``DistributedSampler`` divides them among all processes.

    It is for the validation in a fit, for which only one worker works, whose processes divide the samples.
    """
    sampler = loader.sampler
    if site.size == 1 or type(sampler) is not DistributedSampler or sampler.num_replicas != site.processes:
        return loader
    alone: DistributedSampler[Any] = DistributedSampler(
        sampler.dataset, len(site.worker_processes), site.lane, sampler.shuffle, sampler.seed, sampler.drop_last
    )
    return with_sampler(loader, alone)


@contextmanager
def environment_alone(site: Site) -> Iterator[None]:
    """Shows a world of one worker in the environment, too, where some data libraries look. For validation in a fit."""
    alone = {"RANK": site.lane, "GLOBAL_RANK": site.lane, "WORLD_SIZE": len(site.worker_processes)}
    before = {name: os.environ[name] for name in alone if name in os.environ}
    os.environ.update({name: str(alone[name]) for name in before})
    try:
        yield
    finally:
        os.environ.update(before)


def tell_rank_to_workers(loader: DataLoader[Any]) -> None:
    """Sets ``RANK`` and ``WORLD_SIZE`` in a loader's processes, where data libraries look for them.

    Processes that are not forked have no process group to ask.
    """
    loader.worker_init_fn = _TellingRank(loader.worker_init_fn)


def without_telling_rank(loader: DataLoader[Any]) -> None:
    """Undoes :func:`tell_rank_to_workers`."""
    if isinstance(loader.worker_init_fn, _TellingRank):
        loader.worker_init_fn = loader.worker_init_fn.worker_init_fn


class _TellingRank:
    """Replaces a loader's ``worker_init_fn``, which it runs."""

    def __init__(self, worker_init_fn: Callable[[int], None] | None) -> None:
        self.worker_init_fn = worker_init_fn
        self._variables: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_variables": self._variables or _rank_variables()}

    def __call__(self, worker: int) -> None:
        os.environ.update(self._variables or _rank_variables())
        if self.worker_init_fn is not None:
            self.worker_init_fn(worker)


def _rank_variables() -> dict[str, str]:
    group = default_group()
    return {} if group is None else {"RANK": str(group.rank()), "WORLD_SIZE": str(group.size())}
