"""The decisions of a local server: its answers, when it sends an update, and when it is finished.

A node takes one message and returns the messages to send. It has no links, threads or clock, so that the hosts of
``transport`` and the virtual network of ``simulation`` can both drive it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lightning_halos.core.cursor import Lease, LeaseStock
from lightning_halos.core.messages import (
    GlobalModel,
    LeaseGrant,
    LeaseRequest,
    Marker,
    MarkerReply,
    Message,
    Progress,
    Pull,
    Push,
    RegionModel,
    Shard,
    Status,
)
from lightning_halos.core.protocol import (
    GLOBAL,
    REGION_TRANSITIONS,
    STORAGE,
    ProtocolError,
    RegionEvent,
    RegionState,
    Send,
    StateMachine,
)
from lightning_halos.core.schedule import RoundPlanner, StepBudget
from lightning_halos.core.servers import Finding, LocalServer
from lightning_halos.core.vector import ignore_progress


class RegionNode:
    """A local server with its workers.

    Args:
        server: The local server. If it exchanges nothing, its model is the global model.
        planner: Decides the workers' local steps.
        workers: Global ranks of the workers.
        budget: The step budget, which the node updates: with the steps of its own workers at once, and with those of
            other workers when the global node reports them.
        stock: Training data for the workers; ``None`` if the workers do not share data.

    Attributes:
        server: The local server.
        budget: The step budget.
        traffic: Bytes that the server's links have carried inside its region and to other regions. The driver updates
            it.
    """

    def __init__(
        self,
        server: LocalServer,
        planner: RoundPlanner,
        workers: Sequence[int],
        budget: StepBudget,
        stock: LeaseStock | None = None,
    ) -> None:
        self.server = server
        self.budget = budget
        self.traffic = (0, 0)
        self._planner = planner
        self._stock = stock
        self._machine = StateMachine(f"Local server {server.index}", RegionState.SERVING, REGION_TRANSITIONS)
        self._working = set(workers)
        self._finished: list[int] = []
        self._stop = self._asked_to_stop = False
        self._counted = 0  # local steps that were reported to the global node
        self._reports = 0
        self._orders = 0
        self._granted = 0  # number of the last order that was answered
        self._asked: dict[int, int] = dict.fromkeys(workers, 0)  # number of each worker's last lease request
        self._leased: dict[int, LeaseGrant] = {}  # the last grant of each worker
        self._plateau_steps: list[tuple[int, float]] = []
        self._plateaus_had = dict.fromkeys(workers, 0)  # plateau steps that each worker had when it pushed
        self._plateaus_sent = dict.fromkeys(workers, 0)
        self._metrics: dict[str, float] = {}
        self._answered = 0  # number of the last update that was answered
        self._marked: set[str] = set()  # saves that this server has taken part in
        self._final: GlobalModel | None = None

    @property
    def state(self) -> RegionState:
        """The state of the node."""
        return self._machine.state

    @property
    def version(self) -> int:
        """Number of pushes in the server's model."""
        return self.server.version

    @property
    def model(self) -> Tensor:
        """The server's model."""
        return self.server.model

    def start(self) -> list[Send]:
        """Orders the first data."""
        return self._lease()

    def inspect(self, message: Message, progress: Iterable[int]) -> Finding | None:
        """Inspects the vector of a message while it arrives. Reads nothing that :meth:`handle` changes.

        Args:
            message: The message.
            progress: Yields the number of elements that have arrived so far.
        """
        if isinstance(message, Push) and message.vector is not None:
            return self.server.inspect(message.vector, progress)
        for _ in progress:
            pass
        return None

    def handle(self, sender: int, message: Message, finding: Finding | None = None) -> list[Send]:
        """Handles a message.

        Args:
            sender: Global rank of a worker, or ``GLOBAL``.
            message: The message. Its vector may be written to.
            finding: The result of :meth:`inspect`. Default: inspect the vector now.

        Returns:
            The messages to send, in this order.

        Raises:
            ProtocolError: If the node's state does not allow the message, or the sender may not send it.
        """
        if sender == GLOBAL:
            match message:
                case GlobalModel():
                    return self._on_final_model(message) if message.final else self._on_answer(message)
                case Status():
                    return self._on_status(message)
                case LeaseGrant():
                    return self._on_grant(message)
                case Marker():
                    return self._on_marker(message)
        elif sender in self._asked:
            match message:
                case Push() if message.worker == sender:
                    return self._on_push(message, finding)
                case LeaseRequest():
                    return self._on_lease_request(sender, message)
        raise ProtocolError(f"Local server {self.server.index} got an unexpected message from {sender}: {message!r}.")

    def adopt_final_model(self, model: Tensor) -> None:
        """Replaces the model by the final global model after the run, for a later run that continues from there."""
        self.server.adopt_final_model(model)

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of the state from which a later run can continue."""
        return self._state(self.server.state_dict())

    def _state(self, server: dict[str, Any]) -> dict[str, Any]:
        return {"server": server, "speeds": self._planner.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state of :meth:`state_dict`, before :meth:`start`."""
        self.server.load_state_dict(state["server"])
        self._planner.load_state_dict(state["speeds"])
        self._answered = self.server.number - self.server.exchanging
        if self.server.exchanging:
            self._machine.state = RegionState.EXCHANGING

    def _on_push(self, push: Push, finding: Finding | None) -> list[Send]:
        rank = push.worker
        is_new = not 0 < push.number <= self.server.received.get(rank, 0)
        if is_new:
            self._count(push)
        sends: list[Send] = []
        staleness = None
        if push.vector is not None:
            finding = self.server.inspect(push.vector) if finding is None else finding
            answer, is_good = self.server.accept(push, finding)
            staleness = self.server.staleness if is_good else None
            apply = partial(self.server.apply, push, is_good, answer)
            if push.final:
                apply(ignore_progress)
            else:
                sends.append(Send(rank, self._pull(push, answer), apply))
        else:
            self.server.received[rank] = max(push.number, self.server.received.get(rank, 0))
            if not push.final:
                sends.append(Send(rank, self._pull(push, None)))
        if not is_new:
            return [Send(rank, self._final)] if push.final and self._final is not None else sends
        sends.append(Send(GLOBAL, self._report(push, staleness)))
        if push.final:
            self._working.remove(rank)
            self._finished.append(rank)
            if self._stock is not None:
                self._stock.cancel(rank)
        if not self._working:
            sends.append(self._flush())
        elif self.server.is_due:
            self._machine.move(RegionEvent.UPDATE)
            update = self.server.begin_exchange()
            sends.append(Send(GLOBAL, update, partial(self.server.fill, update)))
        return sends

    def _count(self, push: Push) -> None:
        if push.worker not in self._working:
            raise ProtocolError(f"Worker {push.worker} pushed again after its final push.")
        self._machine.move(RegionEvent.PUSH)
        self._asked_to_stop = self._asked_to_stop or push.stop
        self._counted += push.steps
        self.budget.total += push.steps
        self._stop = self._stop or push.stop or self.budget.exhausted
        self._planner.measure(push.worker, push.batches, push.seconds)
        # Repeated answers to a push contain the same plateau steps, because the worker uses only one of the answers.
        self._plateaus_had[push.worker] = self._plateaus_sent[push.worker]
        self._plateaus_sent[push.worker] = len(self._plateau_steps)

    def _pull(self, push: Push, vector: Tensor | None) -> Pull:
        rank = push.worker
        return Pull(
            version=self.server.version,
            local_steps=self._planner.local_steps(rank, self.budget.total),
            position=self.budget.position,
            stop=self._stop,
            plateau_steps=self._plateau_steps[self._plateaus_had[rank] : self._plateaus_sent[rank]],
            metrics=self._metrics,
            vector=vector,
            number=push.number,
        )

    def _report(self, push: Push, staleness: int | None) -> Progress:
        self._reports += 1
        within, between = self.traffic
        return Progress(
            server=self.server.index,
            number=self._reports,
            worker=push.worker,
            steps=push.steps,
            seconds=push.seconds,
            waited=push.waited,
            fastest=self._planner.fastest_here,
            staleness=staleness,
            updates=self.server.version,
            merges=self.server.merges,
            rejected=self.server.rejections.get(push.worker, 0),
            bytes_within_regions=within,
            bytes_between_regions=between,
            stop=push.stop,
            data=push.data,
        )

    def _flush(self) -> Send:
        """Returns the last message after all workers have finished: an update, or the model of the only server."""
        self._machine.move(RegionEvent.LAST_PUSH)
        if not self.server.exchanges:
            model = RegionModel(self.server.index, self.server.steps, self._asked_to_stop, self.server.model)
            return Send(GLOBAL, model)
        return Send(GLOBAL, self.server.flush(self._asked_to_stop))

    def _on_answer(self, message: GlobalModel) -> list[Send]:
        if message.number <= self._answered:
            return []
        if message.number > self.server.number:
            raise ProtocolError(f"Local server {self.server.index} got an answer to an update that it did not send.")
        self._machine.move(RegionEvent.ANSWER)
        self._answered = message.number
        if self.state is RegionState.SERVING:
            self.server.merge(message)
        return []

    def _on_final_model(self, message: GlobalModel) -> list[Send]:
        if self._final is not None:
            return []
        self._machine.move(RegionEvent.FINAL_MODEL)
        self._final = message
        return [Send(rank, message) for rank in self._finished]

    def _on_status(self, message: Status) -> list[Send]:
        self._machine.move(RegionEvent.STATUS)
        self.budget.total = max(self.budget.total, message.total + self._counted - message.counted)
        self._planner.set_fastest_overall(message.fastest)
        self._stop = self._stop or message.stop or self.budget.exhausted
        self._plateau_steps += message.plateau_steps[len(self._plateau_steps) - message.first_plateau_step :]
        self._metrics = message.metrics
        if self.state is RegionState.FINISHED:
            return []
        # Finished workers wait for the final model; the status shows them that the run goes on.
        return [Send(rank, message) for rank in self._finished]

    def _on_lease_request(self, rank: int, request: LeaseRequest) -> list[Send]:
        grant = self._leased.get(rank)
        answered = 0 if grant is None else grant.number
        if 0 < request.number <= self._asked[rank]:
            return [Send(rank, grant)] if grant is not None and answered == request.number else []
        if rank not in self._working or self._asked[rank] != answered:
            raise ProtocolError(f"Worker {rank} asked for data after its final push, or twice at once.")
        self._machine.move(RegionEvent.LEASE_REQUEST)
        if self._stock is None:
            raise ProtocolError(f"Worker {rank} asked for data, but the workers do not share any.")
        self._asked[rank] = request.number
        self._stock.ask(rank, request.steps or self._planner.known_steps(rank))
        return self._lease()

    def _on_grant(self, grant: LeaseGrant) -> list[Send]:
        if 0 < grant.number <= self._granted:
            return []
        self._machine.move(RegionEvent.LEASE_GRANT)
        if self._stock is None or grant.number > self._orders:
            raise ProtocolError(f"Local server {self.server.index} was given data that it did not order: {grant!r}.")
        self._granted = grant.number
        self._stock.add(Lease(grant.epoch, grant.first, grant.steps) if grant.steps else None)
        return self._lease()

    def _lease(self) -> list[Send]:
        """Answers the workers' requests for data, and orders more if necessary."""
        if self._stock is None:
            return []
        sends = []
        for rank, lease in self._stock.serve():
            grant = self._leased[rank] = grant_of(lease, self._asked[rank])
            sends.append(Send(rank, grant))
        if steps := self._stock.order():
            self._orders += 1
            sends.append(Send(GLOBAL, LeaseRequest(steps, self._orders)))
        return sends

    def _on_marker(self, marker: Marker) -> list[Send]:
        if marker.save in self._marked:
            return []
        self._machine.move(RegionEvent.MARKER)
        self._marked.add(marker.save)
        snapshot = self.server.snapshot()
        shard = Shard(marker, self.server.index, self._state(snapshot.state), snapshot)
        reply = MarkerReply(marker.save, self.server.index, self.server.number)
        workers = [Send(rank, marker) for rank in self._asked]
        return [*workers, Send(GLOBAL, reply), Send(STORAGE, shard)]


def grant_of(lease: Lease | None, number: int) -> LeaseGrant:
    """Returns the answer to the lease request ``number``; ``None`` means that no data is left."""
    return LeaseGrant(0, 0, 0, number) if lease is None else LeaseGrant(lease.epoch, lease.first, lease.steps, number)
