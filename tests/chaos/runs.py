"""Random runs of nodes with faults, under a virtual clock.

Real nodes with small real servers exchange messages over links that delay and repeat them; workers and servers are lost
and restarted. After every event a :class:`~tests.chaos.ledger.Ledger` checks the nodes. Everything is
derived from the seed, and nothing from the wall clock, so that a failed run can be repeated.
"""

from __future__ import annotations

import copy
import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lightning_halos.core.cursor import DataCursor, Lease, LeaseStock, Spans
from lightning_halos.core.global_node import GlobalNode
from lightning_halos.core.global_server import GlobalServer
from lightning_halos.core.local_server import LocalServer
from lightning_halos.core.messages import (
    GlobalModel,
    LeaseGrant,
    LeaseRequest,
    Marker,
    Message,
    Pull,
    Push,
)
from lightning_halos.core.protocol import GLOBAL, STORAGE, GlobalState, Send, uses_models_link
from lightning_halos.core.region_node import RegionNode
from lightning_halos.core.schedule import RoundPlanner, StepBudget, global_step
from lightning_halos.core.snapshot import Shard
from lightning_halos.core.topology import Topology
from lightning_halos.core.worker import WorkerRound
from tests.chaos.ledger import (
    PARAMETERS,
    Data,
    Ledger,
    Snapshot,
    require,
    same,
    values_of,
)

M = TypeVar("M")

_SHAPES = [torch.Size([PARAMETERS])]
_ELEMENTS = PARAMETERS + 1  # one buffer
_OPTIMIZER = partial(torch.optim.SGD, lr=1.0, foreach=False)
_MOST_EVENTS = 50_000  # a typical run has some hundreds
_REMEMBERED = 4  # number of messages that a link may repeat


@dataclass(frozen=True)
class Scenario:
    """The settings and faults of a run, which are drawn before it starts.

    Attributes:
        seed: Seed of everything that is drawn during the run.
        regions: Workers in each region.
        servers_per_region: Local servers in each region.
        has_global_server: Whether there is a global server.
        local_steps: Local steps per round.
        dynamic: Whether slower workers run fewer local steps.
        accumulate: Pushes per exchange.
        merge_weight: Weight of the global model in a merge.
        max_steps: Ordered global steps, ``None`` for no limit.
        steps_per_epoch: Shared data of an epoch, in local steps; 0 if the workers do not share data.
        epochs: Ordered epochs, ``None`` for no limit.
        ahead: Data that a local server orders ahead, in local steps.
        bad: Share of pushes with NaN or infinite values.
        early: Share of local steps after which a round ends early.
        repeats: Share of events before which a link repeats its last messages.
        faults: Pairs of an event's number and the action before it: "save", "publish", "stop", "lose a worker" or
            "restart".
        fails_late: Whether a save and a restart happen while workers finish.
    """

    seed: int
    regions: tuple[int, ...]
    servers_per_region: int
    has_global_server: bool
    local_steps: int
    dynamic: bool
    accumulate: int
    merge_weight: float
    max_steps: int | None
    steps_per_epoch: int
    epochs: int | None
    ahead: int
    bad: float
    early: float
    repeats: float
    faults: tuple[tuple[int, str], ...]
    fails_late: bool

    @classmethod
    def draw(cls, seed: int) -> Scenario:
        """Draws a scenario. The same seed gives the same scenario."""
        rng = random.Random(seed)
        regions = tuple(rng.randint(1, 3) for _ in range(rng.choice([1, 1, 2, 2, 3])))
        servers = rng.choice([1, 1, 1, min(2, *regions)]) if len(regions) > 1 else rng.randint(1, min(2, regions[0]))
        steps_per_epoch = rng.choice([0, rng.randint(3, 40)])
        epochs = rng.choice([None, 1, 2, 3]) if steps_per_epoch else None
        max_steps = rng.choice([None, rng.randint(1, 20)])
        faults = []
        for what, mean in {"save": 1.5, "publish": 1.5, "lose a worker": 1.5, "restart": 1.0, "stop": 0.2}.items():
            count = sum(rng.random() < mean / 4 for _ in range(4))
            faults += [(int(10 ** rng.uniform(0.3, 2.8)), what) for _ in range(count)]
        if max_steps is None and epochs is None:
            faults.append((rng.randint(20, 200), "stop"))
        return cls(
            seed,
            regions,
            servers,
            has_global_server=len(regions) > 1 or servers > 1 or rng.random() < 0.3,
            local_steps=rng.randint(1, 6),
            dynamic=rng.random() < 0.5,
            accumulate=rng.randint(1, 5),
            merge_weight=rng.choice([0.0, 0.25, 0.5, 1.0]),
            max_steps=max_steps,
            steps_per_epoch=steps_per_epoch,
            epochs=epochs,
            ahead=rng.choice([0, 1, rng.randint(2, 20)]),
            bad=rng.choice([0.0, 0.0, 0.1, 0.4]),
            early=rng.choice([0.0, 0.0, 0.1]),
            repeats=rng.choice([0.0, 0.02, 0.1]),
            faults=tuple(sorted(faults)),
            fails_late=rng.random() < 0.3,
        )


@dataclass
class Link:
    """One direction of a connection. Messages arrive in the order in which they were sent.

    Attributes:
        delay: Mean delay.
        last: Arrival time of the last message.
        memory: The last messages, which may be repeated.
        is_open: Whether messages in flight will arrive.
    """

    delay: float
    last: float = 0.0
    memory: deque[Message] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    is_open: bool = True


class Surroundings(Protocol):
    """What a worker needs of the run, or of its job."""

    scenario: Any  # with `local_steps`, `steps_per_epoch` and `early`
    rng: random.Random

    @property
    def now(self) -> float: ...

    @property
    def published(self) -> list[tuple[int, float]]: ...

    def at(self, moment: float, happen: Callable[[], None]) -> None: ...

    def note(self, what: str, *details: object) -> None: ...

    def draw_vector(self) -> Tensor: ...

    def send_to_server(self, rank: int, message: Message) -> None: ...

    def reset_links(self, rank: int) -> None: ...


class Worker:
    """A worker that follows the protocol with random pseudo-gradients instead of training.

    Args:
        run: The run.
        rank: Its rank.
        local_steps: Local steps of its first round.
        position: Global step at which it starts.
    """

    def __init__(self, run: Surroundings, rank: int, local_steps: int, position: int) -> None:
        self.rank = rank
        self.wants_stop = False
        self.wants_leave = False
        self.state = "computing"  # then "without data", "pulling", "finishing" or "finished"
        self.final: GlobalModel | None = None
        self.model: list[float] = []
        self._run = run
        self._rng = run.rng
        self._round = WorkerRound(rank, local_steps, position)
        self._seconds = 10 ** self._rng.uniform(-1, 0.5)  # per local step
        self._shares_data = run.scenario.steps_per_epoch > 0
        self._leases: deque[Lease] = deque()
        self._used: list[tuple[int, int]] = []
        self._asked = self._answered = 0
        self._is_data_over = False
        self.plateaus: list[tuple[int, float]] = []
        self._push: Push | None = None  # since the last pull
        self._is_again = False
        self._life = 0  # number of restarts; timers from before a restart are ignored
        self._pushed_at = 0.0
        self._keep()

    def begin(self) -> None:
        """Starts or continues a round."""
        if self._push is not None and self._round.batches == self._push.batches:
            self._end_round()
            return
        if self._shares_data and self._push is None:
            self._order()
        if self._shares_data and not self._leases:
            if self._is_data_over:
                self._end_round(final=True)
            else:
                self.state = "without data"
            return
        self.state = "computing"
        self._run.at(self._run.now + self._seconds, partial(self._step, self._life))

    def on_message(self, message: Message) -> None:
        """Handles a message of the local server."""
        if isinstance(message, LeaseGrant):
            self._on_grant(message)
        elif isinstance(message, Pull):
            require(message.number <= self._round.number, "worker {} gets {} for no push", self.rank, message)
            if self.state == "pulling" and message.number == self._round.number:
                self._on_pull(message)
        elif isinstance(message, GlobalModel):
            # A restarted worker that repeats its last round has already pushed it.
            has_left = self.state == "finished" or (self._push is not None and self._push.final)
            require(message.final and has_left, "worker {} gets {}", self.rank, message)
            self._life += 1
            self.state, self.final, self.model = "finished", message, values_of(message)

    def leave(self) -> None:
        """Ends the round as soon as possible, and leaves the run."""
        self.wants_leave = True
        if self.state == "without data":
            self._end_round(final=True)

    def lose(self) -> None:
        """Loses the worker and restarts it from its state at the last pull, with the data leased since then."""
        if self.state == "finished":
            return
        self._life += 1
        self._run.reset_links(self.rank)
        if self._asked > self._answered:
            self._run.send_to_server(self.rank, LeaseRequest(number=self._asked))
        if self.state in ("pulling", "finishing") and self._rng.random() < 0.5:
            self._send_push()
        else:
            self._round.load_state_dict(self._kept_round)
            self._leases, self._used = deque(self._kept_leases), []
            self.begin()

    def _keep(self) -> None:
        """Stores the state from which the worker would restart."""
        self._push = None
        self._kept_round = self._round.state_dict()
        self._kept_leases = list(self._leases)

    def _order(self) -> None:
        if self._asked == self._answered and not self._is_data_over and len(self._leases) < 2:
            self._asked += 1
            self._run.send_to_server(self.rank, LeaseRequest(number=self._asked))

    def _on_grant(self, grant: LeaseGrant) -> None:
        require(grant.number <= self._asked, "worker {} gets {}, and has asked {} times", self.rank, grant, self._asked)
        if grant.number <= self._answered:
            return
        self._answered = grant.number
        if grant.steps:
            lease = Lease(grant.epoch, grant.first, grant.steps)
            self._leases.append(lease)
            self._kept_leases.append(lease)
        else:
            self._is_data_over = True
        if self.state == "without data":
            self.begin()

    def _on_pull(self, pull: Pull) -> None:
        require(1 <= pull.local_steps <= self._run.scenario.local_steps, "worker {} gets {}", self.rank, pull)
        self.plateaus += pull.plateau_steps
        published = self._run.published[: len(self.plateaus)]
        require(self.plateaus == published, "worker {} was told {} instead of {}", self.rank, self.plateaus, published)
        self._round.receive(pull, waited=self._run.now - self._pushed_at)
        self._keep()
        if self._round.stopped:
            self._end_round(final=True)
        else:
            self.begin()

    def _step(self, life: int) -> None:
        if life != self._life:
            return
        self._run.note("worker {} finishes a local step", self.rank)
        self._round.count(1, self._seconds)
        if self._shares_data:
            lease, rest = self._leases.popleft().divide(1)
            self._leases.extendleft(rest)
            first = lease.epoch * self._run.scenario.steps_per_epoch + lease.first
            self._used.append((first, first + 1))
        if self._push is not None:  # a repeated round has the same steps as before
            self.begin()
        elif self.wants_leave:
            self._end_round(final=True)
        elif self.wants_stop:
            self._end_round(stop=True, final=self._rng.random() < 0.7)
        elif self._round.over or self._rng.random() < self._run.scenario.early:
            self._end_round()
        else:
            self.begin()

    def _end_round(self, stop: bool = False, final: bool = False) -> None:
        """Pushes the round. A repeated round ends like the first time, but with another pseudo-gradient."""
        if self._push is not None:
            stop, final = self._push.stop, self._push.final
        vector = self._run.draw_vector() if self._round.has_steps else None
        self.wants_stop = self.wants_stop and not stop
        self._push = self._round.push(vector, stop, final, Spans(self._used))  # type: ignore[arg-type]
        self._push.leave = final and self.wants_leave
        self._used = []
        self._send_push()

    def _send_push(self) -> None:
        assert self._push is not None
        self.state = "finishing" if self._push.final else "pulling"
        self._pushed_at = self._run.now
        self._run.send_to_server(self.rank, copy_of(self._push))


class ChaosRun:
    """One run.

    Args:
        scenario: The settings and faults.
        trace: Called with a line for each event.

    Attributes:
        scenario: The settings and faults.
        rng: The source of all random choices during the run.
        ledger: Checks the nodes.
        events: Number of events so far.
        now: Virtual time.
    """

    def __init__(self, scenario: Scenario, trace: Callable[[str], object] | None = None) -> None:
        self.scenario = scenario
        self.rng = random.Random(scenario.seed + 1)
        self.events = 0
        self.now = 0.0
        self._trace = trace
        self._faults = list(scenario.faults)
        self._fails_late = scenario.fails_late
        self._saves = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._queued = 0
        ranks = iter(range(sum(scenario.regions)))
        regions = [[next(ranks) for _ in range(workers)] for workers in scenario.regions]
        self._groups = Topology.build(regions, scenario.servers_per_region).groups
        self._servers = {rank: group.index for group in self._groups for rank in group.ranks}
        self._initial = self.draw_vector(may_be_bad=False)
        data = Data(scenario.steps_per_epoch) if scenario.steps_per_epoch else None
        accumulate = [scenario.accumulate] * len(self._groups) if scenario.has_global_server else None
        ordered = math.inf if scenario.max_steps is None else scenario.max_steps * len(self._servers)
        self.ledger = Ledger(self._groups, self._initial.tolist(), accumulate, scenario.merge_weight, ordered, data)
        self._complete: Snapshot | None = None  # the last complete snapshot
        self._start(None)

    def run(self) -> None:
        """Runs to the end.

        Raises:
            InvariantError: If an invariant is violated.
            ProtocolError: If a node refuses a message.
        """
        while self._heap:
            self.events += 1
            require(self.events < _MOST_EVENTS, "the run does not end within {} events: {}", _MOST_EVENTS, self)
            self._inject()
            self.now, _, happen = heapq.heappop(self._heap)
            happen()
        self._check_end()

    def check(self) -> None:
        """Checks the nodes against the ledger."""
        self.ledger.check(self._regions, self._globals, self._stocks)

    @property
    def published(self) -> list[tuple[int, float]]:
        """All plateau steps so far."""
        return self.ledger.published

    def draw_vector(self, may_be_bad: bool = True) -> Tensor:
        """Draws a random vector, which is different from all others."""
        values = [self.rng.uniform(-1, 1) for _ in range(_ELEMENTS)]
        if may_be_bad and self.rng.random() < self.scenario.bad:
            values[self.rng.randrange(_ELEMENTS)] = self.rng.choice([math.nan, math.inf])
        return torch.tensor(values, dtype=torch.float64)

    def at(self, moment: float, happen: Callable[[], None]) -> None:
        """Schedules an event."""
        self._queued += 1
        heapq.heappush(self._heap, (moment, self._queued, happen))

    def send_to_server(self, rank: int, message: Message) -> None:
        """Sends a worker's message to its local server."""
        self._send(("worker", rank, "up"), message)

    def reset_links(self, rank: int) -> None:
        """Reconnects a worker. Messages in flight from it and to it are lost."""
        for way in ("up", "down"):
            link = self._links.pop(("worker", rank, way), None)
            if link is not None:
                link.is_open = False

    def _start(self, snapshot: Snapshot | None) -> None:
        """Starts all nodes and workers, from scratch or from a snapshot."""
        scenario, workers = self.scenario, sum(self.scenario.regions)
        self._heap.clear()
        self._links: dict[tuple[str, int, str], Link] = {}
        shard = None if snapshot is None else snapshot.shards[None]
        progress: dict[str, Any] = {"total": 0, "done": []} if shard is None else shard.progress
        budget = partial(StepBudget, workers, scenario.max_steps, progress["total"])
        self._regions, self._stocks = [], list[LeaseStock]()
        shared = scenario.steps_per_epoch > 0
        for group in self._groups:
            server = LocalServer(
                group.index,
                self._initial.clone(),
                _OPTIMIZER,
                scenario.accumulate if scenario.has_global_server else None,
                scenario.merge_weight,
                _SHAPES,
                len(group.ranks),
            )
            planner = RoundPlanner(scenario.local_steps, scenario.dynamic, workers, scenario.max_steps)
            stock = LeaseStock(scenario.ahead) if shared else None
            self._stocks += [] if stock is None else [stock]
            self._regions.append(RegionNode(server, planner, group.ranks, budget(), stock))
        top = GlobalServer(self._initial.clone(), _OPTIMIZER, _SHAPES, len(self._groups))
        done = progress["done"]
        self._cursor = DataCursor(scenario.steps_per_epoch, scenario.epochs, Spans(done)) if shared else None
        self._globals = GlobalNode(
            top if scenario.has_global_server else None, len(self._groups), budget(), self._cursor, Spans(done)
        )
        if snapshot is not None and shard is not None:
            for index, node in enumerate(self._regions):
                node.load_state_dict(snapshot.shards[index].state)
            self._globals.load_state_dict(shard.state)
            self.ledger.restart(snapshot, scenario.steps_per_epoch)
        sent = completed(self._globals.start())
        under_way = [] if shard is None else [(update["server"], update["number"]) for update in shard.state["updates"]]
        self.ledger.at_start(under_way, sent)
        self._post_globals(sent)
        for index, node in enumerate(self._regions):
            self._post_region(index, completed(node.start()))
        self.workers = [
            Worker(self, rank, scenario.local_steps, progress["total"] // workers) for rank in range(workers)
        ]
        for worker in self.workers:
            worker.begin()
        self.check()

    def _inject(self) -> None:
        """Makes all faults happen that are due."""
        if self._fails_late and any(worker.state == "finishing" for worker in self.workers):
            self._fails_late = False
            moments = self.events + self.rng.randint(0, 20), self.events + self.rng.randint(20, 80)
            self._faults += zip(moments, ("save", "restart"), strict=True)
        due = [what for moment, what in self._faults if moment <= self.events]
        self._faults = [(moment, what) for moment, what in self._faults if moment > self.events]
        for what in due:
            if self._globals.state is GlobalState.FINISHED and what != "lose a worker":
                continue
            self.note(what)
            if what == "save":
                self._saves += 1
                save = f"save {self._saves}"
                self.ledger.save(save)
                self._post_globals(completed(self._globals.start_snapshot(Marker(save, ""))))
                self.check()
            elif what == "publish":
                steps = [(0, self.rng.random()) for _ in range(self.rng.randint(0, 2))]
                self.ledger.published += steps
                self._post_globals(completed(self._globals.publish(steps, {"loss": self.rng.random()})))
            elif what == "stop":
                self.rng.choice(self.workers).wants_stop = True
            elif what == "lose a worker":
                self.rng.choice(self.workers).lose()
            elif self._complete is None and self.rng.random() < 0.8:
                self._faults.append((self.events + 20, what))  # later, a snapshot may exist
            else:
                self._restart()
        if self._links and self.rng.random() < self.scenario.repeats:
            self._repeat(self.rng.choice(list(self._links)))

    def _restart(self) -> None:
        """Restarts all nodes and workers from the last complete snapshot, or without one from scratch."""
        if self._complete is None:
            scenario = self.scenario
            data = Data(scenario.steps_per_epoch) if scenario.steps_per_epoch else None
            self.ledger = self.ledger.restarted(self._initial.tolist(), data)
        self._start(self._complete)
        if self.scenario.max_steps is None and self.scenario.epochs is None:
            self._faults.append((self.events + self.rng.randint(20, 100), "stop"))

    def _repeat(self, key: tuple[str, int, str]) -> None:
        """Makes a link send its last messages again, as after a reconnection."""
        memory = self._links[key].memory
        count = self.rng.randint(1, _REMEMBERED)
        for message in list(memory)[-count:]:
            self._deliver_later(key, copy_of(message))

    def _send(self, key: tuple[str, int, str], message: Message) -> None:
        if key not in self._links:
            self._links[key] = Link(10 ** self.rng.uniform(-2.5, 1), self.now)
        if self.scenario.repeats:
            self._links[key].memory.append(copy_of(message))
        self._deliver_later(key, message)

    def _deliver_later(self, key: tuple[str, int, str], message: Message) -> None:
        link = self._links[key]
        link.last = max(link.last, self.now + link.delay * self.rng.expovariate(1.0))
        self.at(link.last, partial(self._deliver, link, key, message))

    def _deliver(self, link: Link, key: tuple[str, int, str], message: Message) -> None:
        if not link.is_open:
            return
        kind, number, way = key
        self.note("{} {}, {}: {}", kind, number, way, message)
        if kind == "worker" and way == "down":
            self.workers[number].on_message(message)
            return
        index = self._servers[number] if kind == "worker" else number
        vector = values_of(message)
        if kind == "worker" or way == "down":
            sender = number if kind == "worker" else GLOBAL
            sent = completed(self._regions[index].handle(sender, message))
            self.ledger.at_region(index, sender, message, vector, sent)
            self._post_region(index, sent)
        else:
            sent = completed(self._globals.handle(index, message))
            self.ledger.at_globals(index, message, vector, sent)
            self._post_globals(sent)
        self.check()

    def _post_region(self, index: int, sent: list[tuple[int, Message]]) -> None:
        for to, message in sent:
            if to == STORAGE:
                self._store(message)
            elif to == GLOBAL:
                self._send(("models" if uses_models_link(message) else "control", index, "up"), message)
            else:
                self._send(("worker", to, "down"), message)

    def _post_globals(self, sent: list[tuple[int, Message]]) -> None:
        for to, message in sent:
            if to == STORAGE:
                self._store(message)
            else:
                self._send(("models" if uses_models_link(message) else "control", to, "down"), message)

    def _store(self, shard: Message | Shard) -> None:
        assert isinstance(shard, Shard)
        self.ledger.taken(shard)
        self._copy_portion(shard)

    def _copy_portion(self, shard: Shard) -> None:
        """Copies a part of a shard, while its server goes on."""
        if not shard.advance():
            self.at(self.now + self.rng.expovariate(1.0), partial(self._copy_portion, shard))
        elif self.ledger.stored(shard):
            self.note(f"{shard.marker.save} is complete")
            self._complete = self.ledger.snapshots[shard.marker.save]

    def _check_end(self) -> None:
        scenario, ledger = self.scenario, self.ledger
        require(all(worker.final is not None for worker in self.workers), "the run is stuck: {}", self)
        finished, workers = ledger.finished, len(self.workers)
        require(self._globals.state is GlobalState.FINISHED, "the global node is {}", self._globals.state)
        require(ledger.globals.total == finished, "{} steps are finished, {} counted", finished, ledger.globals.total)
        has_stopped = False
        for worker in self.workers:
            final = worker.final
            assert final is not None
            require(same(worker.model, ledger.globals.model), "worker {} ends with {}", worker.rank, worker.model)
            position = global_step(finished, workers, scenario.max_steps)
            require(
                final.position == position, "worker {} ends at {}, not at {}", worker.rank, final.position, position
            )
            has_stopped = has_stopped or final.stopped
        for node in self._regions:
            require(node.budget.total <= finished, "server {} counts {} steps", node.server.index, node.budget.total)
        data = None if scenario.epochs is None else scenario.epochs * scenario.steps_per_epoch
        steps = None if scenario.max_steps is None else scenario.max_steps * workers
        ordered = min((limit for limit in (data, steps) if limit is not None), default=0)
        require(has_stopped or finished >= ordered, "{} of {} steps are done", finished, ordered)
        if ledger.data is not None:
            self._check_data(ledger.data)

    def _check_data(self, data: Data) -> None:
        """Checks that all data is where the ledger says."""
        for index, stock in enumerate(self._stocks):
            held = {i for lease in stock for i in data.indices(lease)}
            require(held == data.of(f"server {index}"), "server {} has the data {}", index, held)
        if self.scenario.epochs is not None and self._cursor is not None:
            left = set[int]()
            while (lease := self._cursor.take(1)) is not None:
                left |= set(data.indices(lease))
            expected = data.left(self.scenario.epochs * self.scenario.steps_per_epoch)
            require(left == expected, "the cursor has the data {}, not {}", left, expected)

    def __str__(self) -> str:
        states = [f"worker {worker.rank} is {worker.state}" for worker in self.workers]
        states += [f"server {node.server.index} is {node.state.value}" for node in self._regions]
        return ", ".join([*states, f"the global node is {self._globals.state.value}"])

    def note(self, what: str, *details: object) -> None:
        """Adds a line to the trace."""
        if self._trace is not None:
            self._trace(f"{self.events:5d} {self.now:10.4f}  {what.format(*details)}")


def copy_of(message: M) -> M:
    """Copies a message with its vector, because the receiver may overwrite it."""
    vector = getattr(message, "vector", None)
    if vector is None:
        return message
    copied = copy.copy(message)
    copied.vector = vector.clone()  # type: ignore[attr-defined]
    return copied


def completed(sends: list[Send]) -> list[tuple[int, Message]]:
    """Computes the vectors of messages. A shard is left as it is, since its server goes on while it is copied."""
    return [(send.to, send.message if isinstance(send.message, Shard) else send.complete()) for send in sends]  # type: ignore[misc]
