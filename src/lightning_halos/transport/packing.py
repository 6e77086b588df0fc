"""Tensors, texts, and values of plain kinds as bytes, and back. Nothing is pickled, because unpickling runs code.

Who sends them to whom is in ``collectives`` and ``training/callback_states``. Messages have a form of their own, in
``wire``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_halos.core.compat import bytes_of

LENGTH_BYTES = 8
"""Size of a length."""


def form_of(tensor: Tensor) -> str:
    """Returns the layout, dtype and shape of a tensor, for errors."""
    kind = "" if is_dense(tensor) else "meta " if tensor.is_meta else f"{tensor.layout} ".removeprefix("torch.")
    return f"a {kind}{str(tensor.dtype).removeprefix('torch.')} tensor of shape {list(tensor.shape)}"


def is_dense(tensor: Tensor) -> bool:
    """Returns whether a tensor has its values in a block of memory."""
    return tensor.layout == torch.strided and not tensor.is_meta


def check_dense(*tensors: Tensor) -> None:
    """Refuses other tensors.

    Raises:
        TypeError: If one of them is not dense.
    """
    for tensor in tensors:
        if not is_dense(tensor):
            raise TypeError(f"{form_of(tensor)} cannot be sent. Send dense tensors, such as tensor.to_dense().")


def bytes_of_dense(tensor: Tensor) -> Tensor:
    """Returns the values of a tensor as bytes on the host; see :func:`check_dense`."""
    check_dense(tensor)
    return bytes_of(tensor)


def tensor_of(data: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Returns the tensor of :func:`bytes_of_dense`."""
    return data.clone().view(dtype).view(shape)  # a clone is aligned, and does not keep the other tensors in memory


def bytes_of_text(text: str) -> Tensor:
    """Returns a text in UTF-8."""
    return torch.frombuffer(bytearray(text.encode() + b"\0"), dtype=torch.uint8)[:-1]  # no buffer may be empty


def text_of(data: Tensor) -> str:
    """Returns the text of :func:`bytes_of_text`."""
    return data.numpy().tobytes().decode(errors="replace")


def bytes_of_length(length: int) -> Tensor:
    """Returns a length in ``LENGTH_BYTES``."""
    return torch.tensor([length]).view(torch.uint8)


def length_in(data: Tensor) -> int:
    """Returns the length at the start of bytes."""
    return int(data[:LENGTH_BYTES].view(torch.int64))


def pack(value: Any) -> Tensor:
    """Returns a value as bytes: the length of the JSON, the JSON, and the tensors in it.

    Args:
        value: Numbers, texts, ``None``, dense tensors, paths, and lists, tuples or dicts of them.

    Raises:
        TypeError: If there is anything else in it.
    """
    tensors: list[Tensor] = []
    return _body(_packed(value, tensors), tensors)


def pack_error(error: BaseException) -> Tensor:
    """Returns bytes for which :func:`unpack` raises the error, as a ``TypeError``."""
    return _body({"error": str(error)}, [])


def _body(packed: Any, tensors: list[Tensor]) -> Tensor:
    head = bytes_of_text(json.dumps(packed))
    return torch.cat([bytes_of_length(len(head)), head, *map(bytes_of_dense, tensors)])


def _packed(value: Any, tensors: list[Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": [list(value.shape), str(value.dtype).removeprefix("torch.")]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__ if type(value) in (list, tuple) else "list": [_packed(v, tensors) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[_packed(k, tensors), _packed(v, tensors)] for k, v in value.items()]}
    if hasattr(value, "__fspath__"):
        return value.__fspath__()
    raise TypeError(
        f"A {type(value).__name__} cannot be broadcast, because lightning-halos never unpickles data from other"
        " processes. Broadcast numbers, strings, tensors, and lists or dicts of them."
    )


def unpack(body: Tensor) -> Any:
    """Returns the value of :func:`pack`.

    Raises:
        TypeError: If the bytes are those of :func:`pack_error`.
        Exception: Of other kinds, if they are not those of :func:`pack`.
    """
    stop = LENGTH_BYTES + length_in(body)

    def value_of(packed: Any) -> Any:
        nonlocal stop
        if not isinstance(packed, dict):
            return packed
        ((kind, content),) = packed.items()
        if kind == "error":
            raise TypeError(content)
        if kind == "tensor":
            shape, name = content
            dtype = getattr(torch, name)
            start, stop = stop, stop + math.prod(shape) * dtype.itemsize
            return tensor_of(body[start:stop], dtype, shape)
        if kind == "dict":
            return {value_of(key): value_of(value) for key, value in content}
        items = [value_of(item) for item in content]
        return tuple(items) if kind == "tuple" else items

    return value_of(json.loads(text_of(body[LENGTH_BYTES:stop])))


def is_plain(value: Any) -> bool:
    """Returns whether :func:`pack` supports a value."""
    try:
        pack(value)
    except Exception:  # an object's own methods may raise anything
        return False
    return True
