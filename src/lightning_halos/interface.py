"""What users import from the package, with the strategies registered in Lightning. It imports torch and Lightning."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_halos.callbacks.evaluation import LMEvalCallback
from lightning_halos.callbacks.hugging_face import HuggingFaceCheckpoint
from lightning_halos.callbacks.monitor import HalosMonitor
from lightning_halos.checkpoint.errors import CheckpointError
from lightning_halos.core.delayed_nesterov import DelayedNesterov
from lightning_halos.language.evaluation import evaluate
from lightning_halos.simulation.cluster import SimulatedCluster
from lightning_halos.training.other_packages import refuse_elsewhere
from lightning_halos.training.strategies import AsyncLocalSGDStrategy, DilocoStrategy, HalosStrategy, SyncSGDStrategy
from lightning_halos.training.strategy import AlgorithmStrategy
from lightning_halos.transport.errors import PeerFailedError, PeerLostError

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
    "evaluate",
]
