"""Tokens in Megatron's memory-mapped format."""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_halos.data import IndexedTokens, IndexedTokensWriter

CONTEXT = 16


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return tmp_path / "document"


def write(prefix: Path, sequences: Any, dtype: str = "uint16") -> np.ndarray[Any, Any]:
    """Returns all tokens, one after the other."""
    with IndexedTokensWriter(prefix, dtype) as writer:
        for sequence in sequences:
            writer.add(sequence)
    return np.concatenate(sequences)


def equal_sequences(number: int = 10, length: int = CONTEXT + 1) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 60_000, (number, length))


def documents() -> list[np.ndarray[Any, Any]]:
    generator = np.random.default_rng(1)
    return [generator.integers(0, 60_000, length) for length in (5, 40, 1, 23, 100, 7)]


def shard(prefix: Path, sizes: list[int], last: int) -> list[Path]:
    """Cuts the ``.bin`` into shards of a number of bytes, as it is downloaded."""
    whole = prefix.with_suffix(".bin").read_bytes()
    prefix.with_suffix(".bin").unlink()
    ends = [*np.cumsum([0, *sizes]).tolist(), len(whole)]
    paths = []
    for number, (begin, end) in enumerate(itertools.pairwise(ends)):
        paths.append(prefix.with_name(f"{prefix.name}-{number:05d}-of-{last:05d}.bin"))
        paths[-1].write_bytes(whole[begin:end])
    return paths


def edit_index(prefix: Path, offset: int, value: bytes) -> None:
    path = prefix.with_suffix(".idx")
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    path.write_bytes(content)


class TestFormat:
    def test_is_megatrons_byte_for_byte(self, prefix: Path) -> None:
        write(prefix, [[1, 2, 3], [40_000]])
        assert prefix.with_suffix(".bin").read_bytes() == struct.pack("<4H", 1, 2, 3, 40_000)
        assert prefix.with_suffix(".idx").read_bytes() == (
            b"MMIDIDX\x00\x00"
            + struct.pack("<QBQQ", 1, 8, 2, 3)  # version, uint16, sequences, document boundaries
            + struct.pack("<2i", 3, 1)  # lengths
            + struct.pack("<2q", 0, 6)  # where they begin, in bytes
            + struct.pack("<3q", 0, 1, 2)  # where documents begin, in sequences
        )

    @pytest.mark.parametrize(
        ("dtype", "code"), [("uint8", 1), ("int8", 2), ("int16", 3), ("int32", 4), ("int64", 5), ("uint16", 8)]
    )
    def test_round_trip_of_every_integer_type(self, prefix: Path, dtype: str, code: int) -> None:
        limits = np.iinfo(dtype)
        sequence = np.array([limits.max, 0, 1, 2, limits.min])
        write(prefix, [sequence, sequence[::-1]], dtype)
        assert prefix.with_suffix(".idx").read_bytes()[17] == code
        tokens = IndexedTokens(prefix, context=4)
        assert tokens.dtype == np.dtype(dtype)
        assert [tokens[0].tolist(), tokens[1].tolist()] == [sequence.tolist(), sequence[::-1].tolist()]
        assert tokens[0].dtype == torch.int64
        stored = IndexedTokens(prefix, context=4, as_stored=True)[0]
        assert stored.dtype == getattr(torch, dtype)
        assert stored.long().tolist() == sequence.tolist()

    def test_tokens_that_do_not_fit_are_refused(self, prefix: Path) -> None:
        with IndexedTokensWriter(prefix) as writer:
            with pytest.raises(ValueError, match="tokens from 1 to 65536 do not fit into uint16"):
                writer.add([1, 65_536])
            with pytest.raises(ValueError, match=r"must be integers of shape \[length\], not float64"):
                writer.add([0.5])
        with pytest.raises(ValueError, match="dtype=float32 must be one of uint8, "):
            IndexedTokensWriter(prefix, np.float32)

    def test_nothing_stays_of_files_that_were_not_finished(self, prefix: Path) -> None:
        old = write(prefix, equal_sequences())
        with pytest.raises(ValueError, match="do not fit"):
            write(prefix, [[1, 2, 3], [70_000]])
        assert sorted(path.name for path in prefix.parent.iterdir()) == ["document.bin", "document.idx"]
        assert IndexedTokens(prefix, CONTEXT).num_tokens == old.size


class TestSequences:
    def test_of_equal_length_are_read_as_they_are(self, prefix: Path) -> None:
        sequences = equal_sequences()
        write(prefix, sequences)
        tokens = IndexedTokens(prefix, CONTEXT)
        assert len(tokens) == len(sequences)
        assert torch.stack(list(tokens)).tolist() == sequences.tolist()
        assert torch.equal(tokens[-1], tokens[9])
        with pytest.raises(IndexError):
            tokens[10]

    def test_of_equal_length_are_each_cut_to_a_smaller_context(self, prefix: Path) -> None:
        sequences = equal_sequences()
        write(prefix, sequences)
        tokens = IndexedTokens(prefix, context=5)  # 17 tokens: three times 5 to predict
        assert len(tokens) == 30
        assert tokens[4].tolist() == sequences[1, 5:11].tolist()

    @pytest.mark.parametrize("context", [1, 7, 16, 175])
    def test_documents_are_packed_and_every_token_is_predicted_once(self, prefix: Path, context: int) -> None:
        stream = write(prefix, documents())
        tokens = IndexedTokens(prefix, context)
        assert {sequence.shape for sequence in tokens} == {(context + 1,)}
        predicted = torch.cat([sequence[1:] for sequence in tokens])
        assert predicted.tolist() == stream[1 : 1 + len(predicted)].tolist()
        assert len(stream) - 1 - len(predicted) < context  # the tail
        assert tokens[0][0] == stream[0]

    def test_whether_they_are_concatenated_can_be_said(self, prefix: Path) -> None:
        sequences = equal_sequences()
        stream = write(prefix, sequences)
        tokens = IndexedTokens(prefix, context=40, concatenate=True)
        assert tokens[1].tolist() == stream[40:81].tolist()
        assert len(IndexedTokens(prefix, context=5, concatenate=False)) == 30
        with pytest.raises(ValueError, match=r"context=16 or less, or concatenate=True if they are documents"):
            IndexedTokens(prefix, context=40)
        write(prefix, documents())
        with pytest.raises(ValueError, match=r"concatenate=False .* has sequences of 1 to 100 tokens"):
            IndexedTokens(prefix, CONTEXT, concatenate=False)

    @pytest.mark.parametrize(
        ("start_method", "workers", "as_stored"),
        [("fork", 2, True), pytest.param("spawn", 1, False, marks=pytest.mark.slow)],
    )
    def test_data_loader_workers(self, prefix: Path, start_method: str, workers: int, as_stored: bool) -> None:
        stream = write(prefix, equal_sequences(64))
        tokens = IndexedTokens(prefix, CONTEXT, as_stored)
        tokens[0]  # maps the files here, too
        assert len(pickle.dumps(tokens)) < 1000
        loader = DataLoader(tokens, batch_size=8, num_workers=workers, multiprocessing_context=start_method)
        assert torch.cat(list(loader)).long().flatten().tolist() == stream.tolist()


class TestShards:
    @pytest.mark.parametrize("named_by_their_last", [True, False], ids=["Pythia", "usual"])
    @pytest.mark.parametrize("sizes", [[34, 300], [33, 35, 1, 1, 100], [1], [351]], ids=str)
    def test_read_like_the_whole_wherever_they_are_cut(
        self, prefix: Path, sizes: list[int], named_by_their_last: bool
    ) -> None:
        write(prefix, documents())
        whole = [sequence.tolist() for sequence in IndexedTokens(prefix, CONTEXT)]
        shard(prefix, sizes, len(sizes) + (not named_by_their_last))
        tokens = IndexedTokens(prefix, CONTEXT)
        assert [sequence.tolist() for sequence in tokens] == whole
        backwards = list(range(len(whole)))[::-1]
        (batch,) = DataLoader(tokens, batch_size=len(whole), sampler=backwards)
        assert batch.tolist() == whole[::-1]

    @pytest.mark.parametrize("missing", [0, 1, 2])
    def test_a_missing_one_is_named_or_missed(self, prefix: Path, missing: int) -> None:
        write(prefix, documents())
        shard(prefix, [100, 100], last=2)[missing].unlink()
        with pytest.raises((FileNotFoundError, ValueError)) as caught:
            IndexedTokens(prefix, CONTEXT)
        # Whether the last one, N of "of N", is missing, only the bytes say.
        expected = f"missing: document-{missing:05d}-of-00002.bin" if missing < 2 else "truncated or a shard is missing"
        assert expected in str(caught.value)


class TestErrors:
    """Errors name the file, the problem and the remedy."""

    def refused(self, prefix: Path, kind: type[Exception], *parts: str, context: int = CONTEXT) -> None:
        with pytest.raises(kind) as caught:
            IndexedTokens(prefix, context)
        for part in (str(prefix), *parts):
            assert part in str(caught.value)

    @pytest.fixture(autouse=True)
    def _files(self, prefix: Path) -> None:
        write(prefix, equal_sequences())

    def test_missing_files(self, prefix: Path) -> None:
        self.refused(prefix.with_name("other"), FileNotFoundError, "does not exist", "other.idx")
        self.refused(prefix.parent, FileNotFoundError, "is a folder", str(prefix))
        prefix.with_suffix(".bin").unlink()
        self.refused(prefix, FileNotFoundError, "document.bin", "document-00000-of-00020.bin")

    def test_a_suffix_is_no_mistake(self, prefix: Path) -> None:
        assert len(IndexedTokens(prefix.with_suffix(".idx"), CONTEXT)) == 10

    def test_foreign_file(self, prefix: Path) -> None:
        prefix.with_suffix(".idx").write_text("id,text\n1,hello\n" * 10)
        self.refused(prefix, ValueError, "begins with b'id,text\\n1'", "prepare-data")

    def test_git_lfs_pointer(self, prefix: Path) -> None:
        prefix.with_suffix(".bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
        self.refused(prefix, ValueError, "document.bin", "git lfs pull")

    def test_version(self, prefix: Path) -> None:
        edit_index(prefix, 9, b"\x02")
        self.refused(prefix, ValueError, "version 2", "only version 1")

    @pytest.mark.parametrize(("code", "what"), [(6, "floating-point"), (7, "floating-point"), (9, "unknown")])
    def test_data_type(self, prefix: Path, code: int, what: str) -> None:
        edit_index(prefix, 17, bytes([code]))
        self.refused(prefix, ValueError, f"data type {code}", what)

    @pytest.mark.parametrize("size", [9, 33, 34, 100, 241])
    def test_truncated_index(self, prefix: Path, size: int) -> None:
        path = prefix.with_suffix(".idx")
        path.write_bytes(path.read_bytes()[:size])
        self.refused(prefix, ValueError, f"{size} bytes", "Copy it again")

    def test_damaged_index(self, prefix: Path) -> None:
        edit_index(prefix, 34, struct.pack("<i", 5))
        self.refused(prefix, ValueError, "is damaged", "its 10 sequences have 316 bytes, but end after 340")

    @pytest.mark.parametrize(("change", "problem"), [(-2, "truncated"), (2, "too long")])
    def test_tokens_of_another_size_than_the_index_says(self, prefix: Path, change: int, problem: str) -> None:
        path = prefix.with_suffix(".bin")
        path.write_bytes((path.read_bytes() + b"\x00\x00")[: 340 + change])
        self.refused(prefix, ValueError, f"{340 + change} bytes, but document.idx promises 340", problem)

    def test_no_sequence(self, prefix: Path) -> None:
        with IndexedTokensWriter(prefix):
            pass
        self.refused(prefix, ValueError, "contains no sequence")

    def test_sequences_too_short_for_the_context(self, prefix: Path) -> None:
        self.refused(prefix, ValueError, "10 sequence(s) of 17 tokens", "Use context=16 or less", context=17)
        write(prefix, documents())
        self.refused(prefix, ValueError, "holds 176 tokens", "Use context=175 or less", context=176)

    @pytest.mark.parametrize("context", [0, -1, 2.0, True])
    def test_context(self, prefix: Path, context: Any) -> None:
        with pytest.raises(ValueError, match=f"context={context!r} must be a whole number of at least 1"):
            IndexedTokens(prefix, context)


def test_reading_does_not_load_the_file(prefix: Path) -> None:
    """A process that reads a few sequences of 256 MB holds a few MB more of its own than before."""
    with IndexedTokensWriter(prefix) as writer:
        rows = np.zeros(1 << 20, np.uint16)
        for _ in range(128):
            writer.add(rows)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(grown_kilobytes, (prefix,)) < 8_000


def grown_kilobytes(prefix: Path) -> int:
    def own() -> int:
        return next(
            int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line
        )

    before, tokens = own(), IndexedTokens(prefix, 2048)
    for index in range(0, len(tokens), 4096):
        tokens[index]
    return own() - before
