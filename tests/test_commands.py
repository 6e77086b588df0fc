"""Each command that the documentation and the examples show is one that the command line accepts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lightning_halos.cli import make_parser

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
FILES = sorted(path for path in ROOT.glob("examples/deploy/**/*") if path.is_file())


def commands(path: Path) -> list[str]:
    text = path.read_text()
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"^ *```bash\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE))
    text = re.sub(r"\\\n[#\s]*", "", text)
    found = re.findall(r"(?:lightning-halos|-m lightning_halos\.cli) ((?:[a-z-]+ ?)(?:[^\n#;&|`)]*))", text)
    return [command.replace(" - ", " ").strip() for command in found if "..." not in command]


@pytest.mark.parametrize("path", [path for path in [*PAGES, *FILES] if commands(path)], ids=lambda path: path.name)
def test_commands_are_accepted(path: Path) -> None:
    for command in commands(path):
        try:
            make_parser().parse_args(shlex.split(command))
        except SystemExit:
            pytest.fail(f"lightning-halos {command}")


def test_they_are_found() -> None:
    found = [command for path in [*PAGES, *FILES] for command in commands(path)]
    assert len(found) > 40
    assert {command.split()[0] for command in found} >= {"keys", "serve", "status", "plan", "export", "evaluate"}
