"""Finds averages of trainable parameters that a module keeps itself, such as teachers, by their values at the start.

A teacher starts as a copy of its student, whatever its class, names and structure are. Which copies are recognized by
their form, and what happens with them, is decided in ``buffers``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

_SAMPLE = 64  # elements by which equal tensors are found


def find_teachers(module: nn.Module, trained: Collection[int]) -> list[str]:
    """Returns the names of parameters and buffers that have all values of a trained parameter.

    One whose values are all the same, as biases have at first, counts only within a submodule with another copy and
    without trained parameters.

    Args:
        module: The module, before it is trained.
        trained: ``id`` of the parameters that optimizers have.
    """
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    students = [tensor for tensor in tensors.values() if id(tensor) in trained and is_plain(tensor)]
    forms = {_form(tensor) for tensor in students}
    others = {path: t for path, t in tensors.items() if id(t) not in trained and is_plain(t) and _form(t) in forms}
    if not others:
        return []
    alike: dict[bytes, list[Tensor]] = {}
    for student in students:
        alike.setdefault(_sample(student), []).append(student)
    equal = {path: t for path, t in others.items() if _is_equal_to_any(t, alike.get(_sample(t), []))}
    clear = [path for path, tensor in equal.items() if bool((tensor != tensor.reshape(-1)[0]).any())]
    students_at = [path for path, tensor in tensors.items() if id(tensor) in trained]
    return [path for path in equal if path in clear or _is_beside(path, clear, students_at)]


def is_plain(tensor: Tensor) -> bool:
    """Returns whether a tensor has its values in a block of memory, and is of no subclass, as quantized ones are."""
    is_own = type(tensor) in (Tensor, nn.Parameter)
    return is_own and tensor.layout is torch.strided and not tensor.is_meta and tensor.numel() > 0


def _is_beside(path: str, copies: Sequence[str], students: Sequence[str]) -> bool:
    """Whether the smallest submodule with this tensor and a copy has no trained parameter."""
    while path := path.rpartition(".")[0]:
        if any(copy.startswith(path + ".") for copy in copies):
            return not any(student.startswith(path + ".") for student in students)
    return False


def _form(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


@torch.no_grad()
def _sample(tensor: Tensor) -> bytes:
    flat = tensor.reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLE)]
    real = torch.view_as_real(sample.resolve_conj()) if sample.is_complex() else sample
    return real.double().cpu().numpy().tobytes()


def _is_equal_to_any(tensor: Tensor, students: Sequence[Tensor]) -> bool:
    return any(_form(tensor) == _form(s) and torch.equal(tensor, s.to(tensor.device)) for s in students)
