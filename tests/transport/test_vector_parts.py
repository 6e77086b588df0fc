"""Vectors in a narrow format on every kind of link: exact, of few bytes, and only as this link announces them."""

from __future__ import annotations

import time
import weakref

import pytest
import torch
from torch import Tensor

from lightning_halos.core.messages import GlobalModel, Pull, Push
from lightning_halos.core.quantization import Format, nbytes, round_
from lightning_halos.core.vector import PART, Advance
from lightning_halos.transport.frames import PROTOCOL
from lightning_halos.transport.vector_parts import Part, VectorForm, code_of
from tests.transport.ends import End, GlooWire, Wire, groups

QUIET = 60.0  # seconds of silence; signs of life, which are bytes, too, are rare then
PARAMETERS = PART + 70
ELEMENTS = PARAMETERS + 5


@pytest.mark.parametrize(("form", "dtype"), [("bfloat16", "float32"), ("int8", "float64"), ("int4", "float32")])
def test_rounded_vectors_arrive_exactly_in_few_bytes_and_others_complete(wire: Wire, form: Format, dtype: str) -> None:
    kind = VectorForm(ELEMENTS, getattr(torch, dtype), form, PARAMETERS)
    a = End(wire.link(0, "b", QUIET, kind), QUIET).start()
    b = End(wire.link(1, "a", QUIET, kind), QUIET).start()
    torch.manual_seed(0)
    values = torch.randn(ELEMENTS, dtype=kind.dtype)
    rounded = values.clone()
    for start in range(0, PARAMETERS, PART):
        round_(rounded[start : min(start + PART, PARAMETERS)], form)
    vector = torch.empty_like(values)

    def fill(advance: Advance) -> None:
        for stop in (PART, ELEMENTS):
            vector[:stop] = rounded[:stop]
            advance(stop)

    before = b.link.bytes_received
    a.link.post(Push(0, 0, 1, 1, 1.0, vector=vector), fill)
    a.link.post(Pull(0, 1, 1, False, vector=rounded, is_difference=True))
    b.wait_for(2)
    carried = b.link.bytes_received - before
    payload = 2 * (nbytes(PART, form) + nbytes(PARAMETERS - PART, form) + 5 * kind.dtype.itemsize)
    assert payload <= carried < payload + 6000
    a.link.post(Push(0, 0, 1, 1, 1.0, final=True, vector=values))
    a.link.post(GlobalModel(1, vector=values))
    messages = b.wait_for(4)
    for message, expected in zip(messages, [rounded, rounded, values, values], strict=True):
        assert torch.equal(message.vector.view(torch.uint8), expected.view(torch.uint8))


def test_the_memory_of_each_part_is_freed_when_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch, nothing_is_left: None
) -> None:
    """Over gloo, where all of it is there from the start, because each part has to be received into its own."""
    decode, earlier, alive = Part.decode, list[weakref.ref[Tensor]](), list[int]()

    def recorded(part: Part, data: Tensor, vector: Tensor, form: Format) -> None:
        alive.append(sum(own() is not None for own in earlier))
        earlier.append(weakref.ref(data))
        decode(part, data, vector, form)

    monkeypatch.setattr(Part, "decode", recorded)
    kind = VectorForm(4 * PART, torch.float32, "int4", 4 * PART)
    with groups() as processes:
        wire = GlooWire(processes)
        a, b = (End(wire.link(end, "the other", form=kind)).start() for end in (0, 1))
        a.link.post(Push(0, 0, 1, 1, 1.0, vector=torch.zeros(4 * PART)))
        b.wait_for(1)
        wire.close()
    assert alive == [0, 0, 0, 0]


def test_a_format_that_the_link_does_not_have_is_refused(wire: Wire) -> None:
    b = End(wire.link(1, "a", form=VectorForm(ELEMENTS, torch.float32, "int8", PARAMETERS))).start()
    wire.send_header(0, -3, PROTOCOL, 0)
    wire.send_header(0, 10, ELEMENTS, code_of(torch.float32, "int4"))
    deadline = time.monotonic() + 60
    while b.failure is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert f"{ELEMENTS} elements (format {code_of(torch.float32, 'int4')})" in str(b.failure)
    assert f"{ELEMENTS} elements (format 0 or {code_of(torch.float32, 'int8')})" in str(b.failure)
