"""The wire formats: what is lost, what is not, and what happens to values that are not ordinary numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_halos.core.quantization import BLOCK, FORMATS, Format, check_format, decode, encode, nbytes, round_

ROUNDED: list[Format] = ["bfloat16", "int8", "int4"]
BLOCKED: list[Format] = ["int8", "int4"]
LENGTHS = [0, 1, 63, 64, 65, 1000, 2**16 + 65]
LARGEST = torch.finfo(torch.float32).max


def there_and_back(vector: torch.Tensor, form: Format) -> torch.Tensor:
    out = torch.full_like(vector, 7.0)
    decode(encode(vector, form), out, form)
    return out


def numbers(length: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers of very different sizes."""
    generator = torch.Generator().manual_seed(length)
    return torch.randn(length, generator=generator, dtype=dtype) * torch.logspace(-6, 3, max(length, 1))[:length]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_vector_of_any_length_has_the_announced_bytes_and_comes_back(
    form: Format, length: int, dtype: torch.dtype
) -> None:
    vector = numbers(length, dtype)
    before = vector.clone()
    data = encode(vector, form)
    assert data.dtype == torch.uint8
    assert data.shape == (nbytes(length, form, vector.itemsize),)
    out = there_and_back(vector, form)
    assert torch.equal(vector, before)
    assert out.dtype == dtype
    if form == "float32":
        assert torch.equal(out, vector)
    elif form == "bfloat16":
        assert torch.equal(out, vector.bfloat16().to(dtype))


@pytest.mark.parametrize("form", ROUNDED)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_was_rounded_is_encoded_exactly_and_to_the_same_bytes(
    form: Format, length: int, dtype: torch.dtype
) -> None:
    vector = numbers(length, dtype)
    rounded = there_and_back(vector, form)
    assert torch.equal(encode(rounded, form), encode(vector, form))
    assert torch.equal(there_and_back(rounded, form).view(torch.uint8), rounded.view(torch.uint8))
    assert torch.equal(round_(vector.clone(), form).view(torch.uint8), rounded.view(torch.uint8)), "also the sign of 0"


@pytest.mark.parametrize(("form", "most"), [("int8", 127), ("int4", 7)])
def test_an_element_errs_by_at_most_half_a_step_of_its_block(form: Format, most: int) -> None:
    vector = numbers(100 * BLOCK)
    errors = (there_and_back(vector, form) - vector).view(-1, BLOCK).abs().amax(1)
    step = vector.view(-1, BLOCK).abs().amax(1) / most
    assert bool((errors <= 0.51 * step + 1e-30).all())


@pytest.mark.parametrize(("form", "bits"), [("bfloat16", 16), ("int8", 8.25), ("int4", 4.25)])
def test_the_bits_of_an_element(form: Format, bits: float) -> None:
    assert nbytes(64_000, form) * 8 / 64_000 == bits


@pytest.mark.parametrize("form", BLOCKED)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_block_that_is_not_finite_becomes_nan_and_the_others_stay(form: Format, wrong: float) -> None:
    vector = numbers(10 * BLOCK + 3)
    good = there_and_back(vector, form)
    vector[200] = wrong
    out = there_and_back(vector, form)
    block = slice(192, 256)
    assert bool(out[block].isnan().all())
    out[block] = good[block]
    assert torch.equal(out, good)
    assert torch.equal(encode(there_and_back(vector, form), form), encode(vector, form))
    assert torch.equal(round_(vector.clone(), form).isnan(), there_and_back(vector, form).isnan())


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_bfloat16_keeps_what_is_not_finite(wrong: float) -> None:
    vector = torch.tensor([1.0, wrong, LARGEST])
    out = there_and_back(vector, "bfloat16")
    assert torch.equal(out[:2], vector[:2]) or (math.isnan(wrong) and math.isnan(out[1]))
    assert math.isfinite(out[2])


@pytest.mark.parametrize("form", ROUNDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_and_tiny_numbers_stay_finite(form: Format, dtype: torch.dtype) -> None:
    tiny = torch.finfo(torch.float32).smallest_normal
    for value in [LARGEST, -LARGEST, tiny, tiny / 2, 1e-45, 0.0, 200 * tiny]:
        vector = torch.full((BLOCK + 1,), value, dtype=dtype)
        out = there_and_back(vector, form)
        assert bool(out.isfinite().all()), value
        assert torch.equal(encode(out, form), encode(vector, form)), value
        assert bool((out - vector).abs().max() <= max(abs(value) * 0.01, 127 * tiny)), value


@pytest.mark.parametrize("form", ROUNDED)
def test_numbers_beyond_float32_stay_finite(form: Format) -> None:
    out = there_and_back(torch.tensor([1e300, -1e300, 1.0], dtype=torch.float64), form)
    assert bool(out.isfinite().all())


@settings(max_examples=50)
@given(st.lists(st.floats(width=32), max_size=130), st.sampled_from(ROUNDED))
def test_any_numbers_keep_what_the_formats_promise(values: list[float], form: Format) -> None:
    vector = torch.tensor(values, dtype=torch.float32)
    out = there_and_back(vector, form)
    assert torch.equal(encode(out, form), encode(vector, form))
    assert torch.equal(round_(vector.clone(), form).nan_to_num(3.0), out.nan_to_num(3.0))
    for start in range(0, len(values), BLOCK):
        block = slice(start, start + BLOCK)
        if bool(vector[block].isfinite().all()):
            assert bool(out[block].isfinite().all())
        else:
            assert not bool(out[block].isfinite().all())


@pytest.mark.parametrize("value", ["int5", "FLOAT32", None, 8, ["int8"]])
def test_another_format_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"wire=.* must be one of 'float32', 'bfloat16', 'int8', 'int4'\."):
        check_format("wire", value)
