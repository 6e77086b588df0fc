"""Reads the text from the rows of JSON and Parquet files, whatever else is in the rows.

``datasets`` infers one type for each field of all files, from the beginning of the first one. It refuses corpora whose
other fields differ between files or rows, as metadata does.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from fsspec.compression import compr

from lightning_halos.extras import language_package

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
_PARQUET_ROWS = 1000  # bounds the memory of a batch of rows


def read_rows(files: Sequence[Path], kind: str, field: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of all files, with only this field.

    Args:
        files: The files, which may be compressed.
        kind: ``"json"`` (JSON lines, or one array) or ``"parquet"``.
        field: Name of the field. A row of JSON that is a string is the field's value.

    Raises:
        ValueError: If a file is damaged, or has no such field.
    """
    read = {"json": _json_values, "parquet": _parquet_values}[kind]
    for file in files:
        try:
            with file.open("rb") as raw, decompressed(raw, file) as opened:
                for value in read(opened, field):
                    yield {field: value}
        except ImportError:
            raise
        except Exception as error:  # each kind of compression has errors of its own for damaged files
            raise ValueError(f"Cannot read {file}: {error}") from error


def decompressed(raw: IO[bytes], file: Path) -> Any:
    """Returns what is in a file that has been opened, according to the suffix of its name."""
    return compr[COMPRESSIONS.get(file.suffix.lower())](raw, mode="rb")


def _json_values(opened: Any, field: str) -> Iterator[Any]:
    lines = enumerate(io.TextIOWrapper(opened, "utf-8-sig"), start=1)
    rows = ((number, line) for number, line in lines if line.strip())
    for number, line in rows:
        # An array, or an object on several lines, is one value: all that is left.
        is_whole = line.lstrip().startswith("[") or line.strip() == "{"
        value = "".join([line, *(rest for _, rest in rows)]) if is_whole else line
        try:
            found = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"what begins in line {number} is no JSON. {error}.") from error
        for row in found if isinstance(found, list) else [found]:
            yield row if isinstance(row, str) else _value(row, field)


def _value(row: Any, field: str) -> Any:
    if not isinstance(row, dict):
        raise ValueError(f"it has a row that is no object: {row!r:.60}.")
    if field not in row:
        raise _missing(field, row)
    return row[field]


def _parquet_values(opened: Any, field: str) -> Iterator[Any]:
    file = language_package("pyarrow.parquet").ParquetFile(opened)
    if field not in file.schema_arrow.names:
        raise _missing(field, file.schema_arrow.names)
    for batch in file.iter_batches(_PARQUET_ROWS, columns=[field]):
        yield from batch.column(0).to_pylist()


def _missing(field: str, names: Collection[str]) -> ValueError:
    return ValueError(f"it has no field={field!r}. It has: {', '.join(names) or 'nothing'}.")
