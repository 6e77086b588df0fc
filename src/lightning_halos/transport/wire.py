"""Converts messages to bytes and back: JSON for the fields, raw memory for the vector.

It does no I/O. It uses no pickle, because unpickling would run code that a peer has chosen.
"""

from __future__ import annotations

import dataclasses
import json

import torch
from torch import Tensor

from lightning_halos.core import messages
from lightning_halos.core.messages import Message

_KINDS: dict[str, type[Message]] = {
    kind.__name__: kind
    for kind in (
        messages.Push,
        messages.Pull,
        messages.RegionUpdate,
        messages.RegionModel,
        messages.GlobalModel,
        messages.Progress,
        messages.Status,
        messages.LeaseRequest,
        messages.LeaseGrant,
        messages.Marker,
        messages.MarkerReply,
        messages.ShardWritten,
        messages.Preempted,
        messages.Failure,
    )
}
_DTYPES = [torch.float32, torch.float64]


def encode(message: Message) -> bytes:
    """Returns the fields of a message, without its vector, as JSON."""
    fields = {f.name: getattr(message, f.name) for f in dataclasses.fields(message) if f.name != "vector"}
    return json.dumps([type(message).__name__, fields]).encode()


def decode(data: bytes, vector: Tensor | None) -> Message:
    """Returns the message that :func:`encode` encoded, with ``vector`` in it.

    Raises:
        ValueError: If ``data`` is not a message.
    """
    try:
        kind, fields = json.loads(data)
        return _KINDS[kind](**(fields if vector is None else {**fields, "vector": vector}))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"Not a message: {data[:80]!r}; do all processes run the same version of lightning-halos? ({error!r})"
        ) from None


def vector_of(message: Message) -> Tensor | None:
    """Returns the vector of a message, ``None`` if it has none."""
    return getattr(message, "vector", None)


def describe(vector: Tensor | None) -> tuple[int, int]:
    """Returns the number of elements and the code of the dtype, for the frame that announces a vector."""
    return (0, 0) if vector is None else (vector.numel(), _DTYPES.index(vector.dtype))


def dtype_of(code: int) -> torch.dtype:
    """Returns the dtype for a code of :func:`describe`."""
    return _DTYPES[code]
