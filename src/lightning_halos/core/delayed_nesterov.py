"""The server optimizer of HALoS.

It turns gradients into new parameters, in place. Computing, averaging and sending the gradients is decided elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_halos.core.checks import is_number
from lightning_halos.core.compat import add_each_, multiply_each_, zero_each_

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]

# Elements of a large CPU tensor that are processed at a time: few enough to stay in the cores' caches between the
# elementwise operations of an update, and enough to be worth a call and to be shared among threads.
_BLOCK = 262144


class DelayedNesterov(Optimizer):
    """Nesterov momentum that is refreshed only once per `delay` updates.

    Asynchronous workers deliver stale gradients one by one; momentum on each of them amplifies the staleness. So
    every gradient moves the parameters at once, but the momentum is computed from the mean of `delay` gradients. With
    ``d`` = `delay`, ``beta`` = `momentum`, ``c`` = `activation` and ``g_t`` the gradient of update ``t`` = 0, 1, ... of
    a parameter ``p``, where ``m`` and ``Delta`` start at 0::

        every update        Delta <- Delta + g_t
        (t + 1) % d != 0    p <- p - lr * d * (c * beta * m + g_t / d)
        (t + 1) % d == 0    m <- beta * m + Delta / d
                            p <- p - lr * d * ((1 - c * d + c) * beta * m + g_t / d)
                            Delta <- 0

    `lr` is the effective rate of a single update: the rate of the paper and of its published implementation is
    ``lr * delay``. With ``delay=1`` this is ``torch.optim.SGD(nesterov=True)``, whatever the activation.

    Every update is in place and touches each element in main memory once, even in a very large contiguous parameter.
    The state of a parameter has its own update count ``"step"`` (an int, so that no device is waited for) and, unless
    the momentum is 0, ``"momentum"``, with the shape, dtype and device of the parameter. With an activation of 0 the
    momentum is not used inside a window, so each gradient is added to it at once, without a second buffer: in the
    window's first update ``m <- beta * m + g_t / d``, then ``m <- m + g_t / d``. Otherwise the state also has
    ``"delta"``. A parameter without a gradient is skipped, and its count and window do not change.

    `lr` may change between any two updates; the other values only while every window is complete
    (``step % delay == 0``).

    Source: Liu et al., "Asynchronous Local-SGD Training for Language Modeling", arXiv 2401.09135, algorithm "Delayed
    Nesterov Update"; used as server optimizer by HALoS, arXiv 2506.04531.

    Args:
        params: Parameters, or groups of them as dicts with their own `lr`, `momentum`, `delay` or `activation`. Any
            shape and floating dtype; gradients must be dense.
        lr: Effective learning rate of one update, finite and >= 0.
        momentum: Decay of the momentum per window, in [0, 1).
        delay: Number of updates in a window, an int >= 1.
        activation: Part of the momentum that each update before the last of a window applies, in [0, 1 / delay]. 0
            leaves all of it to the last update, 1 / delay spreads it evenly.

    Raises:
        ValueError: If a value is outside of these ranges, here or in :meth:`add_param_group`.
    """

    def __init__(
        self, params: ParamsT, lr: float = 0.2, momentum: float = 0.9, delay: int = 16, activation: float = 0.0
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "delay": delay, "activation": activation}
        _refuse_bad_values(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters. Missing values default to those of the constructor.

        Raises:
            ValueError: If a value is out of range. Then no group is added.
        """
        _refuse_bad_values({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Apply one update to every parameter that has a gradient.

        Args:
            closure: Recomputes the loss and the gradients first; called with gradients enabled.

        Returns:
            The return value of the closure, or None without one.

        Raises:
            RuntimeError: If a gradient is sparse. Then no parameter is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if p.grad.layout is not torch.strided:
                raise RuntimeError(
                    f"DelayedNesterov needs dense gradients, but a parameter of shape {tuple(p.shape)} has one of "
                    f"layout {p.grad.layout}; use grad.to_dense(), or sparse=False in the embedding"
                )
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            update(trained, [p.grad for p in trained], [self.state[p] for p in trained], group)
        return loss

    def restart_windows(self) -> None:
        """Start a new window with the next update. The momentum does not change."""
        for state in self.state.values():
            state["step"] = 0
            if "delta" in state:
                state["delta"].zero_()


def update(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], states: Sequence[dict[str, Any]], group: dict[str, Any]
) -> None:
    """Apply one update of :class:`DelayedNesterov` to tensors that need no gradient now.

    Threads may do so at the same time for other tensors.

    Args:
        parameters: The tensors.
        gradients: Their gradients.
        states: Their states, which are changed.
        group: The values of their group.
    """
    alike: dict[tuple[int, bool, bool], list[int]] = {}
    for index, state in enumerate(states):
        alike.setdefault(_count(state, group), []).append(index)
    for kind, indices in alike.items():
        ps, gs, own = [parameters[i] for i in indices], [gradients[i] for i in indices], [states[i] for i in indices]
        _update(ps, gs, own, group, *kind)


def _count(state: dict[str, Any], group: dict[str, Any]) -> tuple[int, bool, bool]:
    """Count an update. Return its number in the window, and whether it needs a momentum and a delta."""
    count = state.get("step", 0)
    state["step"] = count + 1
    with_momentum = group["momentum"] != 0 or "momentum" in state
    with_delta = group["delay"] > 1 and (group["activation"] != 0 or "delta" in state)
    return count % group["delay"], with_momentum, with_delta


def _update(
    parameters: list[Tensor],
    gradients: list[Tensor],
    states: list[dict[str, Any]],
    group: dict[str, Any],
    phase: int,
    with_momentum: bool,
    with_delta: bool,
) -> None:
    lr, beta, d, c = group["lr"], group["momentum"], group["delay"], group["activation"]
    completes = phase == d - 1
    lists = [parameters, gradients]
    if not with_momentum:
        for ps, gs in _blocks(*lists):
            add_each_(ps, gs, alpha=-lr)
        return

    lists.append(_buffers(parameters, states, "momentum"))
    if not with_delta:
        for ps, gs, ms in _blocks(*lists):
            if phase == 0:
                multiply_each_(ms, beta)
            add_each_(ms, gs, alpha=1 / d)
            add_each_(ps, gs, alpha=-lr)
            if completes:
                add_each_(ps, ms, alpha=-lr * d * beta)
        return

    lists.append(_buffers(parameters, states, "delta"))
    share = beta * (1 - c * d + c if completes else c)
    for ps, gs, ms, deltas in _blocks(*lists):
        add_each_(deltas, gs)
        if completes:
            multiply_each_(ms, beta)
            add_each_(ms, deltas, alpha=1 / d)
            zero_each_(deltas)
        add_each_(ps, ms, alpha=-lr * d * share)
        add_each_(ps, gs, alpha=-lr)


def _buffers(parameters: list[Tensor], states: list[dict[str, Any]], name: str) -> list[Tensor]:
    """Return the named buffers of parameters, which are created on first use."""
    for p, state in zip(parameters, states, strict=True):
        if name not in state:
            state[name] = torch.zeros_like(p)
    return [state[name] for state in states]


def _blocks(*lists: list[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Divide lists of CPU tensors of the same sizes into blocks of about ``_BLOCK`` elements."""
    if any(t.device.type != "cpu" for tensors in lists for t in tensors):
        yield lists
        return
    block, elements = [], 0
    for tensors in zip(*lists, strict=True):
        for pieces in _pieces(tensors):
            block.append(pieces)
            elements += pieces[0].numel()
            if elements >= _BLOCK:
                yield tuple(map(list, zip(*block, strict=True)))
                block, elements = [], 0
    if block:
        yield tuple(map(list, zip(*block, strict=True)))


def _pieces(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Divide tensors of the same size into pieces of ``_BLOCK`` elements, if they are contiguous."""
    if tensors[0].numel() <= _BLOCK or not all(t.is_contiguous() for t in tensors):
        return iter([tensors])
    return zip(*(torch.split(t.view(-1), _BLOCK) for t in tensors), strict=True)


def _refuse_bad_values(group: dict[str, Any]) -> None:
    def refuse_unless(good: bool, name: str, wanted: str) -> None:
        if not good:
            raise ValueError(f"{name} must be {wanted}, got {group[name]!r}")

    # Comparisons with NaN are false, so NaN is refused everywhere. Tensors are no numbers: to read one would sync.
    lr, momentum, delay, activation = (group[name] for name in ("lr", "momentum", "delay", "activation"))
    refuse_unless(is_number(lr) and 0 <= lr < math.inf, "lr", "a finite number >= 0")
    refuse_unless(is_number(momentum) and 0 <= momentum < 1, "momentum", "a number in [0, 1)")
    refuse_unless(is_number(delay) and isinstance(delay, int) and delay >= 1, "delay", "an int >= 1")
    wanted = f"a number in [0, 1/delay] = [0, {1 / delay:g}]"
    refuse_unless(is_number(activation) and 0 <= activation <= 1 / delay, "activation", wanted)
