"""The decisions of a local server: its answers, when it sends an update, and when it is finished.

A message that arrives again is recognized by its number here, so that it is answered again but counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from lightning_halos.core.cursor import Lease, LeaseStock
from lightning_halos.core.finding import Finding
from lightning_halos.core.local_server import LocalServer
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
    Status,
)
from lightning_halos.core.node import Node, grant_of
from lightning_halos.core.protocol import (
    GLOBAL,
    REGION_TRANSITIONS,
    STORAGE,
    ProtocolError,
    RegionEvent,
    RegionState,
    Send,
)
from lightning_halos.core.quantization import Format
from lightning_halos.core.schedule import RoundPlanner, StepBudget
from lightning_halos.core.shadow import Shadow
from lightning_halos.core.snapshot import Shard
from lightning_halos.core.vector import ignore_progress


@dataclass
class _Worker:
    """The node's record of a worker."""

    push: int = 0  # number of its last push
    is_finished: bool = False
    request: int = 0  # number of its last lease request
    grant: LeaseGrant | None = None  # the last one
    news: tuple[int, int] = 0, 0  # the plateau steps in the answer to its last push, from the first to the second


class RegionNode(Node[RegionState, RegionEvent]):
    """A local server with its workers.

    Args:
        server: The local server. If it exchanges nothing, its model is the global model.
        planner: Decides the workers' local steps.
        workers: Global ranks of the workers.
        budget: The step budget, which the node updates: with the steps of its own workers at once, and with those of
            other workers when the global node reports them.
        stock: Training data for the workers; ``None`` if the workers do not share data.
        formats: The format of vectors on the link to each peer, by its address. Default: they travel as they are.

    Attributes:
        server: The local server.
        traffic: Bytes that the server's links have carried inside its region and to other regions. The driver updates
            it.
        first_version: Version of the model that the workers' first rounds start from.
    """

    server: LocalServer

    def __init__(
        self,
        server: LocalServer,
        planner: RoundPlanner,
        workers: Sequence[int],
        budget: StepBudget,
        stock: LeaseStock | None = None,
        formats: Mapping[int, Format] | None = None,
    ) -> None:
        super().__init__(f"Local server {server.index}", RegionState.SERVING, REGION_TRANSITIONS, budget)
        self.server = server
        self.traffic = (0, 0)
        self.first_version = server.version
        self._planner = planner
        self._stock = stock
        self._workers = {rank: _Worker() for rank in workers}
        self._stop = False
        self._reported = 0  # local steps that were reported to the global node
        self._reports = 0
        self._orders = 0
        self._filled_orders = 0
        self._answered = 0  # number of the last update that was answered
        self._marked: set[str] = set()  # saves that this server has taken part in
        # What the workers have of the server's model, and the server of the global model.
        formats = {peer: form for peer, form in (formats or {}).items() if form != "float32"}
        self._shadows = {peer: Shadow(server.num_parameters, form) for peer, form in formats.items() if peer != GLOBAL}
        self._global_shadow = Shadow(server.num_parameters) if GLOBAL in formats else None
        if GLOBAL in formats:
            server.round_updates(formats[GLOBAL])

    def start(self) -> list[Send]:
        return self._lease()

    def handle(self, sender: int, message: Message, finding: Finding | None = None) -> list[Send]:
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
        elif sender in self._workers:
            match message:
                case Push(worker=rank) if rank == sender:
                    return self._on_push(message, finding)
                case LeaseRequest():
                    return self._on_lease_request(sender, message)
        raise ProtocolError(f"{self._name} got an unexpected message from {sender}: {message!r}.")

    def adopt_final_model(self, model: Tensor) -> None:
        """Replaces the model by the final global model after the run, for a later run that continues from there."""
        self.server.adopt_final_model(model)

    def state_dict(self) -> dict[str, Any]:
        return self._state(self.server.state_dict())

    @property
    def shadows(self) -> Mapping[int, Shadow]:
        """The shadows of models on the node's links, by the address of the peer; they are no part of the state."""
        return self._shadows if self._global_shadow is None else {**self._shadows, GLOBAL: self._global_shadow}

    def _state(self, server: dict[str, Any]) -> dict[str, Any]:
        return {"server": server, "speeds": self._planner.state_dict(), "traffic": list(self.traffic)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.server.load_state_dict(state["server"])
        self._planner.load_state_dict(state["speeds"])
        within, between = state["traffic"]
        self.traffic = (within, between)
        self.first_version = self.server.version
        self._answered = self.server.number - self.server.exchanging
        if self.server.exchanging:
            self.state = RegionState.EXCHANGING

    def _on_push(self, push: Push, finding: Finding | None) -> list[Send]:
        worker, vector = self._workers[push.worker], push.vector
        is_new = not 0 < push.number <= worker.push
        if is_new:
            self._count(push, worker)
        is_accepted, answer, is_difference = False, None, False
        fill: Callable[..., object] | None = None
        if vector is not None:
            if is_new:
                version = self.first_version if push.version is None else push.version
                finding = self.server.find(vector) if finding is None else finding
                is_accepted = self.server.judge(push, finding, version)
            answer = self.server.memory_for(vector)
            fill = partial(self.server.apply, vector, is_accepted, answer)
            shadow = self._shadows.get(push.worker)
            if shadow is not None and is_new and not push.final:
                is_difference, fill = shadow.sending(fill, answer)
            elif shadow is not None:
                shadow.forget()  # nobody knows which one of the answers the worker will use
        sends = []
        if not push.final:
            sends.append(Send(push.worker, self._pull(push, answer, is_difference), fill))
        elif fill is not None:
            fill(ignore_progress)
        if not is_new:
            return [Send(push.worker, self._final)] if push.final and self._final is not None else sends
        sends.append(Send(GLOBAL, self._report(push, self.server.staleness if is_accepted else None)))
        if all(other.is_finished for other in self._workers.values()):
            sends.append(self._flush())
        elif self._may_exchange and self.server.is_due:
            sends.append(self._exchange())
        return sends

    @property
    def is_stopping(self) -> bool:
        """Whether no worker may start another round, as far as this node knows."""
        return self._stop or self.budget.exhausted

    @property
    def _may_exchange(self) -> bool:
        """Whether an update that is due may be sent now."""
        return True

    def _count(self, push: Push, worker: _Worker) -> None:
        if worker.is_finished:
            raise ProtocolError(f"Worker {push.worker} pushed again after its final push.")
        self._move(RegionEvent.PUSH)
        worker.push, worker.is_finished = push.number, push.final
        if push.final and self._stock is not None:
            self._stock.cancel(push.worker)
        self._asked_to_stop = self._asked_to_stop or push.stop
        self._reported += push.steps
        self.budget.total += push.steps
        self._stop = self._stop or push.stop
        self._planner.measure(push.worker, push.batches, push.seconds)
        # Repeated answers to a push contain the same plateau steps, because the worker uses only one of the answers.
        worker.news = worker.news[1], len(self._plateau_steps)

    def _pull(self, push: Push, vector: Tensor | None, is_difference: bool) -> Pull:
        return Pull(
            version=self.server.version,
            local_steps=self._planner.local_steps(push.worker, self.budget.total),
            position=self.budget.position,
            stop=self.is_stopping,
            plateau_steps=self._plateau_steps[slice(*self._workers[push.worker].news)],
            metrics=self._metrics,
            vector=vector,
            number=push.number,
            share=self._planner.share(self.budget.total),
            is_difference=is_difference,
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
            epoch=push.epoch,
        )

    def _exchange(self) -> Send:
        """Returns the update that is due."""
        self._move(RegionEvent.UPDATE)
        update = self.server.begin_exchange()
        return Send(GLOBAL, update, partial(self.server.fill, update))

    def _flush(self) -> Send:
        """Returns the last message after all workers have finished: an update, or the model of the only server."""
        self._move(RegionEvent.LAST_PUSH)
        if self.server.exchanges:
            return Send(GLOBAL, self.server.flush(self._asked_to_stop))
        return Send(GLOBAL, RegionModel(self.server.index, self.server.steps, self._asked_to_stop, self.server.model))

    def _on_answer(self, message: GlobalModel) -> list[Send]:
        if message.number <= self._answered:
            return []
        if message.number > self.server.number:
            raise ProtocolError(f"{self._name} got an answer to an update that it did not send.")
        self._move(RegionEvent.ANSWER)
        self._answered = message.number
        if self._global_shadow is not None and message.vector is not None:
            self._global_shadow.receive(message.vector, message.is_difference)
        if self.state is RegionState.SERVING:
            self.server.merge(message)
        return []

    def _on_final_model(self, message: GlobalModel) -> list[Send]:
        if self._final is not None:
            return []
        self._move(RegionEvent.FINAL_MODEL)
        self._final = message
        return self._to_finished(message)

    def _on_status(self, message: Status) -> list[Send]:
        self._move(RegionEvent.STATUS)
        self.budget.total = self._total(message.total + self._reported - message.counted)
        self._planner.set_fastest_overall(message.fastest)
        self._stop = self._stop or message.stop
        self._plateau_steps += message.plateau_steps[len(self._plateau_steps) - message.first_plateau_step :]
        self._metrics = message.metrics
        # Finished workers wait for the final model; the status shows them that the run goes on.
        return [] if self.state is RegionState.FINISHED else self._to_finished(message)

    def _total(self, told: int) -> int:
        """Returns the local steps of all workers, given the global node's count with the server's own steps."""
        return max(self.budget.total, told)

    def _to_finished(self, message: Message) -> list[Send]:
        return [Send(rank, message) for rank, worker in self._workers.items() if worker.is_finished]

    def _on_lease_request(self, rank: int, request: LeaseRequest) -> list[Send]:
        worker = self._workers[rank]
        grant = worker.grant
        if 0 < request.number <= worker.request:
            return [Send(rank, grant)] if grant is not None and grant.number == request.number else []
        if worker.is_finished or worker.request != (0 if grant is None else grant.number):
            raise ProtocolError(f"Worker {rank} asked for data after its final push, or twice at once.")
        self._move(RegionEvent.LEASE_REQUEST)
        if self._stock is None:
            raise ProtocolError(f"Worker {rank} asked for data, but the workers do not share any.")
        worker.request = request.number
        self._stock.ask(rank, request.steps or self._planner.known_steps(rank))
        return self._lease()

    def _on_grant(self, grant: LeaseGrant) -> list[Send]:
        if 0 < grant.number <= self._filled_orders:
            return []
        self._move(RegionEvent.LEASE_GRANT)
        if self._stock is None or grant.number > self._orders:
            raise ProtocolError(f"{self._name} was given data that it did not order: {grant!r}.")
        self._filled_orders = grant.number
        self._stock.add(Lease(grant.epoch, grant.first, grant.steps) if grant.steps else None)
        return self._lease()

    def _lease(self) -> list[Send]:
        """Answers the workers' requests for data, and orders more if necessary."""
        if self._stock is None:
            return []
        sends = []
        for rank, lease in self._stock.serve():
            worker = self._workers[rank]
            worker.grant = grant_of(lease, worker.request)
            sends.append(Send(rank, worker.grant))
        if steps := self._stock.order():
            self._orders += 1
            sends.append(Send(GLOBAL, LeaseRequest(steps, self._orders)))
        return sends

    def _on_marker(self, marker: Marker) -> list[Send]:
        if marker.save in self._marked:
            return []
        self._move(RegionEvent.MARKER)
        self._marked.add(marker.save)
        snapshot = self.server.snapshot()
        shard = Shard(marker, self.server.index, self._state(snapshot.state), snapshot)
        reply = MarkerReply(marker.save, self.server.index, self.server.number)
        markers = [Send(rank, replace(marker, pushed=worker.push)) for rank, worker in self._workers.items()]
        return [*markers, Send(GLOBAL, reply), Send(STORAGE, shard)]
