"""The package as users install it."""

import json
import subprocess
import sys

import lightning_halos
from lightning_halos import interface

PROGRAM = """
import json, sys
sys.argv[0] = "/usr/bin/lightning-halos"
import lightning_halos
assert not {"torch", "lightning"} & set(sys.modules)
import lightning
from lightning.pytorch.strategies import StrategyRegistry
before = set(sys.modules)
from lightning_halos import HalosStrategy
assert StrategyRegistry["halos"]["strategy"] is HalosStrategy
print(json.dumps(sorted(set(sys.modules) - before)))
"""
OPTIONAL = {"accelerate", "datasets", "lm_eval", "matplotlib", "pandas", "peft", "tokenizers", "transformers"}


def test_it_imports_hardly_more_than_lightning_and_in_the_command_line_only_when_it_is_needed() -> None:
    """Commands such as `evaluate` run users' code, which may import anything from it."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True)
    modules = json.loads(done.stdout)
    packages = {name.partition(".")[0] for name in modules}
    assert not packages & OPTIONAL
    assert packages - set(sys.stdlib_module_names) <= {"lightning", "lightning_halos", "msgspec", "torch"}
    # Its own files are small; `import lightning` imports 3,000 modules.
    assert len([name for name in modules if name.partition(".")[0] != "lightning_halos"]) < 50


def test_its_names_are_those_of_its_interface() -> None:
    assert {*lightning_halos.__all__} == {*interface.__all__, "__version__"}


def test_its_public_modules_are_attributes() -> None:
    program = "import lightning_halos as halos; print(halos.optim.MuonAdamW, halos.data.TextDataModule)"
    subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120, check=True)
