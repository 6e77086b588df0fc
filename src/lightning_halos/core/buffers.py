"""Decides which buffers and frozen parameters of a module are averaged with the model, and which are a worker's own.

An average is right only for a mean, such as a running statistic. The average of queues, pointers, codebooks or
random states means nothing. So everything is a worker's own unless it is known to be a mean, or a module says
otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lightning_halos.core.compat import COMPILED

Rule = Literal["mean", "first", "local"]
"""What happens with a tensor that no optimizer changes.

``"mean"``: it is sent and averaged with the model. ``"first"``: each worker has its own during training, and rank 0's
afterwards. ``"local"``: each worker keeps its own.
"""

ATTRIBUTE = "halos_buffers"
"""Attribute in which a module names rules of its own, as ``{"queue": "local", "teacher": "mean"}``."""


class Entry(NamedTuple):
    """A buffer or a frozen parameter."""

    path: str  # its name in the complete module
    owner: nn.Module  # the module that has it
    name: str  # its name in `owner`
    rule: Rule
    is_parameter: bool
    is_asked: bool  # whether the module names the rule
    is_teacher: bool = False  # whether it is a mean of weights, which are sent as differences

    @property
    def tensor(self) -> Tensor:
        """Its present tensor. A module may replace the tensor of a buffer, so it is found by its name."""
        tensor: Tensor = getattr(self.owner, self.name)
        return tensor


def find_entries(
    module: nn.Module, trainable: Collection[int], idle: Collection[int] = (), teachers: Collection[str] = ()
) -> list[Entry]:
    """Returns all buffers and frozen parameters of a module, with their rules.

    A buffer is a mean if its name starts with ``running_``, as the statistics of all of torch's normalization layers. A
    frozen parameter is a mean if it is part of a copy of a trainable part: a teacher or target network, which the
    module itself updates. So is everything that was found by its values. A tensor with infinite or NaN values at the
    start is taken for a constant.

    Args:
        module: The module.
        trainable: ``id`` of the trainable parameters.
        idle: ``id`` of those that no optimizer has. They count as frozen if they are part of a copy.
        teachers: Names of copies that were found by their values.

    Raises:
        ValueError: If a module's ``halos_buffers`` is invalid.
    """
    asked, copies, used = list(_asked(module)), _copies_of_trainable_parts(module, idle), set[str]()
    parameters = module.named_parameters(remove_duplicate=False)
    known = {path.replace(COMPILED, "") for path in teachers}

    def is_known(path: str) -> bool:
        return path.replace(COMPILED, "") in known

    def is_copy(path: str) -> bool:
        return is_known(path) or any(_is_in(path, copy) for copy in copies)

    seen = set(trainable) - {id(p) for path, p in parameters if id(p) in idle and is_copy(path)}
    entries = []
    for path, owner, name, tensor in _tensors(module):
        is_parameter = isinstance(tensor, nn.Parameter)
        if is_parameter and id(tensor) in seen:
            continue
        seen.add(id(tensor))
        key, rule = _asked_for(path, asked)
        used.add(key)
        can_be_mean = tensor.layout is torch.strided and (tensor.is_floating_point() or tensor.is_complex())
        if rule == "mean" and not can_be_mean:
            raise ValueError(
                f"{ATTRIBUTE} has {key!r}: 'mean', but {path!r} is a {tensor.layout} tensor of {tensor.dtype}, which"
                " cannot be averaged. Use 'first' (rank 0's after training) or 'local' (each worker's own)."
            )
        if rule is None:
            is_mean = is_copy(path) if is_parameter else name.startswith("running_") or is_known(path)
            rule = "mean" if is_mean and can_be_mean and bool(torch.isfinite(tensor).all()) else "first"
        is_weight = is_parameter or is_copy(path)
        is_teacher = rule == "mean" and is_weight and not name.startswith("running_")
        entries.append(Entry(path, owner, name, rule, is_parameter, key != "", is_teacher))
    if unknown := [key for key, _ in asked if key not in used]:
        raise ValueError(
            f"{ATTRIBUTE} has {unknown}, but {type(module).__name__} has no such buffers or frozen parameters. It has"
            f" {summary(entry.path for entry in entries) or 'none'}."
        )
    return entries


def local_tensors(module: nn.Module) -> list[Tensor]:
    """Returns the buffers and frozen parameters that modules want each worker to keep.

    Raises:
        ValueError: If a module's ``halos_buffers`` is invalid.
    """
    asked, local, seen = list(_asked(module)), list[Tensor](), set[int]()
    for path, _, _, tensor in _tensors(module):
        if id(tensor) not in seen and not tensor.requires_grad and _asked_for(path, asked)[1] == "local":
            local.append(tensor)
        seen.add(id(tensor))
    return local


def summary(names: Iterable[str], most: int = 8) -> str:
    """Returns a list of names for a message, with at most this many names."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _tensors(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    for prefix, owner in module.named_modules():
        for name, tensor in [*owner.named_buffers(recurse=False), *owner.named_parameters(recurse=False)]:
            yield _join(prefix, name), owner, name, tensor


def _asked(module: nn.Module) -> Iterator[tuple[str, Rule]]:
    """Yields the names and rules of all modules' ``halos_buffers``: first the outer modules', then the longer names."""
    for prefix, owner in module.named_modules():
        # Only its own: wrappers such as those of torch.compile have all attributes of the module in them.
        has_rules = ATTRIBUTE in vars(owner) or hasattr(type(owner), ATTRIBUTE)
        rules = getattr(owner, ATTRIBUTE) if has_rules else {}
        if not isinstance(rules, Mapping) or any(rule not in get_args(Rule) for rule in rules.values()):
            raise ValueError(
                f"{type(owner).__name__}.{ATTRIBUTE}={rules!r} must be a dict from names of buffers, frozen parameters"
                f" or submodules to one of {get_args(Rule)}."
            )
        for name in sorted(rules, key=len, reverse=True):
            yield _join(prefix, name), rules[name]


def _asked_for(path: str, asked: Iterable[tuple[str, Rule]]) -> tuple[str, Rule | None]:
    """Returns the name and rule that decide about a tensor; ``("", None)`` if no module asks for anything."""
    path = path.replace(COMPILED, "")
    return next(((key, rule) for key, rule in asked if _is_in(path, key.replace(COMPILED, ""))), ("", None))


def _copies_of_trainable_parts(module: nn.Module, idle: Collection[int]) -> list[str]:
    """Returns the names of submodules that no optimizer changes and that have a trainable submodule of their form.

    Of nested ones it returns the largest. A copy may be wrapped, as in torch's ``AveragedModel``. Blocks in a list are
    no copies of each other, although some may be frozen.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    shapes = {name: p.shape for name, p in parameters.items()}
    trainable = [name.split(".") for name, p in parameters.items() if p.requires_grad and id(p) not in idle]
    modules = dict(module.named_modules(remove_duplicate=False))
    parts = {".".join(name[:length]) for name in trainable for length in range(len(name))}

    def is_copy(name: str, inner: list[str]) -> bool:
        return any(
            type(modules[part]) is type(modules[name])
            and all(shapes.get(_join(part, rest)) == shapes[_join(name, rest)] for rest in inner)
            for part in parts
        )

    def search(name: str) -> Iterator[str]:
        children = [_join(name, child) for child, _ in modules[name].named_children() if not child.isdigit()]
        inner = [parameter[len(name) + 1 :] for parameter in shapes if name and _is_in(parameter, name)]
        if inner and name not in parts and is_copy(name, inner):
            yield name
        elif not inner or name in parts or len(children) == 1:
            for child in children:
                yield from search(child)

    return list(search(""))


def _is_in(path: str, prefix: str) -> bool:
    return not prefix or path == prefix or path.startswith(prefix + ".")


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
