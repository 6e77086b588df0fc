"""The server of synchronous rounds."""

from __future__ import annotations

from torch import Tensor

from lightning_halos.core.parameter_server import ParameterServer


class SynchronousServer(ParameterServer):
    """The server of synchronous rounds (DiLoCo, arXiv 2311.08105): applies the mean of all workers' rounds."""

    def receive(self, mean: Tensor) -> None:
        """Applies the mean of the workers' vectors, and overwrites it with the new model."""
        is_accepted = self._judge(self.find(mean), self.version, 0, "all workers together")
        self.apply(mean, is_accepted, mean)
