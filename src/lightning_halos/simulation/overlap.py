"""The nodes on a virtual clock with workers that train on while their pushes are answered.

Only the workers' rounds differ from those in ``region_network``: a round begins when the push of the one before leaves
its worker, and ends when it has its local steps and that push is answered. What the servers do is not decided here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lightning_halos.core.messages import Pull, Push
from lightning_halos.simulation.network import Round
from lightning_halos.simulation.region_network import RegionNetwork


class OverlappingNetwork(RegionNetwork):
    """Local servers whose workers have at most one unanswered push.

    Push k of a worker leaves at e(k) and arrives at e(k) + w, where w is the time of a model on the way; the answer
    arrives at a(k) = e(k) + 2 w, or later by the time in which the server applies the pushes before it and this one.
    The worker loads it at the end of the first batch that does not end before a(k). With the time c of its local steps,
    e(k + 1) = max(e(k) + c, a(k)).

    The local steps of a round are decided when it begins, so that exactly the ordered work is done. An answer that
    stops the run therefore takes effect after the round that has begun.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._pushed: dict[int, Round] = {}  # rounds whose push is on its way, by worker

    def running(self) -> list[Round]:
        return [*self._pushed.values(), *self.rounds.values()]

    def due(self) -> list[Round]:
        while True:
            leaving = min(
                (r for r in self.rounds.values() if r.steps), key=lambda r: (r.leaves, r.worker), default=None
            )
            # A worker without more work answers the answer, so its last push follows the one before.
            last = [r for r in self.rounds.values() if not r.steps and r.worker not in self._pushed]
            coming = min([*self._pushed.values(), *last], key=lambda r: (r.end, r.worker), default=None)
            arrival = self._under_way[0][0] if self._under_way else math.inf
            if leaving is not None and leaving.leaves <= min(arrival, math.inf if coming is None else coming.end):
                self._leave(leaving)
            elif coming is not None and coming.end <= arrival:
                return [coming]
            elif not self._under_way:
                return []
            else:
                self._deliver()

    def schedule(self) -> dict[str, Any]:
        pushed = [dataclasses.astuple(self._pushed[worker]) for worker in sorted(self._pushed)]
        return {**super().schedule(), "pushed": pushed}

    def load_schedule(self, schedule: Mapping[str, Any]) -> None:
        pushed = [Round(*fields) for fields in schedule["pushed"]]
        self._pushed = {r.worker: r for r in pushed}
        super().load_schedule(schedule)

    def _take_ended(self, push: Push) -> Round:
        ended = self._pushed.pop(push.worker, None)
        if ended is None:
            return self.rounds.pop(push.worker)
        if push.final:  # the worker has stopped by itself, in the round that ends or after it
            self.rounds.pop(push.worker, None)
        return ended

    def _begin_all(self, pulls: Mapping[int, Pull]) -> None:
        for worker, pull in pulls.items():
            if worker not in self.rounds:  # the first one
                self._follow(self._begin(worker, pull), None)
                continue
            begun = self.rounds[worker]
            pull.stop = not begun.steps and (pull.stop or not self.work.ends_with_data)
            pull.share = None
            if begun.steps:
                pull.local_steps, pull.batches = begun.steps, self._batches(begun, self._delay(begun))

    def _leave(self, leaving: Round) -> None:
        """Sends the push of a round on its way, and begins the worker's next round."""
        worker = leaving.worker
        self.now = leaving.leaves
        self._pushed[worker] = leaving
        stop = self._locals[self._group_of[worker]].is_stopping
        # What is not leased yet is shared by all workers.
        planned = self._planner.local_steps(worker, self._next)
        self._follow(self._begin(worker, Pull(0, planned, 0, stop)), leaving)

    def _follow(self, begun: Round, before: Round | None) -> None:
        """Decides when the push of a round leaves its worker, and when it arrives, given the round before it."""
        if not begun.steps:
            begun.leaves = begun.end = begun.begin if before is None else before.end
            return
        place = self._places[self._group_of[begun.worker]]
        busy = self._timing.busy(begun.worker, begun.steps)
        if before is not None:
            busy = max(busy, 2 * self._timing.way(begun.worker, place))
        begun.leaves = begun.begin + busy
        begun.end = begun.leaves + self._timing.way(begun.worker, place)

    def _delay(self, begun: Round) -> float:
        """Lets a round wait for the answer that leaves the server now. Returns when it arrives, after its begin."""
        index = self._group_of[begun.worker]
        way = self._timing.way(begun.worker, self._places[index])
        if not self._timing.serve:  # `_follow` knew it
            return 2 * way
        answered = self._free[index] + way
        begun.leaves = max(begun.leaves, answered)
        begun.end = begun.leaves + way
        return answered - begun.begin

    def _batches(self, begun: Round, missing: float) -> int:
        """Returns the number of batches of a round at which the worker loads the answer to the push before it."""
        return max(1, min(begun.steps, math.ceil(missing / self._timing.compute(begun.worker, 1))))
