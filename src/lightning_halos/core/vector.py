"""The flat vector of a model that is sent: the trainable parameters, then what is averaged with them, teachers first.

Each process of a worker sends a slice of this canonical vector. This file deals with modules and tensors, not with
training. Which buffers and frozen parameters are averaged is decided in :mod:`.buffers`, and how torch divides a model
among processes in :mod:`.sharding`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_halos.core.buffers import ATTRIBUTE, find_entries
from lightning_halos.core.compat import add_each_, copy_each_, multiply_each_, reshard, subtract_each_
from lightning_halos.core.copies import Copies, Run, copies_of
from lightning_halos.core.frozen import FrozenParameters
from lightning_halos.core.layout import Layout
from lightning_halos.core.sharding import WorkerProcesses, find_shards, local
from lightning_halos.core.teachers import find_teachers

PART = 2**20
"""Elements per part. A part can be sent while the next one is computed, received while the previous one is applied."""

CHUNK = 2**16
"""Elements that a CPU computes at once, so that everything in between stays in its cache. It divides ``PART``."""

Advance = Callable[[int], None]
"""Called repeatedly with the number of complete elements of a vector, while it is filled from front to back."""

Fill = Callable[[Advance], object]
"""Fills a vector from front to back, and reports the number of its complete elements."""

_WRAPPED = "_fsdp_wrapped_module."  # FullyShardedDataParallel adds this to the names in a module


def ignore_progress(elements: int) -> None:
    """Ignores the number of complete elements."""


def in_parts(fill: Fill, size: int, use: Callable[[int, int], object]) -> Fill:
    """Returns a function that fills a vector, and uses each part of it before it reports the part.

    Args:
        fill: Fills the vector.
        size: Elements of the vector.
        use: Called with the first element of each part and the one behind it. All parts but the last have a multiple of
            ``PART`` elements.
    """

    def filled(advance: Advance) -> None:
        done = 0

        def progress(complete: int) -> None:
            nonlocal done
            complete = size if complete == size else complete // PART * PART
            if complete > done:
                use(done, complete)
                done = complete
                advance(done)

        fill(progress)
        progress(size)

    return filled


class ModelVector:
    """Converts between a module and its flat vector: one host tensor, first the parameters, then averaged tensors.

    The servers compute in ``float32``, or in ``float64`` if a trainable parameter is ``float64``. Tied parameters are
    sent once, complex parameters as pairs of real numbers.

    In a worker of several processes, the vector of each process is a slice of the canonical one: the process's shards,
    and an equal part of all parameters, and of all averaged tensors, that every process has completely. Then all
    processes of the worker must make the same calls in the same order.

    Args:
        module: The module. Its trainable parameters are those with ``requires_grad`` at this moment.
        all_parameters: Whether to send frozen parameters, too, for modules that are unfrozen during training.
        copies: Copies between the module and host memory. Default: chosen by the module's devices.
        idle: ``id`` of trainable parameters that no optimizer has.
        processes: The processes of the worker. Default: only this one.
        teachers: Names of copies of trainable parameters. Default: found by their present values.

    Attributes:
        teachers: Names of parameters and buffers that are averaged because of their values at the start.
        entries: The module's buffers and frozen parameters, and what happens with them.
        dtype: ``torch.float32`` or ``torch.float64``.
        shapes: Shapes of the parameters in the vector. Complex parameters have a last dimension of 2, and parts of
            parameters are flat.
        complete_shapes: Shapes of the parameters in the canonical vector.
        lossless: Whether the module holds its parameters and teachers in ``dtype``, so that :meth:`write` does not
            round.
        num_parameters: Elements of this process's vector that belong to parameters.
        num_teachers: Elements behind them of teachers: averaged tensors of which differences are sent.
        num_elements: Elements of this process's vector.
        shards: How those parameters are divided of which this process has only a part, by their ``id``.
        layout: Which part of the canonical vector each lane's vector is.
        is_alone: Whether the worker has no other processes.

    Raises:
        ValueError: If the module has no trainable parameter, its ``halos_buffers`` is invalid, or its parameters are
            divided among the worker's processes in a way that is not supported.
    """

    def __init__(
        self,
        module: nn.Module,
        all_parameters: bool = False,
        copies: Copies | None = None,
        idle: Collection[int] = (),
        processes: WorkerProcesses | None = None,
        teachers: Collection[str] | None = None,
    ) -> None:
        self._processes = WorkerProcesses() if processes is None else processes
        self.shards = shards = find_shards(self._processes.model)
        trainable = [p for p in module.parameters() if p.requires_grad or all_parameters]
        trained = {id(p) for p in trainable} - set(idle)
        self.teachers = find_teachers(module, trained) if teachers is None else list(teachers)
        self.entries = find_entries(module, {id(p) for p in trainable}, idle, self.teachers)
        others = {id(entry.tensor) for entry in self.entries if entry.is_parameter}
        self._parameters = [p for p in trainable if id(p) not in others]
        self._idle = idle
        self._frozen = FrozenParameters(self._parameters, self._sent_part, self._processes.any_of)
        means = [entry for entry in self.entries if entry.rule == "mean"]
        teachers_first = sorted(means, key=lambda entry: not entry.is_teacher)
        self._averaged = [(entry, entry.tensor.shape) for entry in teachers_first]
        if not self._parameters:
            raise ValueError(
                f"{type(module).__name__} has no parameter with requires_grad=True when training starts, so there is"
                " nothing to train. Make at least one parameter trainable before trainer.fit()."
            )
        self.dtype = torch.float64 if any(_real(p).dtype == torch.float64 for p in self._parameters) else torch.float32
        moving = [*self._parameters, *(entry.tensor for entry in means if entry.is_teacher)]
        self.lossless = all(_real(tensor).dtype == self.dtype for tensor in moving)
        held = [shards.get(id(tensor)) for tensor in self._tensors()]
        complete = [_real(t).shape if h is None else h.shape for t, h in zip(self._tensors(), held, strict=True)]
        sizes = [shape.numel() for shape in complete]
        pieces = {index: shard.sizes for index, shard in enumerate(held) if shard is not None}
        lane, lanes, number = self._processes.lane, self._processes.lanes, len(self._parameters)
        names = {id(tensor): name for name, tensor in module.named_parameters()}
        for tensor, shard in zip(self._tensors(), held, strict=True):
            if shard is not None and len(shard.sizes) != lanes:
                raise ValueError(
                    f"The parameter {names.get(id(tensor), 'of a submodule')} is divided among {len(shard.sizes)}"
                    f" process(es), but must be divided among all {lanes} processes of a worker, as"
                    " fully_shard(module, mesh=self.device_mesh['data_parallel']) does it, or be an ordinary tensor."
                )
        self.is_alone = lanes == 1 and self._processes.model is None
        self.layout = Layout.build(sizes, number, lanes, pieces)
        self.complete_shapes = complete[:number]
        self._are_shards = [shard is not None for shard in held]
        self._ranges = [
            (bounds[lane], bounds[lane + 1]) if lane < lanes else (bounds[-1], bounds[-1])
            for bounds in self.layout.bounds
        ]
        self._shapes = complete if self.is_alone else [torch.Size([stop - start]) for start, stop in self._ranges]
        self.shapes = self.complete_shapes if (lane, lanes) == (0, 1) else self._shapes[:number]
        self.num_parameters = sum(shape.numel() for shape in self.shapes)
        self.num_teachers = sum(shape.numel() for shape in self._shapes[number : len(moving)])
        self.num_elements = sum(shape.numel() for shape in self._shapes)
        self._complete_teachers = sum(shape.numel() for shape in complete[number : len(moving)])
        self._copies = copies or copies_of({local(tensor).device for tensor in self._tensors()})

    @property
    def identity(self) -> dict[str, Any]:
        """What another module's canonical vector must share to be compatible."""
        parameters = sum(shape.numel() for shape in self.complete_shapes)
        teachers = {"teachers": self._complete_teachers} if self._complete_teachers else {}
        return {"elements": self.layout.elements, "parameters": parameters, **teachers, "dtype": str(self.dtype)}

    def new(self) -> Tensor:
        """Returns an uninitialized vector on the host."""
        return torch.empty(self.num_elements, dtype=self.dtype)

    @torch.no_grad()
    def read(self, out: Tensor) -> Tensor:
        """Copies the module's values into ``out`` and returns it."""
        self._agree()
        for tensors, parts, _ in self._copies.to_host(self._runs(out)):
            copy_each_(parts, tensors)
        return out

    @torch.no_grad()
    def write(self, vector: Tensor, progress: Iterable[int] | None = None) -> None:
        """Copies the values of ``vector`` into the module.

        Parameters that were frozen during training keep their values, which replace those in ``vector``.
        ``progress`` yields the number of complete elements, while the vector is filled from front to back. Default: it
        is complete.
        """
        self._reshard()
        staged = self._staged()
        runs = self._runs(vector, staged)
        self._copies.to_device(runs if progress is None else _filled(runs, progress))
        self._share(staged)
        self._frozen.put_back(self._split(vector))

    def begin_batch(self) -> None:
        """Notices which parameters are frozen, after all hooks at the start of a batch."""
        self._frozen.begin_batch()

    def end_batch(self) -> None:
        """Decides which parameters the module has frozen, before a round may end with the batch."""
        self._frozen.end_batch()

    @torch.no_grad()
    def pseudo_gradient_(self, start: Tensor, advance: Advance = ignore_progress, end: Tensor | None = None) -> Tensor:
        """Turns the vector at the start of a round into the vector of its push, in place, and returns it.

        It then has start minus end for the parameters and teachers, and the present values of other averaged tensors.

        Args:
            start: The vector at the start of the round.
            advance: Called with the number of complete elements.
            end: Is overwritten with the module's present values. Default: these are not kept.
        """
        self._agree()
        self._frozen.end_round(self._split(start)[: len(self._parameters)])
        kept = iter(self._runs(end) if end is not None else ())
        for tensors, parts, stop in self._copies.to_host(self._runs(start)):
            for _, present, _ in itertools.islice(kept, 1):
                copy_each_(present, tensors)
            if stop <= self.num_parameters + self.num_teachers:
                subtract_each_(parts, _as_in(parts, tensors))
            else:
                copy_each_(parts, tensors)
            advance(stop)
        return start

    @torch.no_grad()
    def add_progress_(self, model: Tensor, pushed: Tensor) -> None:
        """Loads a model into a module that has been trained since the push that the model answers.

        All values become ``model + (present - pushed)``. Those of averaged tensors that are no teachers stay between
        the present values and the model's, so that a variance cannot become negative. If the sum has NaN or infinite
        values, it is replaced by the model.

        Args:
            model: The model. It becomes the vector that the next push is relative to: the module minus the progress
                since the push, which differs if parameters are frozen or rounded.
            pushed: The module's values at the push. It is overwritten.
        """
        self._agree()
        models = self._runs(model)
        for (tensors, parts, stop), (_, new, _) in zip(self._copies.to_host(self._runs(pushed)), models, strict=True):
            present = _as_in(parts, tensors)
            subtract_each_(parts, present)
            multiply_each_(parts, -1)
            add_each_(parts, new)
            if stop > self.num_parameters + self.num_teachers:
                for part, own, others in zip(parts, present, new, strict=True):
                    torch.clamp(part, torch.minimum(own, others), torch.maximum(own, others), out=part)
        is_finite = bool(torch.isfinite(pushed.sum())) or bool(torch.isfinite(pushed).all())  # a sum may overflow
        (is_broken,) = self._processes.any_of([not is_finite])
        if is_broken:
            pushed.copy_(model)
        self.write(pushed)
        self._frozen.put_back(self._split(model))
        if not self.lossless:
            model.add_(self.read(self.new())).sub_(pushed)

    def names(self, module: nn.Module) -> tuple[list[str], list[tuple[str, list[int]]]]:
        """Returns the names of the vector's parameters in ``module.state_dict()``, and names and shapes of the rest."""
        self._reshard()
        names: dict[int, str] = {}
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            names.setdefault(id(tensor), name.replace(_WRAPPED, ""))
        tensors = self._tensors()
        parameters = [names[id(tensor)] for tensor in tensors[: len(self._parameters)]]
        averaged = tensors[len(self._parameters) :]
        return parameters, [(names[id(tensor)], list(_real(tensor).shape)) for tensor in averaged]

    def newly_trainable(self, module: nn.Module) -> list[str]:
        """Names of the parameters of ``module`` that are trainable now but not part of the vector."""
        self._reshard()
        known = {*self._idle, *(id(p) for p in self._parameters)}
        return [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in known]

    def frozen_names(self, module: nn.Module) -> set[str]:
        """Names of the parameters of ``module`` that were frozen during training, each by its worker."""
        self._reshard()
        frozen = self._frozen.tensors
        return {name for name, parameter in module.named_parameters() if id(parameter) in frozen}

    def named_parts(self, module: nn.Module, vector: Tensor) -> dict[str, Tensor]:
        """Returns the parts of ``vector`` by their names in ``module.state_dict()``, including tied names.

        They have the dtypes of the module's tensors but are in host memory, from which a checkpoint is written. Only
        for a worker of one process, whose vector has complete parts.
        """
        assert self.is_alone, "the vector has parts of tensors"
        tensors = self._tensors()
        parts = {id(tensor): part for tensor, part in zip(tensors, self._split(vector), strict=True)}
        parts.update({key: _real(value).cpu() for key, value in self._frozen.tensors.items()})
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        return {name: _like(parts[id(tensor)], tensor) for name, tensor in named if id(tensor) in parts}

    def _tensors(self) -> list[Tensor]:
        averaged = []
        for entry, shape in self._averaged:
            tensor = entry.tensor
            if tensor.shape != shape:
                raise RuntimeError(
                    f"{entry.path} changed its shape from {list(shape)} to {list(tensor.shape)}, so it cannot be"
                    f" averaged with the other workers'. Set {ATTRIBUTE} = {{{entry.path!r}: 'first'}} in the module."
                )
            averaged.append(tensor)
        return [*self._parameters, *averaged]

    def _reshard(self) -> None:
        if self._processes.model is not None:
            reshard(self._processes.model)

    def _agree(self) -> None:
        """Gives all processes of the worker lane 0's averaged tensors, which may differ, as Lightning does."""
        self._reshard()
        if not self.is_alone:
            averaged = [*zip(self._tensors(), self._are_shards, strict=True)][len(self._parameters) :]
            self._processes.share_([_real(tensor) for tensor, is_shard in averaged if not is_shard], 0)

    def _staged(self) -> dict[int, Tensor]:
        """Returns memory for the tensors of which a part cannot be written, as they are not contiguous."""
        if self.is_alone:
            return {}
        tensors = enumerate(map(_real, self._tensors()))
        return {
            index: torch.empty(t.numel(), dtype=t.dtype, device=t.device)
            for index, t in tensors
            if not t.is_contiguous()
        }

    def _share(self, staged: dict[int, Tensor]) -> None:
        """Gives all processes of the worker what the others have written, of tensors that all have completely."""
        if self.is_alone:
            return
        tensors = [_real(tensor) for tensor in self._tensors()]
        for lane in range(self._processes.lanes):
            parts: list[Tensor] = []
            for index, (tensor, bounds) in enumerate(zip(tensors, self.layout.bounds, strict=True)):
                start, stop = bounds[lane], bounds[lane + 1]
                if start < stop and not self._are_shards[index]:
                    parts += torch.split(_flat(tensor, staged.get(index))[start:stop], PART)
            self._processes.share_(parts, lane)
        for index, flat in staged.items():
            tensors[index].copy_(flat.view(tensors[index].shape))

    def _runs(self, vector: Tensor, staged: dict[int, Tensor] | None = None) -> Iterator[Run]:
        """Divides the vector into runs of about ``PART`` elements. A run has only parameters, teachers, or others."""
        ends = (self.num_parameters, self.num_parameters + self.num_teachers, self.num_elements)
        tensors: list[Tensor] = []
        parts: list[Tensor] = []
        start = stop = 0
        for tensor, part in self._pairs(vector, staged or {}):
            tensors.append(tensor)
            parts.append(part)
            stop += part.numel()
            if stop - start >= PART or stop in ends:
                yield tensors, parts, stop
                tensors, parts, start = [], [], stop

    def _pairs(self, vector: Tensor, staged: dict[int, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of the module's tensors, of ``PART`` elements if possible, and their parts of the vector."""
        for index, (tensor, part) in enumerate(zip(map(_real, self._tensors()), self._split(vector), strict=True)):
            if self.is_alone:
                if tensor.numel() > PART and tensor.is_contiguous():
                    yield from zip(torch.split(tensor.view(-1), PART), torch.split(part.view(-1), PART), strict=True)
                else:
                    yield tensor, part
            elif part.numel():
                flat = self._in_range(index, _flat(tensor, staged.get(index)))
                yield from zip(torch.split(flat, PART), torch.split(part, PART), strict=True)

    def _split(self, vector: Tensor) -> list[Tensor]:
        parts = torch.split(vector, [shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _in_range(self, index: int, flat: Tensor) -> Tensor:
        """Returns the part that is sent of the flattened values that this process has of a tensor."""
        start, stop = self._ranges[index]
        return flat if self._are_shards[index] else flat[start:stop]

    def _sent_part(self, index: int, values: Tensor) -> Tensor:
        real = _real(values)
        return real if self.is_alone else self._in_range(index, real.reshape(-1))


def _as_in(parts: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns a module's tensors on the device and in the dtype of their parts of a vector."""
    return [tensor.to(part.device, part.dtype) for tensor, part in zip(tensors, parts, strict=True)]


def _flat(tensor: Tensor, staged: Tensor | None) -> Tensor:
    """Returns a tensor's values in a row: a view if it is contiguous, otherwise the memory for them, or a copy."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    return tensor.reshape(-1) if staged is None else staged


def _filled(runs: Iterable[Run], progress: Iterable[int]) -> Iterator[Run]:
    """Yields each run as soon as its parts of the vector are complete."""
    steps, complete = iter(progress), 0
    for run in runs:
        while complete < run[-1]:
            complete = next(steps)
        yield run


def _real(tensor: Tensor) -> Tensor:
    """Returns the values that this process has of a tensor, as real numbers."""
    values = local(tensor)
    return torch.view_as_real(values) if values.is_complex() else values


def _like(part: Tensor, tensor: Tensor) -> Tensor:
    """Returns a part in the dtype of a module's tensor."""
    if tensor.is_complex():
        return torch.view_as_complex(part.to(tensor.dtype.to_real(), copy=True))
    return part.to(tensor.dtype)
