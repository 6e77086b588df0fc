"""What counts as trained when a fit starts: the optimizers are those of the Trainer and those that the module keeps."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_halos.training.start import idle_parameters
from lightning_halos.training.trainer_adapter import optimizers_of


class Agent(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)
        self.teacher = nn.Linear(2, 2)


def _keep_in_attribute(module: Any, optimizer: torch.optim.Optimizer) -> None:
    module.optimizer = optimizer


def _keep_in_list(module: Any, optimizer: torch.optim.Optimizer) -> None:
    module.all_optimizers = [optimizer]


def _keep_in_dict_of_a_part(module: Any, optimizer: torch.optim.Optimizer) -> None:
    module.net.optimizers = {"net": optimizer}


def _give_to_trainer(module: Any, optimizer: torch.optim.Optimizer) -> None:
    module.trainer.strategy.optimizers = [optimizer]


@pytest.mark.parametrize("keep", [_keep_in_attribute, _keep_in_list, _keep_in_dict_of_a_part, _give_to_trainer])
def test_parameters_that_no_optimizer_has_are_idle(keep: Any) -> None:
    module = Agent()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    module.trainer = trainer
    assert not idle_parameters(module, optimizers_of(trainer)), "without any optimizer nothing is known"
    keep(module, torch.optim.SGD(module.net.parameters(), lr=0.1))
    assert idle_parameters(module, optimizers_of(trainer)) == {id(p) for p in module.teacher.parameters()}
