"""What a callback takes over of a state that another job has sent.

The other job is in somebody else's hands. Its state may say how good a model was, but not which files here are removed
or loaded, and it must not make this job fail later. How states travel is in ``callback_states``.
"""

from __future__ import annotations

import math
import os
from numbers import Number
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor


def load_foreign_state(callback: pl.Callback, state: dict[Any, Any]) -> None:
    """Gives a callback those values of a state that it can have.

    Every value must be of the kind that the callback's own state has. A text counts only if it is the callback's own
    one, or a path inside its folder ``dirpath``, because Lightning removes and loads files that a ``ModelCheckpoint``
    names. Where the callback has no value yet, it can have a number.

    Args:
        callback: The callback.
        state: Plain values.

    Raises:
        KeyError: If a value is missing.
        ValueError: If a value is of another kind. In both cases the callback has not changed.
    """
    folder = getattr(callback, "dirpath", None)
    own = callback.state_dict()
    fitted = {name: _fitted(name, state[name], mine, folder) for name, mine in own.items()}
    if isinstance(callback, ModelCheckpoint):
        _keep_best(callback, fitted)
    callback.load_state_dict(fitted)


def _fitted(name: str, value: Any, mine: Any, folder: Any) -> Any:
    """The value as far as it may be used, and the callback's own one otherwise."""
    if _is_number(mine) or _is_number(value):
        if not all(one is None or _is_number(one) for one in (mine, value)):
            raise ValueError(f"{name} is {value!r}, which is no number")
        return value
    if isinstance(mine, dict) and isinstance(value, dict):
        return {key: entry for key, entry in value.items() if _may_be_used([key, entry], None, folder)}
    if mine is None:
        return None
    if value is not None and type(value) is not type(mine):
        raise ValueError(f"{name} is <{type(value).__name__}>, and not <{type(mine).__name__}>")
    return value if _may_be_used(value, mine, folder) else mine


def _may_be_used(value: Any, mine: Any, folder: Any) -> bool:
    """Whether all texts in a value are the callback's own one or paths inside its folder."""
    if isinstance(value, str):
        return value == mine or _is_inside(value, folder)
    if isinstance(value, dict):
        return _may_be_used([*value, *value.values()], None, folder)
    if isinstance(value, list):
        return all(_may_be_used(entry, None, folder) for entry in value)
    return True


def _is_inside(path: str, folder: str | os.PathLike[str] | None) -> bool:
    if folder is None:
        return False
    folder = os.fspath(folder)
    if "://" in path or "://" in folder:  # of a file system that is not this machine's, but perhaps shared by all
        return path.startswith(folder.rstrip("/") + "/") and ".." not in path.split("/")
    folder = os.path.realpath(folder)
    path = os.path.realpath(path)
    return path != folder and os.path.commonpath([folder, path]) == folder


def _is_number(value: Any) -> bool:
    return isinstance(value, Number) or (isinstance(value, Tensor) and value.numel() == 1)


def _keep_best(callback: ModelCheckpoint, state: dict[str, Any]) -> None:
    """Keeps as many models as the callback keeps, all with a score, and finds the worst of them again."""
    models, most = state["best_k_models"], callback.save_top_k
    scores = {path: float(score) for path, score in models.items() if _is_number(score)}
    ordered = sorted(
        (path for path, score in scores.items() if not math.isnan(score)),
        key=lambda path: scores[path],
        reverse=callback.mode == "max",
    )
    kept = ordered if most == -1 else ordered[: max(most, 0)]
    state["best_k_models"] = {path: models[path] for path in kept}
    is_full = bool(kept) and len(kept) == most
    state["kth_best_model_path"] = kept[-1] if is_full else ""
    if is_full:
        state["kth_value"] = models[kept[-1]]
