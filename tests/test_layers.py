"""Private names of other packages stay in ``compat``. Which layer may import which is in ``pyproject.toml``."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_halos

SOURCE = Path(lightning_halos.__file__).parent
COMPAT = {"core/compat.py", "training/compat.py"}
OVERRIDDEN = {"_configure_launcher", "_launcher"}  # of Lightning's Strategy; training/compat.py says so
OF_OTHERS = {"os._exit", "self.load()._fingerprint"}  # of Python, and of datasets, which documents it
FILES = sorted(str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py"))


@pytest.mark.parametrize("name", [name for name in FILES if name not in COMPAT])
def test_private_names_of_other_packages_are_only_in_compat(name: str) -> None:
    assert sorted(foreign_names(parsed(SOURCE / name))) == []


@pytest.mark.parametrize("name", sorted(COMPAT))
def test_the_check_finds_private_names(name: str) -> None:
    assert list(foreign_names(parsed(SOURCE / name)))


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def foreign_names(tree: ast.Module) -> Iterator[str]:
    """The private names that a file imports, or reads of objects, without having defined them."""
    own = defined(tree) | OVERRIDDEN
    inherited = set[str]().union(*map(defined, imported(tree)))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            path = f"{node.module}."
            yield from (path + alias.name for alias in node.names if is_private(path + alias.name))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            if is_self(node.value) and node.attr in inherited:
                continue
            yield from {ast.unparse(node)} - OF_OTHERS


def imported(tree: ast.Module) -> Iterator[ast.Module]:
    """The files of this package that a file imports names from, whose classes it may inherit from, and theirs."""
    waiting, seen = [tree], set[Path]()
    while waiting:
        new = imports(waiting.pop()) - seen
        seen |= new
        waiting += map(parsed, new)
        yield from map(parsed, new)


@functools.cache
def imports(tree: ast.Module) -> frozenset[Path]:
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module is not None}
    ours = (SOURCE.parent / f"{name.replace('.', '/')}.py" for name in names if name.startswith("lightning_halos."))
    return frozenset(path for path in ours if path.exists())


@functools.cache
def defined(tree: ast.Module) -> frozenset[str]:
    """Names that a file defines: functions, classes, fields, and attributes that something is assigned to."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(names)


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def is_private(name: str) -> bool:
    return re.search(r"(^|\.)_[a-z]", name) is not None
