"""What a worker has besides the model: its optimizers, schedulers, scaler, loops, callbacks and random numbers.

Rules of this room: what is kept has the names and forms that Lightning gives it in its own checkpoints, so that
Lightning restores it. What could not be read without unpickling it is left out, with a warning.
"""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_halos.checkpoint.files import is_plain
from lightning_halos.core.compat import map_tensors
from lightning_halos.training.compat import collect_random_states, set_random_states

_STEPS = ("epoch_loop.automatic_optimization.optim_progress", "epoch_loop.manual_optimization.optim_step_progress")


def worker_state(trainer: pl.Trainer) -> dict[str, Any]:
    """Returns a copy of the state of this process's worker, in host memory."""
    plugin = trainer.precision_plugin
    state: dict[str, Any] = {
        "optimizer_states": [trainer.strategy.optimizer_state(optimizer) for optimizer in trainer.optimizers],
        "lr_schedulers": [copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
        "loops": {"fit_loop": copy.deepcopy(trainer.fit_loop.state_dict())},
        type(plugin).__qualname__: copy.deepcopy(plugin.state_dict()),
    }
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    state["callbacks"] = {c.state_key: copy.deepcopy(own) for c in callbacks if (own := c.state_dict())}
    for part in (state, state["callbacks"]):
        for name in [name for name, value in part.items() if value and name != "callbacks" and not is_plain(value)]:
            rank_zero_warn(f"The state of {name} is not in a worker's shard: it cannot be read without unpickling it.")
            del part[name]
    return {name: to_host(value) for name, value in state.items()}


def put_worker_state(checkpoint: dict[str, Any], state: dict[str, Any], max_epochs: int | None) -> None:
    """Makes a ``.ckpt`` file's content, which is rank 0's, that of another worker.

    Args:
        checkpoint: The content of the file. It is changed.
        state: The worker's state; see :func:`worker_state`.
        max_epochs: Epochs of the run; ``None`` or -1 without a limit.
    """
    fit_loop = checkpoint["loops"]["fit_loop"]
    mine = {name: value for name, value in state.items() if name in checkpoint}
    callbacks = {**checkpoint.get("callbacks", {}), **mine.pop("callbacks", {})}
    checkpoint.update(mine)
    checkpoint["callbacks"] = callbacks
    if "loops" in mine and _has_ended(mine["loops"]["fit_loop"], max_epochs):
        # The data of its last round may have to be used again, so that it takes part once more, where rank 0 is.
        checkpoint["loops"] = {"fit_loop": fit_loop}
    elif "loops" in mine:
        # The global step is that of the run, which is what rank 0 showed.
        loop = copy.deepcopy(mine["loops"]["fit_loop"])
        checkpoint["loops"] = {"fit_loop": loop}
        for name in (*_STEPS, "epoch_loop.state_dict"):
            loop[name] = fit_loop[name]


def take_part_again(checkpoint: dict[str, Any], max_epochs: int | None) -> None:
    """Makes rank 0, if it has ended, take the data that others had not trained on when they were stopped.

    Args:
        checkpoint: The content of a ``.ckpt`` file. It is changed.
        max_epochs: Epochs of the run; ``None`` or -1 without a limit.
    """
    fit_loop = checkpoint["loops"]["fit_loop"]
    if _has_ended(fit_loop, max_epochs):
        fit_loop["epoch_loop.batch_progress"]["is_last_batch"] = False


def _has_ended(fit_loop: dict[str, Any], max_epochs: int | None) -> bool:
    """Whether a worker was in the last batch of its last epoch."""
    ends_epoch = fit_loop["epoch_loop.batch_progress"]["is_last_batch"]
    processed = fit_loop["epoch_progress"]["current"]["processed"]
    return bool(max_epochs not in (None, -1) and processed + ends_epoch >= max_epochs)


def forget_optimizers(checkpoint: dict[str, Any]) -> None:
    """Leaves a new worker with optimizers of no history, at the learning rates of the others."""
    for state in checkpoint["optimizer_states"]:
        state["state"] = {}


def random_state() -> dict[str, Any]:
    """Returns the state of the generators of torch, its devices, NumPy and Python."""
    state = collect_random_states()
    kind, keys, *rest = state["numpy"]
    return {**state, "numpy": [kind, torch.from_numpy(keys.astype("int64")), *rest]}


def set_random_state(state: dict[str, Any]) -> None:
    """Goes on from a state of :func:`random_state`. Devices that were others before keep theirs."""
    kind, keys, *rest = state["numpy"]
    devices = state.get("torch.cuda", [])
    if len(devices) != torch.cuda.device_count():
        state = {name: value for name, value in state.items() if name != "torch.cuda"}
    set_random_states({**state, "numpy": (kind, keys.numpy().astype("uint32"), *rest)})


def to_host(state: Any) -> Any:
    """Returns a copy of a state whose tensors are in host memory."""
    return map_tensors(lambda tensor: tensor.detach().to("cpu", copy=True), state)
