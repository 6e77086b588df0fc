"""The demo's model with Muon as inner optimizer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim.lr_scheduler import LambdaLR

from lightning_halos.optim import MuonAdamW

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from train_char_lm import ByteGPT


class MuonGPT(ByteGPT):
    """The model with Muon for its hidden matrices; weight decay, betas and schedule as with AdamW."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        with_adamw: Any = super().configure_optimizers()
        (factor,) = with_adamw["lr_scheduler"]["scheduler"].lr_lambdas
        optimizer = MuonAdamW(self, lr=self.hparams["lr"], betas=(0.9, 0.95), weight_decay=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}
