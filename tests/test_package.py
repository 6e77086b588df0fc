"""The package as users install it."""

import json
import subprocess
import sys

import lightning_halos
from lightning_halos import interface

IMPORT = """
import json, sys
import lightning
before = set(sys.modules)
import lightning_halos
print(json.dumps(sorted(set(sys.modules) - before)))
"""
IN_THE_COMMAND_LINE = """
import sys
sys.argv[0] = "/usr/bin/lightning-halos"
import lightning_halos
assert not {"torch", "lightning"} & set(sys.modules)
from lightning_halos import HalosStrategy
from lightning.pytorch.strategies import StrategyRegistry
assert StrategyRegistry["halos"]["strategy"] is HalosStrategy
"""
OPTIONAL = {"accelerate", "datasets", "lm_eval", "matplotlib", "pandas", "peft", "tokenizers", "transformers"}


def test_importing_it_imports_hardly_more_than_lightning() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=120, check=True)
    modules = json.loads(done.stdout)
    packages = {name.partition(".")[0] for name in modules}
    assert not packages & OPTIONAL
    assert packages - set(sys.stdlib_module_names) <= {"lightning", "lightning_halos", "msgspec", "torch"}
    # Its own files are small; `import lightning` imports 3,000 modules.
    assert len([name for name in modules if name.partition(".")[0] != "lightning_halos"]) < 50


def test_in_the_process_of_the_command_line_it_imports_lightning_when_it_is_needed() -> None:
    """Commands such as `evaluate` run users' code, which may import anything from it."""
    subprocess.run([sys.executable, "-c", IN_THE_COMMAND_LINE], timeout=120, check=True)


def test_its_names_are_those_of_its_interface() -> None:
    assert {*lightning_halos.__all__} == {*interface.__all__, "__version__"}
