"""An environment with torchft 0.2.0, for the benchmarks that compare with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

ENVIRONMENT = Path(__file__).parents[1] / ".venv-torchft"


def install_torchft() -> None:
    """Makes the environment, which sees this one's torch. torchft imports OpenTelemetry."""
    if (ENVIRONMENT / "ready").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    (packages,) = ENVIRONMENT.glob("lib/python*/site-packages")
    (packages / "local.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    install = [str(ENVIRONMENT / "bin" / "pip"), "install", "--quiet"]
    subprocess.run([*install, "--no-deps", "torchft==0.2.0"], check=True)
    telemetry = ["opentelemetry-api", "opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"]
    subprocess.run([*install, *telemetry], check=True)
    (ENVIRONMENT / "ready").touch()
