"""docs/pretraining.md runs as written: every block, one after the other, in a folder with nothing but the examples."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.conftest import EXAMPLES
from tests.integration.harness import ending

TUTORIAL = EXAMPLES.parent / "docs" / "pretraining.md"
INSTALLING, OF_THE_HUB = "pip install", "lambada_openai"


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(1200)
def test_every_block_of_the_tutorial_runs(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    blocks = re.findall(r"```(bash|python)\n(.*?)```", TUTORIAL.read_text(), flags=re.DOTALL)
    assert len(blocks) == 9
    for language, code in blocks:
        if INSTALLING in code:
            continue
        status, printed = run(language, code, tmp_path)
        if OF_THE_HUB in code:
            assert status != 0, printed
            assert "needs the network" in printed
        else:
            assert status == 0, f"{code}\n{printed[-4000:]}"
    assert re.search(r"local_lambada .*better", printed), printed  # the last block compares
    assert {path.name for path in (tmp_path / "tiny").iterdir()} >= {"trained", "untrained", "run", "tokens.bin"}


def run(language: str, code: str, folder: Path) -> tuple[int, str]:
    """Returns the exit status and what was printed."""
    command = ["bash", "-euc", code] if language == "bash" else [sys.executable, "-c", code]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
        with ending(process):
            status = process.wait(timeout=300)
    return status, (folder / "log").read_text(errors="replace")
