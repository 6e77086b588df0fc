"""Which datasets count as the same: those that hold the same data, whatever else they hold."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from lightning_halos.data import IndexedTokens, IndexedTokensWriter
from lightning_halos.training.same_data import digest

datasets = pytest.importorskip("datasets")


class Held(Dataset):
    """Reading a sample from it is an error."""

    def __init__(self, data, **others):
        self.data = data
        vars(self).update(others)

    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise AssertionError("a sample was read")


FULL = torch.arange(48.0).view(24, 2)
FILES = [f"part{number}.bin" for number in range(8)]
WHOLES = {
    "tensor": lambda part: TensorDataset(FULL[part]),
    "memory map": lambda part: Held(FULL.numpy()[part]),
    "subset": lambda part: Subset(Held(FULL), range(24)[part]),
    "in another": lambda part: ConcatDataset([Held(1), Held(FULL[part])]),
    "list": lambda part: list(FULL)[part],
    "list of pairs": lambda part: Held([(row, 0) for row in FULL][part]),
    "list of dicts": lambda part: Held([{"input": row} for row in FULL][part]),
    "names of files": lambda part: Held(FILES[part]),
    "paths": lambda part: Held([Path("data") / name for name in FILES][part]),
    "array of numbers": lambda part: Held(np.arange(24)[part]),
    "array of objects": lambda part: Held(np.array([f"{name}.png" for name in range(24)], dtype=object)[part]),
    "of Hugging Face": lambda part: datasets.Dataset.from_dict({"x": FULL.tolist()}).select(range(24)[part]),
}


@pytest.mark.parametrize("make", WHOLES.values(), ids=WHOLES.keys())
def test_parts_of_a_dataset_differ_and_copies_of_it_do_not(make):
    assert digest(make(slice(0, None, 2))) != digest(make(slice(1, None, 2)))
    assert digest(make(slice(None))) == digest(make(slice(None)))


def test_what_is_not_data_may_differ():
    first, second = ([f"{folder}/a.bin"] for folder in ("/mnt/one", "/mnt/two"))
    assert digest(Held(first, rank=0, handle=object())) == digest(Held(second, rank=1, handle=object()))


def test_tokens_that_were_read_before_are_the_same(tmp_path):
    with IndexedTokensWriter(tmp_path / "tokens") as writer:
        for number in range(8):
            writer.add(np.arange(9) + number)
    dataset, other = (Subset(IndexedTokens(tmp_path / "tokens", 8), range(6)) for _ in range(2))
    dataset[0]
    assert digest(dataset) == digest(other)


def test_empty_data_is_data():
    assert digest(Held(torch.zeros(0, 2))) == digest(Held(torch.zeros(0, 2)))


@pytest.mark.parametrize("layout", ["coo", "csr", "nested", "of another kind"])
def test_data_that_cannot_be_compared_is_no_error(layout):
    nested = torch.nested.nested_tensor([FULL[:2], FULL[:3]])
    data = {"coo": FULL.to_sparse(), "csr": FULL.to_sparse_csr(), "nested": nested, "of another kind": [object()]}
    digest(Held(data[layout]))


def test_samples_of_hugging_face_are_neither_decoded_nor_transformed():
    pictures = [{"bytes": bytes([number]), "path": None} for number in range(3)]
    dataset = datasets.Dataset.from_dict(
        {"picture": pictures}, features=datasets.Features({"picture": datasets.Image()})
    )
    dataset.set_transform(lambda rows: pytest.fail("a sample was transformed"))
    assert digest(dataset) == digest(dataset.select([0, 1, 2]))
    assert digest(dataset) != digest(dataset.select([1, 2, 0]))
