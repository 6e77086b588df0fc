"""An optimizer's step, divided into steps for consecutive pieces of a model, which threads can make at the same time.

It is for optimizers that compute each element of a parameter from that element alone. There are no threads here: who
makes the steps decides where they run. What a server does besides them is in ``parameter_server``.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_halos.core.delayed_nesterov import DelayedNesterov, update


class ParameterSpan(NamedTuple):
    """Elements of a parameter, in its flattened values."""

    parameter: int  # its number
    start: int
    stop: int


class Piece(NamedTuple):
    """Consecutive elements of a model: several complete parameters, or a span of a large one."""

    start: int
    stop: int
    spans: Sequence[ParameterSpan]


def divide(sizes: Sequence[int], elements: int) -> list[Piece]:
    """Divides consecutive parameters of these sizes into pieces of about as many elements."""
    pieces: list[Piece] = []
    spans: list[ParameterSpan] = []
    start = stop = 0

    def end_piece() -> None:
        nonlocal start, spans
        if spans:
            pieces.append(Piece(start, stop, spans))
        start, spans = stop, []

    for number, size in enumerate(sizes):
        if size > elements:
            end_piece()
        for begin in range(0, max(size, 1), elements):
            end = min(begin + elements, size)
            spans.append(ParameterSpan(number, begin, end))
            stop += end - begin
            if stop - start >= elements:
                end_piece()
    end_piece()
    return pieces


class DividedStep:
    """One step of an optimizer for all pieces of a model.

    Pieces are independent of each other: :meth:`step` may be called for several at the same time, each once. A large
    parameter that is divided has a state for each span meanwhile, which :meth:`end` joins. A piece that is the
    complete model may be stepped by any optimizer.

    Args:
        optimizer: The optimizer. Its groups and its state must not change otherwise until :meth:`end`.
        parameters: Its parameters, which are contiguous.
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        self._optimizer = optimizer
        self._parameters = parameters
        self._elements = sum(parameter.numel() for parameter in parameters)
        self._group_of = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        # The states of the spans of each divided parameter, by their first element.
        self._divided: dict[int, dict[int, dict[str, Any]]] = {}

    def step(self, piece: Piece, gradient: Tensor, touched: Collection[int] | None = None) -> None:
        """Makes the step for a piece.

        Args:
            piece: The piece.
            gradient: The gradient of its elements, flat.
            touched: Numbers of the parameters that have a gradient; the others are skipped. Default: all have one.
        """
        gradients = torch.split(gradient, [span.stop - span.start for span in piece.spans])
        if piece.stop - piece.start == self._elements and len(gradients) == len(self._parameters):
            self._step_all(gradients, touched)
            return
        if type(self._optimizer) is DelayedNesterov:
            self._update(piece, gradients, touched)
            return
        groups: list[list[nn.Parameter]] = [[] for _ in self._optimizer.param_groups]
        states: dict[Tensor, dict[str, Any]] = {}
        complete_ones = []
        for span, values in zip(piece.spans, gradients, strict=True):
            if touched is not None and span.parameter not in touched:
                continue
            own = complete = self._parameters[span.parameter]
            if span.stop - span.start < complete.numel():
                own = nn.Parameter(complete.detach().view(-1)[span.start : span.stop])
                states[own] = self._spans_of(span.parameter)[span.start] = self._state_of(span)
            else:
                states[own] = self._optimizer.state.get(own, {})
                complete_ones.append(own)
            own.grad = values.view_as(own)
            groups[self._group_of[id(complete)]].append(own)
        optimizer = copy.copy(self._optimizer)
        optimizer.state = defaultdict(dict, states)
        optimizer.param_groups = [
            {**group, "params": own} for group, own in zip(self._optimizer.param_groups, groups, strict=True)
        ]
        optimizer.step()
        for tensor in states:
            tensor.grad = None
        for parameter in complete_ones:  # an optimizer without a state keeps none
            if states[parameter]:
                self._optimizer.state[parameter] = states[parameter]

    def _update(self, piece: Piece, gradients: Sequence[Tensor], touched: Collection[int] | None) -> None:
        """Does the same without the call of an optimizer, which is dear for a small piece."""
        for number, group in enumerate(self._optimizer.param_groups):
            parameters: list[Tensor] = []
            own_gradients: list[Tensor] = []
            states: list[dict[str, Any]] = []
            for span, values in zip(piece.spans, gradients, strict=True):
                complete = self._parameters[span.parameter]
                if self._group_of[id(complete)] != number or (touched is not None and span.parameter not in touched):
                    continue
                if span.stop - span.start < complete.numel():
                    own = complete.detach().view(-1)[span.start : span.stop]
                    state = self._spans_of(span.parameter)[span.start] = self._state_of(span)
                else:
                    own, state = complete.detach(), self._optimizer.state[complete]
                parameters.append(own)
                own_gradients.append(values.view_as(own))
                states.append(state)
            update(parameters, own_gradients, states, group)

    def _step_all(self, gradients: Sequence[Tensor], touched: Collection[int] | None) -> None:
        for number, (parameter, values) in enumerate(zip(self._parameters, gradients, strict=True)):
            parameter.grad = values.view_as(parameter) if touched is None or number in touched else None
        self._optimizer.step()
        for parameter in self._parameters:
            parameter.grad = None

    def end(self) -> None:
        """Completes the step, after those of all pieces."""
        for number, divided in self._divided.items():
            parameter = self._parameters[number]
            states = [divided[start] for start in sorted(divided)]
            state = self._optimizer.state[parameter] if states[0] else {}
            for name, value in states[0].items():
                if not isinstance(value, Tensor):
                    state[name] = value
                elif state.get(name) is None:  # it is new; otherwise those of the spans are views of its memory
                    state[name] = torch.cat([own[name] for own in states]).view_as(parameter)

    def _spans_of(self, number: int) -> dict[int, dict[str, Any]]:
        """Returns the states of the spans of a parameter, in whichever thread is the first to have one."""
        return self._divided.setdefault(number, {})

    def _state_of(self, span: ParameterSpan) -> dict[str, Any]:
        state = self._optimizer.state.get(self._parameters[span.parameter], {})
        return {
            name: value.view(-1)[span.start : span.stop] if isinstance(value, Tensor) else value
            for name, value in state.items()
        }
