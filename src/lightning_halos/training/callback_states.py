"""What the job that decides gives to the next one, as a text: its callbacks' state and its last validation.

Nothing is pickled.

Which callbacks decide, and on which process, is in ``trainer_adapter``.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_halos.training.foreign_state import load_foreign_state
from lightning_halos.training.trainer_adapter import is_deciding_callback
from lightning_halos.transport.packing import pack, unpack

_MOST = 2**19  # characters; a message has at most twice as many


def states_as_text(callbacks: Iterable[pl.Callback], validated: int) -> str:
    """Returns the state of those callbacks that decide, and the global step of the last validation.

    A state with other values than plain ones is left out.
    """
    texts = {}
    for callback in callbacks:
        if is_deciding_callback(callback) and (state := callback.state_dict()):
            try:
                texts[callback.state_key] = base64.b64encode(pack(state).numpy().tobytes()).decode()
            except (TypeError, ValueError):
                rank_zero_warn(
                    f"The state of the callback {callback.state_key} stays in this job: it cannot be sent without"
                    " pickling it."
                )
    text = json.dumps({"validated": validated, "callbacks": texts})
    return text if len(text) <= _MOST else json.dumps({"validated": validated, "callbacks": {}})


def put_states(callbacks: Iterable[pl.Callback], text: str) -> int | None:
    """Gives callbacks the states in a text of :func:`states_as_text`. Nothing happens if it is empty.

    Returns:
        The global step of the last validation; ``None`` if the text does not say it.
    """
    validated = None
    try:
        told = json.loads(text) if text else {"callbacks": {}}
        texts, validated = told["callbacks"], told.get("validated")
        for callback in callbacks:
            if is_deciding_callback(callback) and callback.state_key in texts:
                state = bytearray(base64.b64decode(texts[callback.state_key], validate=True))
                load_foreign_state(callback, unpack(torch.frombuffer(state, dtype=torch.uint8)))
    except Exception as error:  # another job may have other versions of the callbacks
        rank_zero_warn(f"This job's callbacks begin anew, because the other job's state does not suit them: {error!r}")
    return validated if type(validated) is int else None
