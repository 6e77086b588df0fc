"""The worker's round: pull, local steps, push.

Rules of this room: no tensors are computed here and no time is taken; the driver says what happened and what it took.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_halos.core.messages import Pull, Push


class WorkerRound:
    """Counts one worker's local steps and says when its round is over.

    Args:
        worker: Global rank of the worker.
        local_steps: Local steps of the first round.
        position: Global step at which the run starts.

    Attributes:
        position: Global step at the last pull.
        batches: Batches of this round so far in which an optimizer stepped.
        stopped: Whether the servers said that the run is over.
        rate: Global steps per batch of this worker in the round before; 1 in the first round.
        total_steps: Local steps that this worker has pushed.
        number: Rounds that this worker has pushed.
    """

    def __init__(self, worker: int, local_steps: int, position: int = 0) -> None:
        self.worker = worker
        self.position = position
        self.batches = 0
        self.stopped = False
        self.rate = 1.0
        self.total_steps = 0
        self.number = 0
        self._local_steps = local_steps
        self._version = 0
        self._steps = 0
        self._seconds = 0.0
        self._waited = 0.0

    @property
    def over(self) -> bool:
        """Whether the round has all its local steps."""
        return self.batches >= self._local_steps

    @property
    def has_steps(self) -> bool:
        """Whether there is anything to push."""
        return self._steps > 0

    @property
    def global_step(self) -> int:
        """An estimate of the global step now: the position, and this round's batches at the rate of the last round."""
        return self.position + int(self.batches * self.rate)

    def compute(self, steps: int, seconds: float) -> None:
        """Takes note of one batch.

        Args:
            steps: Optimizer steps in it; 0 inside a gradient accumulation window.
            seconds: Seconds that it took.
        """
        self._seconds += seconds
        self._steps += steps
        self.batches += steps > 0

    def push(
        self,
        vector: Tensor | None,
        stop: bool = False,
        final: bool = False,
        data: Sequence[tuple[int, int]] = (),
    ) -> Push:
        """Ends the round.

        Args:
            vector: The pseudo-gradient and the buffers; ``None`` if there was no local step.
            stop: Ask for the whole run to stop.
            final: Take part in no further round.
            data: The data that was trained on in it.
        """
        self.total_steps += self._steps
        self.number += 1
        return Push(
            worker=self.worker,
            version=self._version,
            steps=self._steps,
            batches=self.batches,
            seconds=self._seconds,
            waited=self._waited,
            stop=stop,
            final=final,
            vector=vector,
            number=self.number,
            data=list(data),
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns how far the round is."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of :meth:`state_dict`."""
        vars(self).update(state)

    def receive(self, pull: Pull, waited: float) -> None:
        """Begins the next round.

        Args:
            pull: The answer of the local server.
            waited: Seconds between the push and this answer.
        """
        if self.batches:
            self.rate = (pull.position - self.position) / self.batches
        self.position = pull.position
        self.stopped = pull.stop
        self._local_steps = pull.local_steps
        self._version = pull.version
        self._waited = waited
        self._steps = self.batches = 0
        self._seconds = 0.0
