"""A model that is sent again and again in a narrow format, as differences to what its receiver has.

The error of one difference is part of the next one, because the sender knows what the receiver has. Updates, which are
no models, have ``error_feedback`` instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from lightning_halos.core.quantization import Format, round_
from lightning_halos.core.vector import CHUNK, Fill, in_parts

SHADOW = "shadow"
"""Name of a shadow's values in states. By this name they are known as slices of the model's vector."""


class Shadow:
    """The parameters that the receiver of a model has. Sender and receiver keep it, bit for bit the same.

    The first model is complete. Each later one travels as its rounded difference to the shadow, which both ends add to
    their shadow; what they have then is the model for the receiver.

    Args:
        parameters: Elements of the model that are parameters. They come first; what follows is always sent as it is.
        form: The format of the differences; only the sender needs it.

    Attributes:
        values: The shadow, of shape (parameters,); ``None`` if the next model must be complete.
    """

    def __init__(self, parameters: int, form: Format = "float32") -> None:
        self.values: Tensor | None = None
        self._parameters = parameters
        self._format = form

    def forget(self) -> None:
        """Makes the next model complete, because nobody knows what the receiver has."""
        self.values = None

    def sending(self, fill: Fill, vector: Tensor) -> tuple[bool, Fill]:
        """Prepares a model for the receiver.

        Args:
            fill: Fills the vector with the model.
            vector: The vector.

        Returns:
            Whether a difference will be sent, and a function that fills the vector with what is sent.
        """
        is_difference = self.values is not None
        if self.values is None:
            self.values = vector.new_empty(self._parameters)
        shadow = self.values

        def use(start: int, stop: int) -> None:
            for part in self._parts(start, stop):
                if is_difference:
                    shadow[part].add_(round_(vector[part].sub_(shadow[part]), self._format))
                else:
                    shadow[part] = vector[part]

        return is_difference, in_parts(fill, vector.numel(), use)

    def receiving(self, vector: Tensor, is_difference: bool, progress: Iterable[int]) -> Iterator[int]:
        """Makes a vector that arrives the model, in place.

        Args:
            vector: The vector.
            is_difference: Whether it has a difference instead of a model.
            progress: Yields the number of elements that have arrived.

        Yields:
            The number of elements that are the model's.

        Raises:
            ValueError: If there is nothing that the difference could be added to.
        """
        if is_difference and self.values is None:
            raise ValueError("A model came as a difference, but the one before is not here.")
        if self.values is None:
            self.values = vector.new_empty(self._parameters)
        done = 0
        for complete in progress:
            for part in self._parts(done, complete):
                if is_difference:
                    vector[part] = self.values[part].add_(vector[part])
                else:
                    self.values[part] = vector[part]
            yield (done := complete)

    def receive(self, vector: Tensor, is_difference: bool) -> None:
        """Makes a vector that has arrived the model, in place."""
        for _ in self.receiving(vector, is_difference, [vector.numel()]):
            pass

    def _parts(self, start: int, stop: int) -> Iterator[slice]:
        stop = min(stop, self._parameters)
        for begin in range(start, stop, CHUNK):
            yield slice(begin, min(begin + CHUNK, stop))
