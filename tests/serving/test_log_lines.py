"""docs/operations.md explains each line of the server's log."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_halos

SOURCE = Path(lightning_halos.__file__).parent
DOCS = Path(__file__).parents[2] / "docs" / "operations.md"
FILES = [*sorted((SOURCE / "serving").glob("*.py")), SOURCE / "transport" / "listener.py"]
CALLS = {"note", "_note", "warn", "warning", "error", "log", "exception"}


def lines() -> Iterator[tuple[str, tuple[str, ...]]]:
    """The constant parts of each sentence that is logged, with its file."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in CALLS:
                for argument in node.args:
                    parts = tuple(part for part in constants(argument) if len(part) > 8)
                    if parts:
                        yield path.name, parts


def constants(node: ast.expr) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield from (text.strip(" .,:;") for text in re.split(r"%[a-z]|\. |: ", part.value))


def test_there_are_lines() -> None:
    assert len(list(lines())) > 8


@pytest.mark.parametrize(("file", "parts"), sorted(set(lines())))
def test_the_docs_have_it(file: str, parts: tuple[str, ...]) -> None:
    docs = DOCS.read_text()
    assert parts[0] in docs, f"{file} logs {parts}: docs/operations.md does not say what it means"
