"""The package as users install it."""

import json
import subprocess
import sys

IMPORT = """
import json, sys
import lightning
before = set(sys.modules)
import lightning_halos
print(json.dumps(sorted(set(sys.modules) - before)))
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
