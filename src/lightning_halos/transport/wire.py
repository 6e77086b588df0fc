"""Converts messages to bytes and back: MessagePack for the fields, raw memory for the vector.

It does no I/O. It does not trust its input: every field must have its type and keep its limits. It uses no pickle,
because unpickling would run code that a peer has chosen.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import sys
import types
from collections.abc import Iterable
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgspec
from torch import Tensor

from lightning_halos.core.messages import NOT_NEGATIVE, Message

MOST_CHARACTERS = 2**20
"""Largest number of characters of a text in a message."""

MOST_ITEMS = 2**20
"""Largest number of items of a list or a dict in a message. An item takes far more memory than bytes in a message."""

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]  # as torch has them
_Text = Annotated[str, msgspec.Meta(max_length=MOST_CHARACTERS)]
_Amount = Annotated[float, msgspec.Meta(ge=0, le=sys.float_info.max)]  # not NaN either


def _limited(annotation: Any) -> Any:
    """Adds limits to the annotation of a field: integers must not be negative, nor texts, lists and dicts too long."""
    if annotation in (int, str):
        return _Count if annotation is int else _Text
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return _form_of(annotation, tag=None)
    if get_origin(annotation) is Annotated:
        assert get_args(annotation) == (float, NOT_NEGATIVE)
        return _Amount
    arguments = tuple(map(_limited, get_args(annotation)))
    if not arguments:
        return annotation
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return _union(arguments)
    form = origin[arguments]
    return Annotated[form, msgspec.Meta(max_length=MOST_ITEMS)] if origin in (list, dict) else form


def _union(members: Iterable[Any]) -> Any:
    return functools.reduce(operator.or_, members)


@functools.cache
def _form_of(kind: type, tag: str | None) -> type[msgspec.Struct]:
    """Returns a type with the fields of a dataclass, except the vector."""
    hints = get_type_hints(kind, include_extras=True)
    fields = [(field.name, _limited(hints[field.name])) for field in dataclasses.fields(kind) if field.name != "vector"]
    form = msgspec.defstruct(kind.__name__, fields, tag=tag, forbid_unknown_fields=True, kw_only=True)
    _KINDS[form] = kind
    return form


_KINDS: dict[type[msgspec.Struct], type] = {}  # the dataclass of each form
_FORMS: dict[type, type[msgspec.Struct]] = {kind: _form_of(kind, kind.__name__) for kind in get_args(Message)}
_DECODER: msgspec.msgpack.Decoder[msgspec.Struct] = msgspec.msgpack.Decoder(_union(_FORMS.values()))


def encode(message: Message) -> bytes:
    """Returns the fields of a message, without its vector."""
    form = _FORMS[type(message)]
    return msgspec.msgpack.encode(form(**{name: getattr(message, name) for name in form.__struct_fields__}))


def decode(data: bytes, vector: Tensor | None) -> Message:
    """Returns the message of :func:`encode`, with its vector.

    Raises:
        ValueError: If ``data`` is not a message of these fields.
    """
    try:
        form = _DECODER.decode(data)
        message: Message = _filled(form, **({} if vector is None else {"vector": vector}))
        return message
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, TypeError) as error:
        raise ValueError(
            f"Not a message: {data[:80]!r}; do all processes run the same version of lightning-halos? ({error})"
        ) from None


def _filled(form: msgspec.Struct, **more: Tensor) -> Any:
    """Returns the dataclass of a form, with its values."""
    values = {name: getattr(form, name) for name in form.__struct_fields__}
    nested = {name: _filled(value) for name, value in values.items() if isinstance(value, msgspec.Struct)}
    return _KINDS[type(form)](**{**values, **nested, **more})


def vector_of(message: Message) -> Tensor | None:
    """The vector of a message, ``None`` if it has none."""
    return getattr(message, "vector", None)
