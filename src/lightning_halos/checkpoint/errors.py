"""The error for checkpoints. Its message names the file and says what to do."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint is incomplete, damaged, or belongs to another model, algorithm or version."""
