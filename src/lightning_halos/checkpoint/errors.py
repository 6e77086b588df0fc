"""What can be wrong with a checkpoint. Every error names the file and says what to do."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint is half-written, damaged, or belongs to another model, algorithm or version."""
