import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn

from lightning_halos.training.schedulers import SchedulePosition


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)


def test_a_schedule_moves_without_a_warning_before_the_workers_first_own_step():
    module = Module()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    position = SchedulePosition(module, [LRSchedulerConfig(scheduler, interval="step")], [optimizer], 0, 10, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        position.pull(3, [])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1 / 4)
