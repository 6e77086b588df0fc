"""Copies through pinned memory, on a device whose queues do nothing until somebody waits for them."""

import weakref
from functools import partial

import pytest
import torch
from torch import nn

from lightning_halos.core.copies import Copies, StagedCopies, copies_of
from lightning_halos.core.vector import ModelVector

PART = 64


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr("lightning_halos.core.vector.PART", PART)


class LazyStream:
    """Copies happen when somebody waits for them, so that who uses memory too early, or fills it too early, is found.

    Attributes:
        computations: The device's queue of computations.
        buffers: The pinned memory that was asked for.
        log: What happened, in order.
    """

    def __init__(self):
        self.computations = []
        self.buffers = []
        self.log = []
        self._copies = []

    def buffer(self, size):
        self.buffers.append(torch.full((size,), 255, dtype=torch.uint8))  # NaN in every floating-point dtype
        return self.buffers[-1]

    def begin(self):
        self._copies += self.computations  # which the first copy waits for
        self.computations = []

    def copy(self, targets, sources):
        self.log.append("queue")
        held = map(self._held, sources)
        self._copies += [lambda t=t, source=source: t.copy_(source()) for t, source in zip(targets, held, strict=True)]
        queued = self._copies[:]

        def wait():
            self.log.append("wait")
            self._run(queued)

        return wait

    def end(self):
        self.log.append("end")
        self._run(self._copies[:])

    def _held(self, source):
        """A device's memory that nobody holds any more is used again, before the queued copy from there."""
        memory = source.untyped_storage().data_ptr()
        is_pinned = memory in [buffer.untyped_storage().data_ptr() for buffer in self.buffers]
        return (lambda: source) if is_pinned else weakref.ref(source)

    def _run(self, work):
        for do in work:
            if do in self._copies:
                self._copies.remove(do)
                with torch.no_grad():
                    do()


class Mixed(nn.Module):
    """Parameters of several sizes, dtypes and memory formats, an empty one and a scalar; and a buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.large = nn.Parameter(torch.randn(2 * PART + 5))
        self.scalar = nn.Parameter(torch.tensor(3.0))
        self.empty = nn.Parameter(torch.randn(0, 4))
        self.short = nn.Parameter(torch.randn(7, 3).bfloat16())
        self.conv = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        self.many = nn.ParameterList(torch.randn(PART // 3) for _ in range(4))
        self.complex = nn.Parameter(torch.randn(5, dtype=torch.complex64))
        self.register_buffer("mean", torch.randn(PART + 1))


def both(staged_copies):
    """The same module twice, with vectors that copy at once and through pinned memory."""
    modules = Mixed(), Mixed()
    return modules, [ModelVector(modules[0]), ModelVector(modules[1], copies=staged_copies)]


@pytest.fixture
def stream():
    return LazyStream()


def test_reading_gives_the_same_bits_as_direct_copies(stream):
    _, (direct, staged) = both(StagedCopies(stream))
    assert torch.equal(staged.read(staged.new()), direct.read(direct.new()))


def test_the_pseudo_gradient_is_the_same_bit_for_bit_and_reported_in_the_same_steps(stream):
    _, (direct, staged) = both(StagedCopies(stream))
    start = torch.randn(direct.num_elements)
    reached = [], []
    expected = direct.pseudo_gradient_(start.clone(), reached[0].append)
    assert torch.equal(staged.pseudo_gradient_(start.clone(), reached[1].append), expected)
    assert reached[0] == reached[1]
    assert reached[0][-1] == direct.num_elements


def test_writing_gives_the_same_bits_as_direct_copies(stream):
    modules, (direct, staged) = both(StagedCopies(stream))
    values = torch.randn(direct.num_elements)
    direct.write(values)
    staged.write(values, progress=[*range(0, direct.num_elements, PART // 2), direct.num_elements])
    states = [module.state_dict() for module in modules]
    for name, tensor in states[0].items():
        assert torch.equal(states[1][name], tensor), name


def test_slots_are_used_again_and_again_in_both_directions(stream):
    _, (direct, staged) = both(StagedCopies(stream))
    for round_ in range(3):
        values = torch.full((direct.num_elements,), float(round_))
        direct.write(values)
        staged.write(values)
        assert torch.equal(staged.read(staged.new()), direct.read(direct.new()))


def test_only_two_slots_of_memory_are_kept_however_large_the_module(stream):
    copies = StagedCopies(stream)
    vector = ModelVector(nn.Linear(16, 32), copies=copies)
    for _ in range(2):
        vector.write(vector.read(vector.new()))
    assert [buffer.numel() for buffer in stream.buffers] == [4 * PART, 4 * PART]


def test_one_run_is_copied_while_the_run_before_is_used(stream):
    vector = ModelVector(nn.Linear(PART, 4, bias=False), copies=StagedCopies(stream))
    vector.pseudo_gradient_(vector.new(), lambda elements: stream.log.append("use"))
    steps = [entry for entry in stream.log if entry != "wait"]
    assert steps == ["queue", "queue", "use", "queue", "use", "queue", "use", "use"]


def test_values_are_those_after_the_computations_that_were_queued_before(stream):
    module = nn.Linear(2, 2, bias=False)
    vector = ModelVector(module, copies=StagedCopies(stream))
    stream.computations.append(lambda: module.weight.fill_(7.0))
    assert vector.read(vector.new()).tolist() == [7.0] * 4


def test_a_run_that_is_computed_when_it_is_requested_is_copied_afterwards(stream):
    """As of a tensor that is not contiguous, whose values in a row a worker of several processes computes there."""

    def runs():
        for value in range(4):
            tensor = torch.zeros(2)
            stream.computations.append(partial(tensor.fill_, value))
            yield [tensor], [torch.empty(2)], 2 * value

    copied = [tensors[0].tolist() for tensors, _, _ in StagedCopies(stream).to_host(runs())]
    assert copied == [[value] * 2 for value in range(4)]


def test_computations_afterwards_wait_for_what_was_written_also_when_the_rest_does_not_come(stream):
    module = nn.Linear(PART, 4, bias=False)
    vector = ModelVector(module, copies=StagedCopies(stream))

    def progress():
        yield PART
        raise ConnectionError

    with pytest.raises(ConnectionError):
        vector.write(torch.full_like(vector.new(), 7.0), progress())
    assert stream.log[-1] == "end"
    assert torch.equal(module.weight.flatten()[:PART], torch.full((PART,), 7.0))


def test_memory_first_used_in_a_validation_can_be_used_in_training(stream):
    module = nn.Linear(2, 2)
    vector = ModelVector(module, copies=StagedCopies(stream))
    with torch.inference_mode():
        kept = vector.read(vector.new())
        vector.write(torch.zeros_like(kept))
        vector.write(kept)
    vector.write(kept + 1)
    assert torch.equal(vector.read(vector.new()), kept + 1)


def test_copies_are_direct_where_there_is_no_single_gpu():
    assert isinstance(copies_of({torch.device("cpu")}), Copies)
    assert isinstance(copies_of({torch.device("meta")}), Copies)
    assert isinstance(copies_of({torch.device("cuda:0"), torch.device("cuda:1")}), Copies)
    assert isinstance(copies_of({torch.device("cpu"), torch.device("cuda:0")}), Copies)
