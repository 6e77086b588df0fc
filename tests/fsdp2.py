"""FSDP2 and DTensor, wherever the installed torch has them: they were private up to torch 2.5 and 2.4."""

import pytest
import torch.distributed.fsdp

divides_on_cpus = pytest.mark.skipif(
    not hasattr(torch.distributed.fsdp, "fully_shard"), reason="torch 2.4 divides models only on GPUs"
)

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:
    from torch.distributed._composable.fsdp import fully_shard  # type: ignore[no-redef]

try:
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode
except ImportError:
    from torch.distributed._tensor import Shard, distribute_tensor  # type: ignore[no-redef]
    from torch.distributed._tensor.debug import CommDebugMode  # type: ignore[no-redef]

__all__ = ["CommDebugMode", "Shard", "distribute_tensor", "divides_on_cpus", "fully_shard"]
