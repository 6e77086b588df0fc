"""Properties for every topology and order of messages, with lost and repeated messages and restarted servers.

The network of this test keeps the order of what a sender sends, as links do, but loses messages and brings them again,
however late; a sender without an answer sends again. What comes again is answered, and not applied again, as by the
nodes (see ``tests/chaos``). Servers restart from their own state. Beside the real servers run plain ones, in lists of
Python's floats: they have to agree at every moment.
"""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_halos.core.cursor import DataCursor, LeaseStock, Spans
from lightning_halos.core.delayed_nesterov import DelayedNesterov
from lightning_halos.core.global_server import GlobalServer
from lightning_halos.core.local_server import LocalServer
from lightning_halos.core.messages import GlobalModel, Pull, Push, RegionUpdate
from lightning_halos.core.schedule import RoundPlanner, StepBudget
from lightning_halos.core.worker import WorkerRound

from .receiving import receive

START = [1.0, -2.0, 10.0]  # two parameters and a buffer
SHAPES = [torch.Size([2])]
LOCAL_STEPS = 4
somewhere = st.integers(0, 10_000)  # which of those that there are


class PlainServer:
    """A server in plain arithmetic: Delayed Nesterov as its docstring has it, and the mean of the buffers."""

    def __init__(self, start: list[float], senders: int, lr: float, momentum: float, delay: int) -> None:
        self.model, self.senders, self.version = list(start), senders, 0
        self.lr, self.beta, self.d = lr, momentum, delay
        self.m, self.delta, self.t = [0.0, 0.0], [0.0, 0.0], 0

    def apply(self, update: list[float]) -> None:
        self.version += 1
        lr, beta, d, p, g = self.lr, self.beta, self.d, self.model, update
        trained = any(g[:2])  # momentum does not move a parameter that was not trained
        self.t += trained
        for i in range(2 if trained else 0):
            self.delta[i] += g[i]
            if self.t % d:
                p[i] -= lr * g[i]
            else:
                self.m[i] = beta * self.m[i] + self.delta[i] / d
                p[i] -= lr * d * (beta * self.m[i] + g[i] / d)
                self.delta[i] = 0.0
        p[2] += (g[2] - p[2]) / self.senders


class PlainLocalServer(PlainServer):
    """Accumulation and merge in plain arithmetic."""

    def __init__(self, start: list[float], k: int | None, alpha: float, **options: Any) -> None:
        super().__init__(start, **options)
        self.base = [0.0] * 3 if k is None else list(start)
        self.k, self.alpha, self.merged_at, self.base_version = k, alpha, 0, 0
        self.steps = self.sent = 0
        self.exchanging = False

    def wants_to_send(self) -> bool:
        return self.k is not None and not self.exchanging and self.version - self.merged_at >= self.k

    def take(self, final: bool) -> tuple[list[float], int]:
        weight = min(1, self.k / max(1, self.version - self.base_version)) if final and self.k else 1
        changes = [weight * (base - value) for base, value in zip(self.base[:2], self.model[:2], strict=True)]
        accumulated = [*changes, self.model[2]]
        self.base, self.base_version, steps, self.steps = list(self.model), self.version, self.steps, 0
        self.sent += 1
        return accumulated, steps

    def merge(self, model: list[float]) -> None:
        self.model = [(1 - self.alpha) * mine + self.alpha * its for mine, its in zip(self.model, model, strict=True)]
        self.base, self.merged_at, self.exchanging = list(self.model), self.version, False
        self.base_version = self.version


Sender = tuple[str, int]
"""``("worker", rank)`` or ``("server", index)``."""


@dataclass
class Wire:
    """The messages of one sender. They keep their order, but each may be lost or repeated.

    Attributes:
        sent: All messages so far, in their order.
        arrived: How many of them came at least once.
        answered: How many of them the sender has an answer to.
        copies: Indices of what is on its way.
    """

    sent: list[Push | RegionUpdate] = field(default_factory=list)
    arrived: int = 0
    answered: int = 0
    copies: list[int] = field(default_factory=list)

    @property
    def waits(self) -> bool:
        return self.answered < len(self.sent)

    @property
    def deliverable(self) -> list[int]:
        return [index for index in self.copies if index <= self.arrived]

    def send(self, message: Push | RegionUpdate) -> None:
        self.copies.append(len(self.sent))
        self.sent.append(message)

    def deliver(self, index: int) -> tuple[Push | RegionUpdate, bool]:
        """Returns a copy of a message, and whether it arrives for the first time."""
        self.copies.remove(index)
        is_first = index == self.arrived
        self.arrived += is_first
        return copy.deepcopy(self.sent[index]), is_first


@dataclass
class Answer:
    """An answer on its way, and the plain server's model when it was given."""

    to: Sender
    number: int
    message: Pull | GlobalModel
    plain: list[float]


class Network:
    """Workers, local servers and the global server, and all events between them."""

    def __init__(
        self,
        draw: Random,
        groups: list[int],
        k: int,
        alpha: float,
        momenta: tuple[float, float],
        delays: tuple[int, int],
        max_steps: int | None,
    ) -> None:
        self.draw = draw
        workers = sum(groups)
        local = {"lr": 0.5, "momentum": momenta[0], "delay": delays[0]}
        above = {"lr": 0.25, "momentum": momenta[1], "delay": delays[1]}
        self.make_local = lambda index: LocalServer(
            index,
            torch.tensor(START, dtype=torch.float64),
            partial(DelayedNesterov, **local),
            k,
            alpha,
            SHAPES,
            groups[index],
        )
        self.make_global = lambda: GlobalServer(
            torch.tensor(START, dtype=torch.float64),
            partial(DelayedNesterov, **above),
            SHAPES,
            len(groups),
        )
        self.servers = [self.make_local(index) for index in range(len(groups))]
        self.center = self.make_global()
        self.plain = [PlainLocalServer(START, k, alpha, senders=group, **local) for group in groups]
        self.plain_center = PlainServer(START, len(groups), **above)
        self.home = [index for index, group in enumerate(groups) for _ in range(group)]
        self.budget, self.ordered = StepBudget(workers, max_steps), max_steps
        self.planner = RoundPlanner(LOCAL_STEPS, True, workers, max_steps)
        self.rounds = [WorkerRound(rank, self.planner.local_steps(rank, 0)) for rank in range(workers)]
        self.present = [{w for w in range(workers) if self.home[w] == index} for index in range(len(groups))]
        self.good, self.bad = [0] * len(groups), [0] * len(groups)
        self.wires: dict[Sender, Wire] = {("worker", rank): Wire() for rank in range(workers)}
        self.wires |= {("server", index): Wire() for index in range(len(groups))}
        self.answers: list[Answer] = []

    # ------------------------------------------------------------------ what can happen

    def step(self) -> None:
        """A random event: usually a regular one, sometimes a fault."""
        happens = self.draw.choices(
            [self.go_on, self.send_again, self.answer_again_later, self.lose, self.restart], [16, 1, 1, 1, 1]
        )
        happens[0]()

    def go_on(self) -> None:
        """A worker finishes a round, or a message or an answer arrives."""
        working = [(self._work, (w,)) for group in self.present for w in group if not self.wires["worker", w].waits]
        messages = [(self._arrive, (wire, index)) for wire in self.wires.values() for index in wire.deliverable]
        possible = [*working, *messages, *((self._take_answer, (answer,)) for answer in self.answers)]
        if possible:
            happens, arguments = self.draw.choice(possible)
            happens(*arguments)

    def send_again(self) -> None:
        if sent := [(wire, index) for wire in self.wires.values() for index in range(len(wire.sent))]:
            wire, index = self.draw.choice(sent)
            wire.copies.append(index)

    def answer_again_later(self) -> None:
        if self.answers:
            self.answers.append(copy.deepcopy(self.draw.choice(self.answers)))

    def lose(self) -> None:
        if places := [place for place in (*(wire.copies for wire in self.wires.values()), self.answers) if place]:
            place = self.draw.choice(places)
            place.pop(self.draw.randrange(len(place)))

    def restart(self) -> None:
        index = self.draw.randrange(len(self.servers) + 1)
        if index == len(self.servers):
            self.center = _restarted(self.center, self.make_global())
        elif self.present[index]:  # after its last update, the state of a server is that of one that begins anew
            self.servers[index] = _restarted(self.servers[index], self.make_local(index))

    # ------------------------------------------------------------------ what holds at every moment

    def check(self) -> None:
        self.no_update_is_lost_or_applied_twice()
        self.steps_are_conserved()
        self.the_budget_is_kept()

    def no_update_is_lost_or_applied_twice(self) -> None:
        for server, plain, good, bad in zip(self.servers, self.plain, self.good, self.bad, strict=True):
            assert (server.version, server.rejected) == (good, bad)
            assert server.model.tolist() == pytest.approx(plain.model)
        assert self.center.version == self.plain_center.version
        assert self.center.model.tolist() == pytest.approx(self.plain_center.model)

    def steps_are_conserved(self) -> None:
        arrived = on_their_way = 0
        for (kind, _), wire in self.wires.items():
            if kind == "worker":
                arrived += sum(push.steps for push in wire.sent[: wire.arrived])
            else:
                on_their_way += sum(update.steps for update in wire.sent[wire.arrived :])
        kept = sum(server.state_dict()["steps"] for server in self.servers)
        assert self.center.steps + on_their_way + kept == self.budget.total == arrived

    def the_budget_is_kept(self) -> None:
        if self.ordered is not None:
            assert self.budget.total <= len(self.rounds) * (self.ordered + LOCAL_STEPS)
            assert self.budget.position <= self.ordered

    # ------------------------------------------------------------------ and in the end

    def end(self) -> None:
        """All workers repeat unanswered messages until they are answered, and start no further round."""
        for worker, index in enumerate(self.home):
            self._send_until_answered(("worker", worker))
            if worker in self.present[index]:
                self._leave(worker)
        for index in range(len(self.servers)):
            self._send_until_answered(("server", index))
        self.check()
        assert self.center.steps == sum(round_.total_steps for round_ in self.rounds)

    # ------------------------------------------------------------------ how

    def _work(self, worker: int) -> None:
        """A worker finishes a round. Some rounds contain NaN; some are the worker's last."""
        draw, round_ = self.draw, self.rounds[worker]
        if round_.stopped:
            self._leave(worker)
            return
        while not round_.over:
            round_.count(steps=1, seconds=draw.randint(1, 4))
        values = [float(draw.randint(-8, 8)) for _ in START]
        if draw.random() < 0.1:
            values[draw.randrange(3)] = float("nan")
        vector = torch.tensor(values, dtype=torch.float64)
        self.wires["worker", worker].send(round_.push(vector, final=draw.random() < 0.01))

    def _send_until_answered(self, sender: Sender) -> None:
        wire = self.wires[sender]
        while wire.waits:
            wire.copies.append(wire.answered)
            self._arrive(wire, wire.answered)
            self._take_answer(self.answers[-1])

    def _arrive(self, wire: Wire, index: int) -> None:
        message, is_first = wire.deliver(index)
        if isinstance(message, Push):
            self._push(message, is_first)
        else:
            self._update(message, is_first)

    def _push(self, push: Push, is_first: bool) -> None:
        index, values = self.home[push.worker], push.vector.tolist()
        server, plain = self.servers[index], self.plain[index]
        is_good = bool(push.vector.isfinite().all())
        if is_first:
            vector, update = receive(server, push)
            self.budget.total += push.steps
            self.planner.measure(push.worker, push.batches, push.seconds)
            plain.steps += push.steps
            self.good[index] += is_good
            self.bad[index] += not is_good
            if is_good:
                plain.apply(values)
        else:
            vector, update = push.vector, None
            server.apply(vector, False, vector)
        assert vector.tolist() == pytest.approx(plain.model)
        assert (update is not None) == (is_first and plain.wants_to_send())
        if update is not None:
            plain.exchanging = True
            self._send(index, update)
        local_steps = self.planner.local_steps(push.worker, self.budget.total)
        pull = Pull(server.version, local_steps, self.budget.position, self.budget.exhausted, vector=vector)
        self.answers.append(Answer(("worker", push.worker), push.number, pull, plain.model))
        if push.final and is_first:
            self._leave(push.worker)

    def _leave(self, worker: int) -> None:
        index = self.home[worker]
        self.present[index].remove(worker)
        if not self.present[index]:
            self._send(index, self.servers[index].flush())

    def _send(self, index: int, update: RegionUpdate) -> None:
        accumulated, steps = self.plain[index].take(update.final)
        assert update.vector.tolist() == pytest.approx(accumulated)
        assert update.steps == steps
        self.wires["server", index].send(update)

    def _update(self, update: RegionUpdate, is_first: bool) -> None:
        values, plain = update.vector.tolist(), self.plain_center
        reply = self.center.receive(update) if is_first else self.center.answer(update)
        if is_first and (update.steps or not update.final):
            plain.apply(values)
        assert reply.vector.tolist() == pytest.approx(plain.model)
        self.answers.append(Answer(("server", update.server), update.number, reply, list(plain.model)))

    def _take_answer(self, answer: Answer) -> None:
        self.answers = [other for other in self.answers if other is not answer]
        (_, who), wire = answer.to, self.wires[answer.to]
        is_awaited = answer.number == wire.answered + 1
        if isinstance(answer.message, GlobalModel):
            server, plain = self.servers[who], self.plain[who]
            if is_awaited and plain.exchanging and self.present[who]:
                server.merge(answer.message)
                plain.merge(answer.plain)
        elif is_awaited:
            self.rounds[who].receive(answer.message, waited=0.0)
        wire.answered = max(wire.answered, answer.number)


def _restarted(old: Any, new: Any) -> Any:
    """A new server that replaces an old one, from its state in a file of tensors and plain values."""
    file = io.BytesIO()
    torch.save(old.state_dict(), file)
    file.seek(0)
    new.load_state_dict(torch.load(file, weights_only=True))
    return new


@settings(max_examples=60)
@given(
    seed=somewhere,
    events=st.integers(100, 400),
    groups=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    k=st.integers(1, 4),
    alpha=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    momenta=st.tuples(*[st.sampled_from([0.0, 0.5])] * 2),
    delays=st.tuples(*[st.integers(1, 3)] * 2),
    max_steps=st.none() | st.integers(1, 100),
)
def test_servers_agree_with_plain_arithmetic_whatever_is_lost_repeated_or_restarted(seed, events, **topology) -> None:
    network = Network(Random(seed), **topology)
    for _ in range(events):
        network.step()
        network.check()
    network.end()


@given(
    steps_per_epoch=st.integers(1, 12),
    epochs=st.integers(1, 3),
    first=st.integers(0, 15),
    ahead=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    order=st.lists(st.tuples(st.booleans(), somewhere, st.integers(1, 6)), max_size=60),
)
def test_all_data_is_leased_once_whoever_asks_when(steps_per_epoch, epochs, first, ahead, order) -> None:
    cursor, stocks = (
        DataCursor(steps_per_epoch, epochs, Spans([(0, first)] if first else [])),
        [LeaseStock(steps) for steps in ahead],
    )
    granted: list[tuple[int, Any]] = []  # on their way to the stocks
    leased, ended = [], set()

    def settle(index: int) -> None:
        for worker, lease in stocks[index].serve():
            ended.update([] if lease else [worker])
            leased.extend((lease.epoch, lease.first + step) for step in range(lease.steps if lease else 0))
        if steps := stocks[index].order():
            granted.append((index, cursor.take(steps, sharers=len(stocks))))

    def arrive(which: int) -> None:
        index, lease = granted.pop(which % len(granted))
        stocks[index].add(lease)
        settle(index)

    for is_question, which, steps in order:
        if is_question:
            stocks[which % len(stocks)].ask(which % len(stocks), steps)
            settle(which % len(stocks))
        elif granted:
            arrive(which)
    while len(ended) < len(stocks):
        for index in set(range(len(stocks))) - ended:
            stocks[index].ask(index, 1)
            settle(index)
        while granted:
            arrive(0)
    assert sorted(leased) == [divmod(step, steps_per_epoch) for step in range(first, epochs * steps_per_epoch)]
