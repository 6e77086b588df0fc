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

strategies = (HalosStrategy, DilocoStrategy, AsyncLocalSGDStrategy, SyncSGDStrategy)
for strategy in strategies:
    strategy.register_strategies(StrategyRegistry)
refuse_elsewhere([name for name, entry in StrategyRegistry.items() if entry["strategy"] in strategies])
del strategies, strategy

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
