"""The worker's round: pull, local steps, push.

It only counts. It computes no tensors and measures no time; the caller passes steps and seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_halos.core.messages import Pull, Push


class WorkerRound:
    """Counts one worker's local steps and tells when its round is over.

    Args:
        worker: Global rank of the worker.
        local_steps: Local steps of the first round.
        position: Global step at which the run starts.

    Attributes:
        position: Global step at the last pull.
        batches: Batches of this round so far in which an optimizer stepped.
        stopped: Whether the last pull said that the run is over.
        rate: Global steps per batch of this worker in its previous round; 1 in the first round.
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
        self._version: int | None = None
        self._steps = 0
        self._seconds = 0.0
        self._waited = 0.0

    @property
    def over(self) -> bool:
        """Whether the round has all its local steps."""
        return self.batches >= self._local_steps

    @property
    def has_steps(self) -> bool:
        """Whether the round has any local step."""
        return self._steps > 0

    @property
    def global_step(self) -> int:
        """Estimated global step: that of the last pull, plus this round's batches at the previous round's rate."""
        return self.position + int(self.batches * self.rate)

    def count(self, steps: int, seconds: float) -> None:
        """Adds optimizer steps and seconds; a call with steps is one batch of the round."""
        self._seconds += seconds
        self._steps += steps
        self.batches += steps > 0

    def push(
        self, vector: Tensor | None, stop: bool = False, final: bool = False, data: Sequence[tuple[int, int]] = ()
    ) -> Push:
        """Ends the round. Returns its push; see there for the arguments."""
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
        """Returns a copy of the state."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state of :meth:`state_dict`."""
        vars(self).update(state)

    def receive(self, pull: Pull, waited: float) -> None:
        """Starts the next round, given the answer to the push and the seconds until it arrived."""
        if self.batches:
            self.rate = (pull.position - self.position) / self.batches
        self.position = pull.position
        self.stopped = pull.stop
        self._local_steps = pull.local_steps
        self._version = pull.version
        self._waited = waited
        self._steps = self.batches = 0
        self._seconds = 0.0
