"""Each command that the documentation and the examples show is one that the command line accepts."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_halos.cli import make_parser

SLOW = {"torch", "lightning", "numpy"}
"""Packages whose import takes long."""

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


def imported(program: list[str], *arguments: object) -> set[str]:
    """Returns the packages that a command imports."""
    command = [sys.executable, "-X", "importtime", *program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}


SCRIPT = Path(sys.executable).with_name("lightning-halos")


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(["-m", "lightning_halos.cli"], id="module"),
        pytest.param([str(SCRIPT)], id="script", marks=pytest.mark.skipif(not SCRIPT.exists(), reason="not installed")),
    ],
)
def test_those_that_need_no_model_start_fast(program: list[str], tmp_path: Path) -> None:
    for arguments in (
        ["--help"],
        ["--version"],
        ["keys", "init", tmp_path, "--host", "localhost"],
        ["keys", "show", tmp_path],
        ["status", "--help"],
        ["serve", "--help"],
        ["serve", "--directory", tmp_path, "--revoke", "us-east"],
    ):
        packages = imported(program, *arguments)
        assert "lightning_halos" in packages
        assert not packages & SLOW, arguments
    assert "torch" in imported(program, "plan", "--help")  # so that the test sees it


def test_an_output_that_nobody_reads_is_no_error(tmp_path: Path) -> None:
    keys = [sys.executable, "-m", "lightning_halos.cli", "keys"]
    subprocess.run([*keys, "init", tmp_path, "--host", "localhost"], check=True, timeout=120)
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*keys, "show", tmp_path], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_they_are_found() -> None:
    found = [command for path in [*PAGES, *FILES] for command in commands(path)]
    assert len(found) > 40
    assert {command.split()[0] for command in found} >= {"keys", "serve", "status", "plan", "export", "evaluate"}
