"""HALoS, hierarchical asynchronous local SGD (arXiv 2506.04531), as a PyTorch Lightning strategy.

Importing this package registers the strategies ``"halos"``, ``"halos_spawn"``, ``"halos_fork"`` and
``"halos_notebook"``, and what they are compared with: ``"diloco"``, ``"async_local_sgd"`` and ``"sync_sgd"``.
The process of the command line is an exception: there the package imports Lightning when it is needed, because a
command such as ``lightning-halos status`` would take seconds otherwise.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_halos.version import __version__


def _is_command_line() -> bool:
    program = Path(sys.argv[0]).stem if getattr(sys, "argv", None) else ""
    # `python -m lightning_halos.cli` imports the package before it knows where the program is.
    return program == "lightning-halos" or (program == "-m" and "lightning_halos.cli" in sys.orig_argv)


if TYPE_CHECKING or not _is_command_line():
    from lightning_halos.interface import *


def __getattr__(name: str) -> Any:
    """Imports what is missing; see above."""
    if name in ("data", "optim"):
        return importlib.import_module(f"lightning_halos.{name}")
    if name in __all__:
        from lightning_halos import interface

        return getattr(interface, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AlgorithmStrategy",
    "AsyncLocalSGDStrategy",
    "CheckpointError",
    "DelayedNesterov",
    "DilocoStrategy",
    "HalosMonitor",
    "HalosStrategy",
    "HuggingFaceCheckpoint",
    "LMEvalCallback",
    "PeerFailedError",
    "PeerLostError",
    "SimulatedCluster",
    "SyncSGDStrategy",
    "__version__",
    "evaluate",
]
