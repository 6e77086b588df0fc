"""Loggers are told about the checkpoints of their own fit only."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_halos.training.shards import Shards


class Told(CSVLogger):
    def __init__(self, folder: Any) -> None:
        super().__init__(folder)
        self.told: list[ModelCheckpoint] = []

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        self.told.append(checkpoint_callback)


def test_a_fit_does_not_tell_loggers_about_checkpoints_of_a_failed_one(tmp_path: Any) -> None:
    site: Any = None  # the loggers are this process's own
    shards, logger = Shards(site, "HALoS", True), Told(tmp_path)
    failed, succeeded = ModelCheckpoint(), ModelCheckpoint()
    shards.hold_loggers([logger])
    logger.after_save_checkpoint(failed)
    shards.release_loggers()
    shards.hold_loggers([logger])
    logger.after_save_checkpoint(succeeded)
    shards.tell_loggers()
    assert logger.told == [succeeded]
