"""The state of the callbacks that decide, as a text that another job can go on with. Nothing is pickled.

Which callbacks decide, and on which process, is in ``trainer_adapter``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_halos.training.foreign_state import load_foreign_state
from lightning_halos.training.trainer_adapter import decides

_MOST = 2**19  # characters; a message has at most twice as many
_TENSOR = "__tensor__"


def states_as_text(callbacks: Iterable[pl.Callback]) -> str:
    """Returns the state of those callbacks that decide. A state with other values than plain ones is left out."""
    texts = {}
    for callback in callbacks:
        if decides(callback) and (state := callback.state_dict()):
            try:
                texts[callback.state_key] = json.dumps(_to_plain(state))
            except (TypeError, ValueError):
                rank_zero_warn(
                    f"The state of the callback {callback.state_key} stays in this job: it cannot be sent without"
                    " pickling it."
                )
    text = json.dumps(texts)
    return text if len(text) <= _MOST else ""


def put_states(callbacks: Iterable[pl.Callback], text: str) -> None:
    """Gives callbacks the states in a text of :func:`states_as_text`. Nothing happens if it is empty."""
    try:
        texts = json.loads(text) if text else {}
        for callback in callbacks:
            if decides(callback) and callback.state_key in texts:
                load_foreign_state(callback, _from_plain(json.loads(texts[callback.state_key])))
    except Exception as error:  # another job may have other versions of the callbacks
        rank_zero_warn(f"This job's callbacks begin anew, because the other job's state does not suit them: {error!r}")


def _to_plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {_TENSOR: [str(value.dtype).removeprefix("torch."), value.tolist()]}
    if isinstance(value, dict):
        return [[_to_plain(key), _to_plain(entry)] for key, entry in value.items()]
    if isinstance(value, list | tuple):
        return {"list": [_to_plain(entry) for entry in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} is no plain value")


def _from_plain(value: Any) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            dtype, numbers = value[_TENSOR]
            return torch.tensor(numbers, dtype=getattr(torch, dtype))
        return [_from_plain(entry) for entry in value["list"]]
    if isinstance(value, list):
        return {_from_plain(key): _from_plain(entry) for key, entry in value}
    return value
