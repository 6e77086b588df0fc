"""The worker's round: pull, local steps, push.

It only counts. It computes no tensors and measures no time; the caller passes steps and seconds. A worker either waits
for the answer to its push before its next round (:meth:`WorkerRound.receive` alone), or trains on while the push is
answered (:meth:`WorkerRound.train_on` before it).
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
        share: Local steps that the worker may take before it needs an answer; see :class:`Pull`.

    Attributes:
        position: Global step at the last pull; when the worker trained on meanwhile, an estimate for that moment.
        since: Batches since then in which an optimizer stepped.
        batches: Batches of this round so far in which an optimizer stepped.
        is_answered: Whether no push is unanswered.
        stopped: Whether the last pull said that the run is over.
        rate: Global steps per batch of this worker in its previous round; 1 in the first round.
        total_steps: Local steps that this worker has pushed.
        number: Rounds that this worker has pushed.
    """

    def __init__(self, worker: int, local_steps: int, position: int = 0, share: int | None = None) -> None:
        self.worker = worker
        self.position = position
        self.since = 0
        self.batches = 0
        self.is_answered = True
        self.stopped = False
        self.rate = 1.0
        self.total_steps = 0
        self.number = 0
        self._local_steps = local_steps
        self._share = share
        self._ahead = 0  # batches of the unanswered push
        self._pulled = position  # the last pull's position
        self._version: int | None = None
        self._steps = 0
        self._seconds = 0.0
        self._waited = 0.0

    @property
    def over(self) -> bool:
        """Whether the round has all its local steps, or the worker must not take another one without an answer."""
        may_not = self._share is not None and self._ahead + self.batches >= self._share
        return may_not or self.batches >= self._local_steps

    @property
    def has_steps(self) -> bool:
        """Whether the round has any local step."""
        return self._steps > 0

    @property
    def global_step(self) -> int:
        """Estimated global step: that of the last pull, plus the batches since at the previous round's rate."""
        return self.position + int(self.since * self.rate)

    def count(self, steps: int, seconds: float) -> None:
        """Adds optimizer steps and seconds; a call with steps is one batch of the round."""
        self._seconds += seconds
        self._steps += steps
        self.batches += steps > 0
        self.since += steps > 0

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

    def train_on(self) -> None:
        """Starts the next round before the push is answered, with the local steps of the last one."""
        self.is_answered = False
        self._ahead = self.batches
        self._begin()

    def receive(self, pull: Pull, waited: float) -> None:
        """Takes the answer to the push, and starts the next round, unless it has started already.

        Args:
            pull: The answer. Its local steps are those of the next round in either case.
            waited: Seconds that the worker waited for it.
        """
        pushed = self.batches if self.is_answered else self._ahead
        if pushed:
            self.rate = (pull.position - self._pulled) / pushed
        self._pulled = pull.position
        self.stopped = pull.stop
        self._local_steps, self._share = pull.local_steps, pull.share
        self._version = pull.version
        if self.is_answered:
            self._begin()
        self._waited += waited
        self.is_answered, self._ahead = True, 0
        self.position, self.since = pull.position + int(self.batches * self.rate), 0

    def _begin(self) -> None:
        self._steps = self.batches = 0
        self._seconds = self._waited = 0.0
