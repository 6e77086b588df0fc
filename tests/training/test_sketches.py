"""Which workers' samples count as different: samples at the same index of datasets that are divided by rank, only."""

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from lightning_halos.training import sketches as module
from lightning_halos.training.sketches import all_differ, all_equal, sketches

PRIVATE = np.random.default_rng()  # other numbers in every process that imports this


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy this machine is."""
    monkeypatch.setattr(module, "SECONDS", 60.0)


class Opaque(Dataset[Any]):
    """Has no data in its attributes, as if it read files."""

    def __init__(self, read: Callable[[int], Any], length: Any = 24) -> None:
        self.read = read
        self.length = length
        self.reads = 0

    def __len__(self) -> int:
        return self.length() if callable(self.length) else int(self.length)

    def __getitem__(self, index: int) -> Any:
        assert index in range(len(self))
        self.reads += 1
        return self.read(index)


def sample(index: int) -> torch.Tensor:
    return torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(index))


@dataclass
class Pair:
    input: torch.Tensor
    label: int


FORMS: dict[str, Callable[[int], Any]] = {
    "a tensor": sample,
    "an array": lambda index: sample(index).numpy(),
    "a picture": lambda index: (sample(index) * 50).to(torch.uint8),
    "half a number": lambda index: sample(index).bfloat16(),
    "complex numbers": lambda index: torch.complex(sample(index), sample(index)),
    "tokens": lambda index: (sample(index) * 1000).long(),
    "a pair": lambda index: (sample(index), 1),
    "a dict": lambda index: {"input": sample(index), "label": 1, "meta": {"path": "a", "none": None}},
    "an object": lambda index: Pair(sample(index), 1),
    "a text": lambda index: f"text {index}",
    "bytes": lambda index: bytes([index]),
    "a number": lambda index: float(1 + index),
    "an array of texts": lambda index: np.array([f"text {index}"], dtype=object),
}


@pytest.mark.parametrize("read", FORMS.values(), ids=FORMS.keys())
def test_data_divided_by_rank_differs_and_the_same_data_does_not(read: Callable[[int], Any]) -> None:
    complete, others = sketches(Opaque(read)), sketches(Opaque(lambda index: read(24 + index)))
    assert complete
    assert all_differ(complete, others)
    assert not all_differ(complete, sketches(Opaque(read)))


def test_tensors_are_read_without_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.stack([sample(index) for index in range(24)])
    forked = sketches(Opaque(lambda index: (inputs[index], torch.tensor(index))))
    monkeypatch.setattr(os, "fork", fails)
    state = torch.get_rng_state()
    assert sketches(TensorDataset(inputs, torch.arange(24))) == forked
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(4).to(torch.float8_e4m3fn), torch.zeros(4, device="meta")], ids=["float8", "meta"]
)
def test_tensors_that_numpy_does_not_know_are_not_compared(tensor: torch.Tensor) -> None:
    assert sketches(TensorDataset(tensor)) == []


AUGMENTED: dict[str, Callable[[int], Any]] = {
    "by torch": lambda index: sample(index) + torch.randn(3, 8, 8),
    "by NumPy": lambda index: sample(index).numpy() * np.random.rand(),
    "by Python": lambda index: sample(index).flip(0) if random.random() < 0.5 else sample(index),
    "by a generator of its own": lambda index: sample(index) * PRIVATE.random(),
    "another number of elements": lambda index: sample(index)[:, : PRIVATE.integers(1, 8)],
    "another number of parts": lambda index: list(sample(index)[0])[: PRIVATE.integers(1, 8)],
    "the time": lambda index: (sample(index), time.perf_counter()),
}


@pytest.mark.parametrize("read", AUGMENTED.values(), ids=AUGMENTED.keys())
def test_random_augmentation_is_no_difference(read: Callable[[int], Any]) -> None:
    random.seed(), np.random.seed(), torch.seed()
    first = sketches(Opaque(read))
    random.seed(), np.random.seed(), torch.seed()
    assert not all_differ(first, sketches(Opaque(read)))


def test_what_is_not_random_is_compared_beside_what_is() -> None:
    first, second = (sketches(Opaque(lambda index, o=o: (index + o, PRIVATE.random()))) for o in (0, 24))
    assert all_differ(first, second)


def test_other_versions_of_libraries_that_round_or_decode_are_no_difference() -> None:
    pixels = [(sample(index) * 40).abs().to(torch.uint8) for index in range(24)]
    assert not all_differ(sketches(Opaque(lambda i: pixels[i])), sketches(Opaque(lambda i: pixels[i] + 1)))
    assert not all_differ(sketches(Opaque(sample)), sketches(Opaque(lambda index: sample(index) * 1.001)))


def test_samples_are_equal_if_all_of_them_are_and_nothing_is_random() -> None:
    complete = sketches(Opaque(sample))
    assert all_equal(complete, sketches(Opaque(sample)))
    assert not all_equal(complete, sketches(Opaque(lambda index: sample(index and 24 + index))))
    assert not all_equal([], [])
    kelvin, other = (sketches(Opaque(lambda index, a=a: 290.0 + index % 5 + a)) for a in (0.0, 0.5))
    assert not all_equal(kelvin, other)
    assert not all_differ(kelvin, other), "machines may decode what they read differently"
    some, others = (sketches(Opaque(lambda index: (index, PRIVATE.random()))) for _ in range(2))
    assert not all_equal(some, others)
    some, others = (sketches(Opaque(lambda index: sample(index)[:, : PRIVATE.integers(1, 8)])) for _ in range(2))
    assert not all_equal(some, others)


def test_one_sample_in_common_is_no_difference() -> None:
    assert not all_differ(sketches(Opaque(sample)), sketches(Opaque(lambda index: sample(index and 24 + index))))


def fails(*_: Any) -> Any:
    raise RuntimeError("no data here")


DATASETS = {
    "getitem raises": Opaque(fails),
    "len raises": Opaque(sample, fails),
    "takes long": Opaque(lambda index: time.sleep(3600)),
    "is empty": Opaque(sample, 0),
    "ends the process": Opaque(lambda index: os._exit(1)),
}


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_that_cannot_be_read_at_once_is_not_compared(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.1 if name == "takes long" else 60.0)
    assert sketches(DATASETS[name]) == []
    assert not all_differ([], sketches(Opaque(sample)))


def test_reading_changes_nothing_here(capfd: pytest.CaptureFixture[str]) -> None:
    dataset = Opaque(lambda index: (print("read"), torch.randn(3), np.random.rand(), random.random())[1])
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert sketches(dataset)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    assert dataset.reads == 0
    assert capfd.readouterr().out == ""


def test_a_dataset_with_an_open_file_reads_the_same_as_without(tmp_path: Path) -> None:
    size = 5000  # bytes of a sample; the buffer of a Python file holds more than one
    (tmp_path / "data").write_bytes(b"".join(bytes([index]) * size for index in range(24)))
    with open(tmp_path / "data", "rb") as file:

        def read(index: int) -> np.ndarray[Any, Any]:
            file.seek(index * size)
            return np.frombuffer(file.read(size), np.uint8)

        read(0)
        assert sketches(Opaque(read))
        assert read(1).tolist() == [1] * size
