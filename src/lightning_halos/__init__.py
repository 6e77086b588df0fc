"""HALoS, hierarchical asynchronous local SGD (arXiv 2506.04531), as a PyTorch Lightning strategy.

Importing this package registers the strategies ``"halos"``, ``"halos_spawn"``, ``"halos_fork"`` and
``"halos_notebook"``, and what they are compared with: ``"diloco"``, ``"async_local_sgd"`` and ``"sync_sgd"``.
"""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_halos.callbacks.evaluation import LMEvalCallback
from lightning_halos.callbacks.hugging_face import HuggingFaceCheckpoint
from lightning_halos.callbacks.monitor import HalosMonitor
from lightning_halos.checkpoint.errors import CheckpointError
from lightning_halos.core.optim import DelayedNesterov
from lightning_halos.language.evaluation import evaluate
from lightning_halos.simulation.cluster import SimulatedCluster
from lightning_halos.training.other_packages import refuse_elsewhere
from lightning_halos.training.strategies import AsyncLocalSGDStrategy, DilocoStrategy, HalosStrategy, SyncSGDStrategy
from lightning_halos.training.strategy import AlgorithmStrategy
from lightning_halos.transport.errors import PeerFailedError, PeerLostError
from lightning_halos.version import __version__

for strategy in (HalosStrategy, DilocoStrategy, AsyncLocalSGDStrategy, SyncSGDStrategy):
    strategy.register_strategies(StrategyRegistry)
del strategy
refuse_elsewhere(["halos", "halos_spawn", "halos_fork", "halos_notebook", "diloco", "async_local_sgd", "sync_sgd"])

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
