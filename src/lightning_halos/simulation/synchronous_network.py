"""Rounds on a virtual clock that start and end together for all workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_halos.core.algorithms import Algorithm
from lightning_halos.core.global_server import SynchronousServer
from lightning_halos.core.messages import Pull, Push
from lightning_halos.core.synchronous_node import SynchronousNode
from lightning_halos.simulation.network import Network, Round, Work
from lightning_halos.simulation.timing import Timing


class SynchronousNetwork(Network):
    """Rounds that start and end together, with an all-reduce (DiLoCo; synchronous SGD, which has no server)."""

    def __init__(self, timing: Timing, work: Work, algorithm: Algorithm, server: SynchronousServer | None) -> None:
        super().__init__(timing, work, algorithm)
        self._node = SynchronousNode(server, self._planner, dataclasses.replace(work.budget))
        self._all_reduce = timing.all_reduce() if self._workers > 1 else 0.0
        if not algorithm.averages_gradients:
            self._all_reduce += timing.serve

    @property
    def model(self) -> Tensor | None:
        return self._node.model

    @property
    def version(self) -> int:
        return self._node.version

    def due(self) -> list[Round]:
        end = min((r.end for r in self.rounds.values()), default=0.0)
        return [self.rounds[worker] for worker in sorted(self.rounds) if self.rounds[worker].end == end]

    def finish(self, pushes: Sequence[Push]) -> None:
        for push in pushes:
            self._end(push)
        vectors = [push.vector for push in pushes if push.vector is not None]
        mean = None
        if vectors:
            mean = torch.zeros_like(vectors[0])
            for vector in vectors:
                mean += vector
            mean /= len(vectors)
        answers = self._node.finish_round(pushes, mean)
        if any(push.steps for push in pushes):
            self._note("round", self.version, self.model)
        for push in pushes:
            answer = answers.get(push.worker)
            if isinstance(answer, Pull) and push.vector is not None:
                assert self.model is not None
                answer.vector = push.vector.copy_(self.model)
        self.outbox += answers.items()
        self.finished = len(self._node.finished) == self._workers
        if self.finished:
            self._note("end", self.version, None)
        else:
            self._begin_all({worker: answer for worker, answer in answers.items() if isinstance(answer, Pull)})

    def publish(self, plateau_steps: Sequence[tuple[int, float]], metrics: dict[str, float]) -> None:
        self._node.publish(plateau_steps, metrics)

    def state_dict(self) -> dict[str, Any]:
        return self._node.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._node.load_state_dict(state)

    def load_schedule(self, schedule: Mapping[str, Any]) -> None:
        super().load_schedule(schedule)
        self._node.budget.total = self.total
        self._node.finished = set(self._left)

    def _begin_all(self, pulls: Mapping[int, Pull]) -> None:
        # If all rounds have the same number of steps, all schedules start at the same global step.
        is_even = len({pull.local_steps for pull in pulls.values()}) == 1
        position = self._node.budget.position if is_even else None
        begun = [self._begin(worker, pulls[worker], position) for worker in sorted(pulls)]
        computing = max((self._timing.compute(r.worker, r.steps) for r in begun), default=0.0)
        for r in begun:
            if r.steps:
                r.end = self.now + computing + self._all_reduce

    def _lease(self, worker: int, steps: int) -> int:
        lease = self._cursor.take(steps)
        return 0 if lease is None else lease.steps
