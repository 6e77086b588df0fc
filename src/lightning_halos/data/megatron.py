r"""Reads and writes tokens in Megatron's memory-mapped format: ``PREFIX.idx`` and ``PREFIX.bin``.

This file deals with numbers only, not with text or tokenizers. A damaged file is refused before training starts.

The format is that of ``MMapIndexedDataset`` in Megatron-LM, GPT-NeoX and EleutherAI/pythia (little-endian). The
``.idx`` has 9 bytes ``MMIDIDX\0\0``, version 1 (8 bytes), data type (1 byte), number of sequences S and of document
boundaries D (8 bytes each), the sequences' lengths in tokens (S times 4 bytes), their offsets in the ``.bin`` in bytes
(S times 8), and the first sequence of each document, with S at the end (D times 8). The ``.bin`` has the tokens.
"""

from __future__ import annotations

import bisect
import itertools
import os
import re
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike, NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lightning_halos.core.checks import check_count

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {
    code: np.dtype(name) for code, name in ((1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2"))
}
_LFS_POINTER = b"version https://git-lfs.github.com"  # first bytes of the pointer that replaces a file in Git LFS


class IndexedTokens(Dataset[Tensor]):
    """Training sequences of a fixed length, from a corpus of tokens in Megatron's format.

    Packed sequences, which all have the same length, as in the pre-shuffled Pile of the Pythia suite, are each cut into
    pieces on their own. Documents are concatenated and the result is cut. A piece has ``context + 1`` tokens and begins
    with the last token of the previous piece, so that a model predicts every token once, except the first. The tail
    that does not fill a context is left out.

    Files are mapped, not loaded, because they may be larger than the memory. The data set is pickled as its arguments;
    each process maps the files itself.

    Args:
        prefix: The files' path without ``.idx`` and ``.bin``. The ``.bin`` may be sharded at any byte, as some corpora
            are downloaded: ``PREFIX-00000-of-00020.bin`` and so on.
        context: Tokens that a model sees at once.
        as_stored: Whether to return tokens in the file's data type (uint16 in the Pile) instead of int64. This moves a
            quarter of the bytes between processes and devices; convert them later.
        concatenate: Whether the stored sequences are documents. Default: if they are not all of the same length.

    Attributes:
        dtype: The file's data type.
        num_tokens: Number of tokens in the file.

    Raises:
        FileNotFoundError: If a file or shard is missing.
        ValueError: If a file is damaged or has another format, or the sequences are too short for the context, or of
            different lengths with ``concatenate=False``.
    """

    def __init__(
        self, prefix: str | Path, context: int, as_stored: bool = False, concatenate: bool | None = None
    ) -> None:
        check_count("context", context)
        self._arguments = (prefix, context, as_stored, concatenate)
        self._context = context
        path = without_suffix(Path(prefix))
        self.dtype, self.num_tokens, lengths = _read_index(path)
        self._out = self.dtype if as_stored else np.dtype(np.int64)
        shortest, longest = int(lengths.min()), int(lengths.max())
        if concatenate is None:
            concatenate = shortest != longest
        elif not concatenate and shortest != longest:
            raise ValueError(
                f"concatenate=False is for packed sequences, but {path}.idx has sequences of {shortest} to {longest}"
                " tokens. Use concatenate=True."
            )
        self._row = self.num_tokens if concatenate else longest
        self._pieces = (self._row - 1) // context
        if not self._pieces:
            what = f"{self._row} tokens" if concatenate else f"{len(lengths)} sequence(s) of {self._row} tokens"
            remedy = "" if concatenate else ", or concatenate=True if they are documents"
            raise ValueError(
                f"{path}.idx holds {what}, too short for context={context}, which takes {context + 1}."
                f" Use context={self._row - 1} or less{remedy}."
            )
        self._length = self.num_tokens // self._row * self._pieces
        self._files = _data_files(path, self.num_tokens, self.dtype)
        self._starts = [0, *itertools.accumulate(file.stat().st_size for file in self._files[:-1])]
        self._shards: list[NDArray[np.uint8]] = [np.asarray(np.memmap(file, np.uint8, "r")) for file in self._files]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tensor:
        """Returns a sequence: int64, or as stored, of shape ``[context + 1]``."""
        return self.__getitems__([range(self._length)[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        """Returns the sequences of a batch; a ``DataLoader`` calls it. Shards may be cut inside of a sequence."""
        tokens = np.empty((len(indices), self._context + 1), self.dtype)
        for rest, index in zip(tokens.view(np.uint8), indices, strict=True):
            row, piece = divmod(int(index), self._pieces)
            first = (row * self._row + piece * self._context) * self.dtype.itemsize
            shard = bisect.bisect(self._starts, first) - 1
            while len(rest):
                begin = first - self._starts[shard]
                part = self._shards[shard][begin : begin + len(rest)]
                rest[: len(part)] = part
                rest, first, shard = rest[len(part) :], first + len(part), shard + 1
        return list(torch.from_numpy(tokens.astype(self._out, copy=False)).unbind())

    def __reduce__(self) -> tuple[Any, ...]:
        return IndexedTokens, self._arguments


class IndexedTokensWriter:
    """Writes a corpus of tokens in Megatron's format, sequence by sequence; a context manager.

    The files get their names when everything is written, the index last. If an exception leaves the context, no file
    remains. Memory: 24 bytes per sequence while the index is written, 4 bytes before.

    Args:
        prefix: The files' path without ``.idx`` and ``.bin``. Existing files are replaced.
        dtype: Data type of the tokens: an integer type, at most ``int64``. See :func:`smallest_dtype`.

    Raises:
        ValueError: If the format does not support the data type.
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike = np.uint16) -> None:
        self._dtype = np.dtype(dtype).newbyteorder("<")
        if self._dtype not in _DTYPES.values():
            names = ", ".join(known.name for known in _DTYPES.values())
            raise ValueError(f"dtype={np.dtype(dtype).name} must be one of {names}.")
        self._limits = np.iinfo(self._dtype)
        self._prefix = without_suffix(Path(prefix))
        self._sizes = array("i")

    def __enter__(self) -> IndexedTokensWriter:
        folder = self._prefix.parent
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = TemporaryDirectory(prefix=f".{self._prefix.name}-", dir=folder)
        self._bin = Path(self._folder.name, "bin").open("wb")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._folder, self._bin, Path(self._folder.name, "idx").open("wb") as index:
            if kind is None:
                self._write_index(index)
                for file in (index, self._bin):
                    file.flush()
                    os.fsync(file.fileno())
                _with(self._prefix, ".idx").unlink(missing_ok=True)  # it must never be seen with the new tokens
                os.replace(self._bin.name, _with(self._prefix, ".bin"))
                os.replace(index.name, _with(self._prefix, ".idx"))

    @property
    def num_sequences(self) -> int:
        """Number of sequences that were added."""
        return len(self._sizes)

    def add(self, tokens: ArrayLike) -> None:
        """Adds a sequence: integers of shape ``[length]``.

        Raises:
            ValueError: If they have another type or shape, or do not fit into the data type.
        """
        found = np.asarray(tokens)
        if found.ndim != 1 or not found.size or found.dtype.kind not in "iu":
            raise ValueError(
                f"a sequence must be integers of shape [length], not {found.dtype} of shape {list(found.shape)}."
            )
        if found.min() < self._limits.min or found.max() > self._limits.max:
            raise ValueError(
                f"tokens from {found.min()} to {found.max()} do not fit into {self._dtype.name}. Use a larger dtype."
            )
        self._bin.write(found.astype(self._dtype).data)
        self._sizes.append(found.size)

    def _write_index(self, file: Any) -> None:
        count, code = len(self._sizes), {dtype: code for code, dtype in _DTYPES.items()}[self._dtype]
        sizes = np.array(self._sizes, "<i4")
        begins = np.zeros(count, "<i8")
        np.cumsum(sizes[:-1], dtype=np.int64, out=begins[1:])
        begins *= self._dtype.itemsize
        file.write(_HEADER.pack(_MAGIC, _VERSION, code, count, count + 1))
        for numbers in (sizes, begins, np.arange(count + 1, dtype="<i8")):
            file.write(numbers.data)


def smallest_dtype(vocab_size: int) -> np.dtype[Any]:
    """Returns the smallest data type for tokens of a vocabulary: uint16 (as in Pythia's Pile) or int32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def _read_index(prefix: Path) -> tuple[np.dtype[Any], int, NDArray[np.int32]]:
    """Returns the data type, the number of tokens, and the sequences' lengths, which are mapped."""
    path = _with(prefix, ".idx")
    if not path.is_file():
        if prefix.is_dir():
            found = ", ".join(str(file.with_suffix("")) for file in sorted(prefix.glob("*.idx")))
            hint = f"such as {found}" if found else "but this folder contains no .idx file"
            raise FileNotFoundError(f"{prefix} is a folder. Give the files' path without .idx and .bin, {hint}.")
        raise FileNotFoundError(f"{path} does not exist. The prefix of a corpus is its path without .idx and .bin.")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    _refuse_pointer(path, head)
    if head[: len(_MAGIC)] != _MAGIC:
        raise ValueError(
            f"{path} begins with {head[: len(_MAGIC)]!r}, not with {_MAGIC!r}: it is not an index in Megatron's"
            " memory-mapped format. `lightning-halos prepare-data` makes one from text."
        )
    if size < _HEADER.size:
        raise ValueError(f"{path} is truncated: it has {size} bytes, its header alone {_HEADER.size}. Copy it again.")
    _, version, code, sequences, boundaries = _HEADER.unpack(head)
    if version != _VERSION:
        raise ValueError(f"{path} has version {version} of the format; only version {_VERSION} is supported.")
    if code not in _DTYPES:
        what = "a floating-point type, but tokens are integers" if code in (6, 7) else "unknown"
        raise ValueError(f"{path} has data type {code}, which is {what}. Known: {', '.join(map(str, _DTYPES))}.")
    expected = _HEADER.size + (4 + 8) * sequences + 8 * boundaries
    if size != expected:
        raise ValueError(
            f"{path} has {size} bytes, but its header ({sequences} sequences) promises {expected}: it is truncated or"
            " damaged. Copy it again."
        )
    if not sequences:
        raise ValueError(f"{path} contains no sequence.")
    dtype = _DTYPES[code]
    lengths = np.memmap(path, "<i4", "r", _HEADER.size, (sequences,))
    begins = np.memmap(path, "<i8", "r", _HEADER.size + 4 * sequences, (sequences,))
    tokens, end = int(lengths.sum(dtype=np.int64)), int(begins[-1]) + int(lengths[-1]) * dtype.itemsize
    if lengths.min() < 0 or begins[0] != 0 or end != tokens * dtype.itemsize:
        raise ValueError(
            f"{path} is damaged: its {sequences} sequences have {tokens * dtype.itemsize} bytes, but end after {end}."
            " Copy it again, or make it again."
        )
    return dtype, tokens, lengths


def _data_files(prefix: Path, tokens: int, dtype: np.dtype[Any]) -> list[Path]:
    """Returns the ``.bin`` file or its shards, in order, if they have the size that the index gives."""
    single = _with(prefix, ".bin")
    files = [single] if single.is_file() else _shards(prefix)
    for file in files:
        with file.open("rb") as opened:
            _refuse_pointer(file, opened.read(len(_LFS_POINTER)))
    size, expected = sum(file.stat().st_size for file in files), tokens * dtype.itemsize
    if size != expected:
        what = str(files[0]) if len(files) == 1 else f"{files[0]} to {files[-1].name}"
        problem = "the data is truncated or a shard is missing" if size < expected else "the data is too long"
        raise ValueError(
            f"{what}: {size} bytes, but {prefix.name}.idx promises {expected} ({tokens} tokens of"
            f" {dtype.name}): {problem}, or index and data do not belong together. Copy both again."
        )
    return files


def _shards(prefix: Path) -> list[Path]:
    """Returns the shards, numbered from 0 to N-1 or, like those of Pythia's Pile, from 0 to N of N."""
    name = re.compile(re.escape(prefix.name) + r"-(\d+)-of-(\d+)\.bin")
    found = {int(match[1]): (match, file) for file in prefix.parent.iterdir() if (match := name.fullmatch(file.name))}
    if not found:
        raise FileNotFoundError(f"Neither {prefix}.bin nor shards such as {prefix}-00000-of-00020.bin exist.")
    match = next(iter(found.values()))[0]
    number, digits = int(match[2]), len(match[1])
    missing = [shard for shard in range(max(number, *found)) if shard not in found]
    if missing:
        names = ", ".join(f"{prefix.name}-{shard:0{digits}}-of-{match[2]}.bin" for shard in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise FileNotFoundError(f"Shards of {prefix}.bin are missing: {names}{more}. Copy them to {prefix.parent}.")
    return [found[shard][1] for shard in sorted(found)]


def _refuse_pointer(path: Path, head: bytes) -> None:
    if head.startswith(_LFS_POINTER):
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself. Fetch the file with `git lfs pull`.")


def without_suffix(path: Path, argument: str = "prefix") -> Path:
    """Returns the prefix, even if ``path`` is one of the two files, with ``~`` expanded.

    Args:
        path: The path.
        argument: The argument that has it, for the error.

    Raises:
        ValueError: If it has no name.
    """
    path = Path(os.path.expanduser(path))
    if not path.name:
        raise ValueError(
            f"{argument}={str(path)!r} must be the files' path without .idx and .bin, such as tokens/corpus."
        )
    return path.with_suffix("") if path.suffix in (".idx", ".bin") else path


def _with(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)
