"""The state of a worker besides the model: optimizers, schedulers, scaler, loops, callbacks and random numbers.

It has the names and structure of Lightning's own checkpoints, so that Lightning can restore it. State that could not be
read without unpickling is left out, with a warning.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_halos.checkpoint.files import can_be_read
from lightning_halos.core.compat import map_tensors
from lightning_halos.training.compat import collect_random_states, set_random_states
from lightning_halos.training.composed_strategy import ComposedStrategy
from lightning_halos.training.optimizer_shards import optimizer_pieces

_STEPS = ("epoch_loop.automatic_optimization.optim_progress", "epoch_loop.manual_optimization.optim_step_progress")


def worker_state(trainer: pl.Trainer) -> dict[str, Any]:
    """Returns a copy of the state of this process's worker, in host memory."""
    plugin = trainer.precision_plugin
    state: dict[str, Any] = {
        **_optimizer_states(trainer),
        "lr_schedulers": [copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
        "loops": {"fit_loop": copy.deepcopy(trainer.fit_loop.state_dict())},
        type(plugin).__qualname__: copy.deepcopy(plugin.state_dict()),
    }
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    state["callbacks"] = {c.state_key: copy.deepcopy(own) for c in callbacks if (own := c.state_dict())}
    _leave_out(state, but="callbacks")
    _leave_out(state["callbacks"])
    return {name: to_host(value) for name, value in state.items()}


def _leave_out(state: dict[str, Any], but: str = "") -> None:
    """Removes what cannot be read without unpickling, with a warning."""
    for name in [name for name, value in state.items() if value and name != but and not can_be_read(value)]:
        # On all ranks, because rank 0 makes no such state during a fit.
        warnings.warn(
            f"The state of {name} is not in a worker's shard: it could not be read without unpickling.", stacklevel=2
        )
        del state[name]


def own_data_state(position: dict[str, Any]) -> dict[str, Any]:
    """Returns a worker's position in data of its own, as a part of its state; see :mod:`.own_data`."""
    state = {"own_data": position}
    _leave_out(state)
    return to_host(state)  # type: ignore[no-any-return]


def _optimizer_states(trainer: pl.Trainer) -> dict[str, Any]:
    """Returns the states of the optimizers: of a divided model this process's parts, and otherwise only on lane 0."""
    strategy = trainer.strategy
    if isinstance(strategy, ComposedStrategy) and strategy.divides_model:
        lane = strategy.site.lane
        return {"optimizer_states": [optimizer_pieces(o, strategy.model, lane) for o in trainer.optimizers]}
    if isinstance(strategy, ComposedStrategy) and strategy.site.lane > 0:
        return {}
    return {"optimizer_states": [strategy.optimizer_state(optimizer) for optimizer in trainer.optimizers]}


def put_worker_state(
    checkpoint: dict[str, Any], state: dict[str, Any], max_epochs: int | None, shares_data: bool
) -> None:
    """Replaces rank 0's state in the contents of a ``.ckpt`` file by that of another worker, in place."""
    fit_loop = checkpoint["loops"]["fit_loop"]
    mine = {name: value for name, value in state.items() if name in checkpoint}
    callbacks = {**checkpoint.get("callbacks", {}), **mine.pop("callbacks", {})}
    loops = mine.pop("loops", None)
    checkpoint.update(mine)
    checkpoint["callbacks"] = callbacks
    # If it has ended shared data, its last round may have to be run again, so it takes part at rank 0's position.
    if loops is not None and not (shares_data and _has_ended(loops["fit_loop"], max_epochs)):
        # Rank 0's counters have the global step of the run.
        loop = copy.deepcopy(loops["fit_loop"])
        checkpoint["loops"] = {"fit_loop": loop}
        for name in (*_STEPS, "epoch_loop.state_dict"):
            loop[name] = fit_loop[name]
        _let_start(loop, max_epochs)
    put_own_data(checkpoint, state, max_epochs)


def put_own_data(checkpoint: dict[str, Any], state: dict[str, Any], max_epochs: int | None) -> None:
    """Puts a worker's position in data of its own into the contents of a ``.ckpt`` file, in place."""
    loop, position = checkpoint["loops"]["fit_loop"], state.get("own_data", {})
    loop.update(position)
    if "epoch_progress" in position:  # not after a fit, when all workers are in step
        _let_start(loop, max_epochs)


def _let_start(loop: dict[str, Any], max_epochs: int | None) -> None:
    """Puts a worker that is after its last epoch at its last batch, because Lightning would not even start its fit."""
    epoch, batch = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    if max_epochs in (None, -1) or epoch["current"]["processed"] < max_epochs:
        return
    for counts in (epoch["total"], epoch["current"]):
        counts["processed"] = counts["completed"] = counts["ready"] - 1
    if batch["current"]["completed"]:
        for counts in (batch["total"], batch["current"]):
            counts["completed"] = counts["processed"] - 1
    batch["is_last_batch"] = True


def ended_worker_state(trainer: pl.Trainer, shares_data: bool) -> dict[str, Any]:
    """Returns the state of this process's worker after the fit, when all are at rank 0's position in shared data.

    Workers that do not share data have their own position in it, and state of their own loaders.
    """
    state = worker_state(trainer)
    loops = state.pop("loops", None)
    if loops is not None and not shares_data:
        state["own_data"] = {name: loops["fit_loop"][name] for name in ("state_dict", "epoch_loop.batch_progress")}
    return state


def take_part_again(checkpoint: dict[str, Any], max_epochs: int | None) -> None:
    """Lets rank 0, if it has finished, train on data that other workers had not trained on when they were stopped."""
    fit_loop = checkpoint["loops"]["fit_loop"]
    if _has_ended(fit_loop, max_epochs):
        fit_loop["epoch_loop.batch_progress"]["is_last_batch"] = False


def _has_ended(fit_loop: dict[str, Any], max_epochs: int | None) -> bool:
    """Returns whether a worker was in the last batch of its last epoch."""
    ends_epoch = fit_loop["epoch_loop.batch_progress"]["is_last_batch"]
    processed = fit_loop["epoch_progress"]["current"]["processed"]
    return bool(max_epochs not in (None, -1) and processed + ends_epoch >= max_epochs)


def go_on_in_epoch(checkpoint: dict[str, Any]) -> None:
    """Lets a run that ended at ``max_steps`` in the middle of an epoch go on in it.

    Lightning has counted the epoch as processed, and would give the data of the next one another epoch's number.
    """
    fit_loop = checkpoint["loops"]["fit_loop"]
    epoch, ends_epoch = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]["is_last_batch"]
    if not ends_epoch and epoch["current"]["processed"] > epoch["current"]["completed"]:
        for counts in (epoch["total"], epoch["current"]):
            counts["processed"] = counts["completed"]


def clear_optimizers(checkpoint: dict[str, Any]) -> None:
    """Clears the optimizers' history for a new worker, but keeps their learning rates."""
    for state in checkpoint["optimizer_states"]:
        state["state"] = {}


def random_state() -> dict[str, Any]:
    """Returns the state of the generators of torch, its devices, NumPy and Python."""
    state = collect_random_states()
    kind, keys, *rest = state["numpy"]
    return {**state, "numpy": [kind, torch.from_numpy(keys.astype("int64")), *rest]}


def set_random_state(state: dict[str, Any]) -> None:
    """Restores a state of :func:`random_state`. If the number of devices differs, the devices keep their own state."""
    kind, keys, *rest = state["numpy"]
    devices = state.get("torch.cuda", [])
    if len(devices) != torch.cuda.device_count():
        state = {name: value for name, value in state.items() if name != "torch.cuda"}
    set_random_states({**state, "numpy": (kind, keys.numpy().astype("uint32"), *rest)})


def to_host(state: Any) -> Any:
    """Returns a copy of a state whose tensors are in host memory."""
    return map_tensors(lambda tensor: tensor.detach().to("cpu", copy=True), state)
