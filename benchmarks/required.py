"""Makes a Python environment that has only what lightning-halos requires, of the packages that are installed here.

Other packages change what a process needs: torchmetrics imports matplotlib, SciPy and transformers if they are there.
This file measures nothing.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import venv
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement


def make_environment(folder: Path) -> Path:
    """Makes the environment, with links to the installed packages. Returns its Python.

    Args:
        folder: Where to make it; it does not exist yet.
    """
    venv.create(folder, symlinks=True)
    schemes = {"base": str(folder), "platbase": str(folder)}
    (site_packages := Path(sysconfig.get_path("purelib", vars=schemes))).mkdir(parents=True, exist_ok=True)
    # Not what the installed package says, because in an editable installation that may be older.
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    dependencies = re.search(r"^dependencies = (\[.*?^\])", project, re.MULTILINE | re.DOTALL)
    assert dependencies is not None
    for package in _required(["lightning-halos", *ast.literal_eval(dependencies[1])]):
        root = Path(str(package.locate_file("")))
        for name in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            if not (link := site_packages / name).exists():
                link.symlink_to(root / name)
    return folder / "bin" / "python"


def _required(requirements: Iterable[str]) -> Iterator[Distribution]:
    """Yields the installed packages that meet requirements, and all that those require."""
    pending, seen = [*map(Requirement, requirements)], set[str]()
    while pending:
        requirement = pending.pop()
        if (key := f"{requirement.name} {sorted(requirement.extras)}") in seen:
            continue
        seen.add(key)
        try:
            package = distribution(requirement.name)
        except PackageNotFoundError:  # not for this platform
            continue
        yield package
        for needed in map(Requirement, package.requires or []):
            extras = requirement.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                pending.append(needed)
