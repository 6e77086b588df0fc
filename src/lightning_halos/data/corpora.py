"""Reads documents from local files or from a dataset on the Hugging Face hub, through ``datasets``.

Tokenizing them is the business of ``tokenization``.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

from fsspec.compression import compr
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_halos.core.checks import check_switch
from lightning_halos.data.rows import COMPRESSIONS, decompressed, read_rows
from lightning_halos.extras import language_package

SampleBy = Literal["document", "paragraph", "line"]

_FORMATS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}  # anything else is text
_HEAD = 1 << 13  # bytes that are looked at to know whether a file is text
_NAMED = 10  # files in a message


@dataclass(frozen=True)
class Corpus:
    """The source of the text: files or a dataset.

    Attributes:
        files: Paths, globs (``**`` reaches any depth) or folders (all text, JSON and Parquet files below them, except
            hidden ones), all of one kind: JSON lines (``.jsonl``, ``.ndjson``, ``.json``), Parquet (``.parquet``), or
            text (any other suffix). They may be compressed. A folder's file is text if its beginning is UTF-8, except
            for a few bytes; a log line names the others. A warning names text files whose beginning is not all UTF-8.
        dataset: A dataset's name on the Hugging Face hub, or its folder.
        config: The dataset's configuration.
        split: The dataset's split.
        field: Name of the field with the text, in JSON lines, Parquet and datasets.
        sample_by: What counts as a document in text files: ``"document"`` (the complete file, which is read into
            memory), ``"paragraph"`` or ``"line"``.
        streaming: Whether to read a dataset from the hub each time, instead of downloading it once.

    Raises:
        ValueError: If not exactly one of ``files`` and ``dataset`` is given, or a value is invalid or has no effect.
        TypeError: If a value has the wrong type.
        FileNotFoundError: If a file does not exist, or a folder has none that can be read.
    """

    files: str | Path | Sequence[str | Path] | None = None
    dataset: str | Path | None = None
    config: str | None = None
    split: str = "train"
    field: str = "text"
    sample_by: SampleBy = "document"
    streaming: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.files, (str, Path)) and not _is_list_of_paths(self.files or ()):
            raise TypeError(f"files={self.files!r} must be a path, a glob or a folder, or a list of these.")
        if not isinstance(self.dataset, (str, Path, NoneType)):
            raise TypeError(f"dataset={self.dataset!r} must be the name of a dataset, or its folder.")
        check_switch("streaming", self.streaming)
        if bool(self.files) == bool(self.dataset):
            raise ValueError(
                f"files={self.files!r} and dataset={self.dataset!r}: give exactly one, local files or a dataset's name."
            )
        if self.sample_by not in get_args(SampleBy):
            raise ValueError(f"sample_by={self.sample_by!r} must be one of {', '.join(get_args(SampleBy))}.")
        if self.files:
            for name, default in (("config", None), ("split", "train")):
                if (value := getattr(self, name)) != default:
                    raise ValueError(f"{name}={value!r} is for a dataset, and files have none. Leave it out.")
            _ = self._kind

    def load(self) -> Any:
        """Returns the documents: a ``datasets.Dataset`` for a downloaded dataset, else a ``datasets.IterableDataset``.

        Raises:
            ValueError: If the dataset, or its configuration, split or field, does not exist or cannot be reached.
            ModuleNotFoundError: If the extra ``lm`` is not installed, or ``zstandard`` and a file is a ``.zst``.
        """
        datasets = language_package("datasets")
        if any(path.suffix.lower() == ".zst" for path in self.paths) and "zstd" not in compr:
            raise ModuleNotFoundError(f"{self}: files that end in .zst need a package: pip install zstandard")
        if self.is_text:
            options = {"sample_by": self.sample_by, "encoding": "utf-8-sig", "encoding_errors": "replace"}
            files = [glob.escape(str(path)) for path in self.paths]
            return datasets.load_dataset("text", data_files=files, split="train", streaming=True, **options)
        if self.files:
            rows = {"files": self.paths, "kind": self._kind, "field": self.field}
            loaded = datasets.IterableDataset.from_generator(read_rows, gen_kwargs=rows)
            next(iter(loaded), None)  # so that a missing field is noticed now
            return loaded
        try:
            loaded = datasets.load_dataset(
                os.path.expanduser(str(self.dataset)), self.config, split=self.split, streaming=self.streaming
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"Cannot load {self}: {reason}. A dataset of the hub needs the network, or an earlier download."
            ) from error
        columns = loaded.column_names or list(next(iter(loaded), {}))
        if self.field not in columns:
            raise ValueError(f"{self} has no field={self.field!r}. It has: {', '.join(columns) or 'nothing'}.")
        return loaded.select_columns([self.field])

    def documents(self, loaded: Any = None) -> Iterator[str]:
        """Yields the text of each document that is not empty, in order; of ``loaded``, if it is a part of :meth:`load`.

        A null is an empty document.

        Raises:
            ValueError: As :meth:`load`; also if a value of the field is not text.
        """
        field = self._field
        for row in self.load() if loaded is None else loaded:
            text = row[field]
            if not isinstance(text, str | None):
                raise ValueError(f"field={field!r} of {self} holds <{type(text).__name__}>, not text: {text!r:.60}.")
            if text:
                # JSON may have half of a surrogate pair, which tokenizers do not take.
                yield text.encode(errors="replace").decode()

    def key(self) -> str:
        """Returns a key of the present content, from names, sizes and times of files or a dataset's fingerprint."""
        if self.dataset:
            where: Any = self.load()._fingerprint
        else:
            where = [(str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in self.paths]
        return hashlib.sha256(repr((where, self._field, self.sample_by)).encode()).hexdigest()

    @cached_property
    def paths(self) -> list[Path]:
        """The files, in order."""
        paths: dict[Path, None] = {}
        for pattern in self._patterns:
            found = _find(pattern)
            if not found:
                raise FileNotFoundError(f"There is no file {pattern}.")
            paths |= dict.fromkeys(found)
        if others := [path for path in paths if _kind(path) == "text" and not _begins_in_utf8(path)]:
            rank_zero_warn(
                f"What is not UTF-8 is replaced, also in {_names(others)}. Convert these files to UTF-8 to keep it."
            )
        return list(paths)

    @cached_property
    def extent(self) -> str:
        """What changes if the text does, and stays if files are moved: their number and size, or a dataset's name."""
        if self.dataset:
            return str(self)
        return f"{len(self.paths)} files, {sum(path.stat().st_size for path in self.paths)} bytes"

    @property
    def is_text(self) -> bool:
        """Whether the documents come from text files, not from JSON lines, Parquet or a dataset."""
        return bool(self.files) and self._kind == "text"

    @property
    def _patterns(self) -> list[str]:
        files = [self.files] if isinstance(self.files, (str, Path)) else self.files or ()
        return [str(pattern) for pattern in files]

    @property
    def _field(self) -> str:
        return "text" if self.is_text else self.field

    @cached_property
    def _kind(self) -> str:
        kinds = {_kind(path): path for path in self.paths}
        if len(kinds) > 1:
            examples = ", ".join(f"{kind} ({path.name})" for kind, path in kinds.items())
            raise ValueError(
                f"files={self.files!r} are of several kinds: {examples}. Give files of one kind, for example by a glob."
            )
        return next(iter(kinds))

    def __str__(self) -> str:
        if self.files:
            return " ".join(self._patterns)
        return ":".join(str(part) for part in (self.dataset, self.config, self.split) if part)


def _is_list_of_paths(value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(path, (str, Path)) for path in value)


def _find(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        files = _files_in(path)
    elif path.is_file():
        files = [path]
    else:
        files = [file for name in glob.glob(str(path), recursive=True) if (file := Path(name)).is_file()]
    return sorted(file.resolve() for file in files)


def _files_in(folder: Path) -> list[Path]:
    files: list[Path] = []
    others: list[Path] = []
    beside: list[Path] = []  # files such as LICENSE, which are text, but not the text of a folder of JSON or Parquet
    for file in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.is_file() and not is_hidden and file.stat().st_size:
            (files if _kind(file) != "text" or _is_text(file) else others).append(file)
    if any(_kind(file) != "text" for file in files):
        beside = [
            file for file in files if _kind(file) == "text" and _without_compression(file).suffix.lower() != ".txt"
        ]
        files = sorted({*files} - {*beside})
    names = _names(others, folder)
    if not files:
        rest = f" Not text: {names}." if others else ""
        raise FileNotFoundError(f"{folder} has no readable file: text, JSON or Parquet, not empty or hidden.{rest}")
    if others:
        rank_zero_info(f"{folder}: not read, because it is not text: {names}.")
    if beside:
        rank_zero_info(f"{folder}: not read beside JSON or Parquet: {_names(beside, folder)}.")
    return files


def _names(files: Sequence[Path], folder: Path | None = None) -> str:
    names = ", ".join(str(file.relative_to(folder) if folder else file) for file in files[:_NAMED])
    return names + (f" and {len(files) - _NAMED} more" if len(files) > _NAMED else "")


def _is_text(file: Path) -> bool:
    """Returns whether the beginning of a file, which may be compressed, is UTF-8, except for a few bytes."""
    head = _head(file, "replace")
    return "\0" not in head and head.count("\ufffd") <= len(head) / 10


def _begins_in_utf8(file: Path) -> bool:
    try:
        _head(file, "strict")
    except UnicodeDecodeError:
        return False
    return True


def _head(file: Path, errors: str) -> str:
    try:
        with file.open("rb") as opened:
            head: bytes = decompressed(opened, file).read(_HEAD)
    except Exception:  # a damaged file, or a missing package, is an error when the file is loaded
        return ""
    return codecs.getincrementaldecoder("utf-8")(errors).decode(head)  # may end inside of a character


def _kind(file: Path) -> str:
    return _FORMATS.get(_without_compression(file).suffix.lower(), "text")


def _without_compression(file: Path) -> Path:
    return file.with_suffix("") if file.suffix.lower() in COMPRESSIONS else file
