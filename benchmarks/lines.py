"""How many lines of code does each baseline need in addition to those it shares with HALoS?

Counts the lines of the classes and functions that only that baseline uses, without docstrings, comments and empty
lines, and prints their share of the package. Run: python benchmarks/lines.py
"""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src/lightning_halos"
ADDS = {
    "Async-Local-SGD": {
        "core/algorithms/async_local_sgd.py": ["AsyncLocalSGD"],
        "training/strategies.py": ["AsyncLocalSGDStrategy"],
    },
    "DiLoCo": {
        "core/algorithms/diloco.py": ["Diloco"],
        "training/strategies.py": ["DilocoStrategy"],
    },
    "synchronous SGD": {
        "core/algorithms/sync_sgd.py": ["SyncSGD"],
        "training/strategies.py": ["SyncSGDStrategy"],
    },
    "synchronous rounds of both": {
        "core/algorithms/base.py": ["SynchronousAlgorithm"],
        "core/global_server.py": ["SynchronousServer"],
        "core/synchronous_node.py": ["SynchronousNode"],
        "simulation/synchronous_network.py": ["SynchronousNetwork"],
        "training/worlds/lockstep.py": ["LockstepWorld"],
    },
}


def code_lines(path: Path) -> set[int]:
    """Numbers of the lines that are neither empty nor a comment nor part of a docstring."""
    text = path.read_text(encoding="utf-8")
    lines = {number for number, line in enumerate(text.splitlines(), start=1) if line.strip()[:1] not in ("", "#")}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            lines -= set(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return lines


def definition_lines(path: Path, names: list[str]) -> int:
    """Lines of code of the named classes and functions of a file."""
    found = {node.name: node for node in ast.parse(path.read_text(encoding="utf-8")).body if hasattr(node, "name")}
    spans = [range(found[name].lineno, found[name].end_lineno + 1) for name in names]
    return sum(len(code_lines(path).intersection(span)) for span in spans)


def main() -> None:
    """Counts and prints."""
    whole = sum(len(code_lines(path)) for path in PACKAGE.rglob("*.py"))
    for baseline, files in ADDS.items():
        lines = sum(definition_lines(PACKAGE / file, names) for file, names in files.items())
        print(f"{baseline:28}{lines:6}  {lines / whole:6.1%} of the package")
    print(f"{'the complete package':28}{whole:6}")


if __name__ == "__main__":
    main()
