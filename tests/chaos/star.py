"""Random runs of a star of jobs under a virtual clock: ``python -m tests.chaos --star``.

The real nodes exchange messages over connections that delay them and are cut. Members join late, leave, are silent,
lose their process and start again; so does the global server, from its last snapshot or from the one before. Everything
is derived from the seed. A ledger, kept from what members have sent and from what the global server has taken, is
compared with the global node after every message.
"""

from __future__ import annotations

import copy
import heapq
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_halos.core.cursor import LeaseStock
from lightning_halos.core.founding import Founding
from lightning_halos.core.joining import Joining
from lightning_halos.core.local_server import LocalServer
from lightning_halos.core.members import MemberState
from lightning_halos.core.messages import (
    GlobalModel,
    Join,
    LeaseGrant,
    Message,
    ModelCopy,
    Push,
    Refusal,
    RunDescription,
    Status,
    Welcome,
)
from lightning_halos.core.open_global_node import OpenGlobalNode
from lightning_halos.core.open_region_node import MOST_KEPT, OpenRegionNode
from lightning_halos.core.protocol import GLOBAL, GlobalState, RegionState, Send, uses_models_link
from lightning_halos.core.schedule import RoundPlanner, StepBudget
from lightning_halos.core.snapshot import Shard
from tests.chaos.ledger import PARAMETERS, require, same, values_of
from tests.chaos.runs import Worker, completed

_SHAPES = [torch.Size([PARAMETERS])]
_OPTIMIZER = partial(torch.optim.SGD, lr=1.0, foreach=False)
_MOST_EVENTS = 50_000
_MOST_REVIVALS = 30
_MOST_REFUSALS = 100  # after which a second process of a region gives up
_FAULTS = {
    "cut": 2.0,
    "silence": 1.0,
    "kill a member": 1.5,
    "kill the server": 1.2,
    "leave": 0.7,
    "join": 1.0,
    "publish": 1.5,
    "stop": 0.1,
    "hang": 0.8,
}


@dataclass(frozen=True)
class StarScenario:
    """The settings and faults of a run, which are drawn before it starts.

    Attributes:
        seed: Seed of everything that is drawn during the run.
        jobs: Workers of each job that is there from the start.
        min_regions: Members that the run begins with.
        local_steps: Local steps per round.
        dynamic: Whether slower workers run fewer local steps.
        accumulate: Pushes per exchange.
        merge_weight: Weight of the global model in a merge.
        max_steps: Ordered global steps.
        steps_per_epoch: Shared data of an epoch, in local steps; 0 if the workers do not share data.
        epochs: Ordered epochs.
        ahead: Data that a region orders ahead, in local steps.
        bad: Share of pushes with NaN or infinite values.
        early: Share of local steps after which a round ends early.
        snapshot_every: Updates per snapshot.
        liveness: Time after which a silent member is lost.
        patience: Time after which a member is lost that is connected and lets the others wait.
        polite: Whether the server refuses a new process of a member whose old one may be alive.
        damages: Whether a restarted server may find its newest snapshot damaged.
        faults: Pairs of an event's number and the action before it.
    """

    seed: int
    jobs: tuple[int, ...]
    min_regions: int
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
    snapshot_every: int
    liveness: float
    patience: float
    polite: bool
    damages: bool
    faults: tuple[tuple[int, str], ...]

    @classmethod
    def draw(cls, seed: int) -> StarScenario:
        """Draws a scenario. The same seed gives the same scenario."""
        rng = random.Random(seed)
        jobs = tuple(rng.randint(1, 2) for _ in range(rng.choice([1, 2, 2, 3])))
        steps_per_epoch = rng.choice([0, rng.randint(3, 40)])
        epochs = rng.choice([None, 1, 2]) if steps_per_epoch else None
        max_steps = rng.choice([None, rng.randint(1, 15)]) if epochs else rng.randint(1, 15)
        faults = []
        for what, mean in _FAULTS.items():
            count = sum(rng.random() < mean / 4 for _ in range(4))
            faults += [(int(10 ** rng.uniform(0.3, 2.6)), what) for _ in range(count)]
        return cls(
            seed,
            jobs,
            min_regions=rng.randint(1, len(jobs)),
            local_steps=rng.randint(1, 6),
            dynamic=rng.random() < 0.5,
            accumulate=rng.randint(1, 4),
            merge_weight=rng.choice([0.0, 0.25, 0.5, 1.0]),
            max_steps=max_steps,
            steps_per_epoch=steps_per_epoch,
            epochs=epochs,
            ahead=rng.choice([0, 1, rng.randint(2, 20)]),
            bad=rng.choice([0.0, 0.0, 0.2]),
            early=rng.choice([0.0, 0.0, 0.1]),
            snapshot_every=rng.randint(1, 4),
            liveness=10 ** rng.uniform(0, 1.5),
            patience=10 ** rng.uniform(0.5, 2.5),
            polite=rng.random() < 0.7,
            damages=rng.random() < 0.2,
            faults=tuple(sorted(faults)),
        )


@dataclass
class _Update:
    """What a member has sent, or is about to send.

    Attributes:
        vector: The parameters of the update.
        steps: Local steps of the pushes in it.
        data: Data that they were trained on.
    """

    vector: list[float]
    steps: int
    data: list[int]


@dataclass
class Ledger:
    """What the global server has taken: the expected state, which is kept with each snapshot, too.

    Attributes:
        model: Parameters of the global model.
        applied: Applied updates: pairs of a session and a number.
        updates: Number of the last update of each session that the server has, or has given up.
        steps: Local steps of the applied updates.
    """

    model: list[float]
    applied: set[tuple[str, int]] = field(default_factory=set)
    updates: dict[str, int] = field(default_factory=dict)
    steps: int = 0

    def copied(self) -> Ledger:
        return Ledger(list(self.model), set(self.applied), dict(self.updates), self.steps)


class _Connection:
    """A connection of a process to the global server. Messages of a channel arrive in order, or not at all."""

    def __init__(self, run: StarRun, job: _Job) -> None:
        self.job = job
        self.is_open = True  # whether what the server sends can arrive
        self.is_heard = True  # whether what the job has sent can arrive
        self.index: int | None = None  # once the job has joined
        self.held: deque[tuple[int, Message]] = deque()  # messages that wait for a snapshot with a number
        self._run = run
        self._delay = 10 ** run.rng.uniform(-2.5, 0.7)
        self._last: dict[tuple[str, bool], float] = {}

    def send(self, way: str, message: Message, deliver: Callable[[_Connection, Message], None]) -> None:
        run, channel = self._run, (way, uses_models_link(message))
        last = max(self._last.get(channel, 0.0), run.now + self._delay * run.rng.expovariate(1.0))
        self._last[channel] = last
        run.at(last, partial(self._deliver, way, message, deliver))

    def _deliver(self, way: str, message: Message, deliver: Callable[[_Connection, Message], None]) -> None:
        if self.is_heard if way == "up" else self.is_open:
            self._run.note("{} {}: {}", self.job.session, way, message)
            deliver(self, message)

    def close(self, drains: bool = False) -> None:
        """Closes the connection. If it drains, what the job has sent still arrives."""
        self.is_open = False
        self.is_heard = self.is_heard and drains


class _Job:
    """A process of a region with its workers, and all that it does by itself: it dials, joins, trains and redials."""

    def __init__(self, run: StarRun, name: str, workers: int) -> None:
        run.lives += 1
        self.run = run
        self.scenario = run.scenario
        self.rng = run.rng
        self.name = name
        self.session = f"{name}.{run.lives}"
        self.joining = Joining(self.session, workers, run.description, run.initial.clone)
        self.node: OpenRegionNode | None = None
        self.connection: _Connection | None = None
        self.is_dead = False
        self.leaves = False
        self.workers: list[Worker] = []
        self.updates: dict[int, _Update] = {}
        self.lost: set[int] = set()  # data that others got
        self.granted: set[int] = set()
        self.was_given_up = False
        self.finished = 0  # local steps in pushes
        self._unsent = _Update([], 0, [])
        self._pushes = dict.fromkeys(range(workers), 0)
        self._early: list[Message] = []  # messages from before the node was made
        self._redials = self._refusals = 0
        self._hangs_until = 0.0
        self._last: dict[tuple[int, str], float] = {}
        self._delay = 10 ** self.rng.uniform(-3, -0.5)
        self.dial()

    @property
    def now(self) -> float:
        return self.run.now

    @property
    def is_done(self) -> bool:
        """Whether all its workers have ended, with the final model or with that which they left with."""
        return bool(self.workers) and all(worker.final is not None for worker in self.workers)

    @property
    def is_alive(self) -> bool:
        return not self.is_dead and not self.is_done

    @property
    def published(self) -> list[tuple[int, float]]:
        assert self.node is not None
        return self.node._plateau_steps

    def at(self, moment: float, happen: Callable[[], None]) -> None:
        def unless_dead() -> None:
            if self.now < self._hangs_until:
                self.run.at(self._hangs_until, unless_dead)
            elif not self.is_dead:
                happen()

        self.run.at(moment, unless_dead)

    def hang(self, seconds: float) -> None:
        """Does nothing for a time, except that its server answers the global one."""
        if self.now >= self._hangs_until:  # a longer time would change the order of what waits
            self._hangs_until = self.now + seconds

    def note(self, what: str, *details: object) -> None:
        self.run.note(f"{self.session}: {what}", *details)

    def draw_vector(self) -> Tensor:
        return self.run.draw_vector()

    def reset_links(self, rank: int) -> None:
        raise NotImplementedError("a worker is lost together with its job")

    # ------------------------------------------------------------------ the connection

    def dial(self) -> None:
        """Dials the server, now or when it can be reached."""
        if not self.is_alive or self.connection is not None:
            return
        if not self.run.server_is_up:
            self.redial()
            return
        self.connection = _Connection(self.run, self)
        self.send([Send(GLOBAL, self.joining.join() if self.node is None else self.node.join())])

    def redial(self) -> None:
        self._redials += 1
        require(self._redials < 1000, "{} dials for ever", self.session)
        self.at(self.now + self.rng.expovariate(1.0), self.dial)

    def notice(self, connection: _Connection) -> None:
        """Notices that a connection is lost."""
        if self.connection is connection and not self.is_dead:
            self.connection = None
            if self.node is not None:
                self.node.disconnected()
            self.redial()

    def receive(self, connection: _Connection, message: Message) -> None:
        """Handles a message of the global server."""
        if self.is_dead or connection is not self.connection:
            return
        if isinstance(message, Refusal):
            # After a damaged snapshot the server may not know the process, or one that it has replaced.
            may_be = self.session in self.run.replaced | self.run.expelled or self.scenario.damages
            require(not message.for_good or may_be, "{} is refused: {}", self.session, message)
            self._refusals += 1
            self.is_dead = message.for_good or self._refusals > _MOST_REFUSALS
            connection.close()
            self.run.server_notices(connection)
            self.notice(connection)
            return
        if isinstance(message, Welcome):
            lost = {index for start, stop in message.lost for index in range(start, stop)}
            may_be = self.scenario.damages or lost <= self.run.given_up.union(
                *(job.granted for job in self.run.jobs if job.was_given_up)
            )
            require(may_be, "others got the data {} of {}", lost, self.session)
            self.lost |= lost
        if isinstance(message, LeaseGrant):
            first = message.epoch * self.scenario.steps_per_epoch + message.first
            self.granted |= set(range(first, first + message.steps))
        if self.node is None:
            if isinstance(message, Welcome | Status | ModelCopy):
                self.send(completed(self.joining.handle(message)))
                if self.joining.is_ready:
                    self._start()
            else:
                self._early.append(message)
        else:
            self.handle(GLOBAL, message)

    def _start(self) -> None:
        joining, scenario = self.joining, self.scenario
        welcome, model, status = joining.welcome, joining.copy, joining.status
        assert welcome is not None
        assert model is not None
        assert status is not None
        assert model.vector is not None
        server = LocalServer(
            0, model.vector, _OPTIMIZER, scenario.accumulate, scenario.merge_weight, _SHAPES, joining.workers
        )
        planner = RoundPlanner(scenario.local_steps, scenario.dynamic, welcome.workers, scenario.max_steps)
        budget = StepBudget(welcome.workers, scenario.max_steps, status.total)
        stock = LeaseStock(scenario.ahead) if scenario.steps_per_epoch else None
        self.node = OpenRegionNode(server, planner, range(joining.workers), budget, stock, joining)
        self.workers = [Worker(self, rank, scenario.local_steps, budget.position) for rank in range(joining.workers)]
        self.send(completed(self.node.start()))
        for worker in self.workers:
            worker.plateaus = list(status.plateau_steps)
            worker.begin()
        early, self._early = self._early, []
        for message in early:
            self.handle(GLOBAL, message)
        if self.leaves:
            self.leave()

    # ------------------------------------------------------------------ messages

    def send_to_server(self, rank: int, message: Message) -> None:
        """Sends a worker's message to the region's server."""
        self._later(rank, "up", partial(self.handle, rank, message))

    def _later(self, rank: int, way: str, happen: Callable[[], None]) -> None:
        last = self._last[rank, way] = max(
            self._last.get((rank, way), 0.0), self.now + self._delay * self.rng.expovariate(1.0)
        )
        self.at(last, happen)

    def handle(self, sender: int, message: Message) -> None:
        node = self.node
        assert node is not None
        number = node.server.number
        if isinstance(message, Push) and message.number > self._pushes[sender]:
            self._pushes[sender] = message.number
            self._unsent.steps += message.steps
            self._unsent.data += [index for start, stop in message.data for index in range(start, stop)]
            self.finished += message.steps
        sends = completed(node.handle(sender, message))
        if node.server.number > number:
            self._record()
        require(len(node._kept) <= MOST_KEPT + 1, "{} keeps {} updates", self.session, len(node._kept))
        self.send(sends)

    def _record(self) -> None:
        assert self.node is not None
        update = self.node._kept[-1]
        require(update.steps == self._unsent.steps, "{} has {}, not {} steps", update, update.steps, self._unsent.steps)
        self.updates[update.number] = _Update(values_of(update), self._unsent.steps, self._unsent.data)
        self._unsent = _Update([], 0, [])

    def send(self, sends: Sequence[Any]) -> None:
        for to, message in [(s.to, s.message) if isinstance(s, Send) else s for s in sends]:
            if to == GLOBAL:
                if self.connection is not None:
                    self.connection.send("up", message, self.run.at_server)
            else:
                self._later(to, "down", partial(self._to_worker, to, message))

    def _to_worker(self, rank: int, message: Message) -> None:
        self.workers[rank].on_message(message)
        if self.is_done and self.connection is not None:
            self.note("is done")
            self.run.cut(self.connection, drains=True)

    def leave(self) -> None:
        """Ends all rounds and leaves the run."""
        self.leaves = True
        for worker in self.workers:
            worker.leave()


class StarRun:
    """One run.

    Args:
        scenario: The settings and faults.
        trace: Called with a line for each event.
    """

    def __init__(self, scenario: StarScenario, trace: Callable[[str], object] | None = None) -> None:
        self.scenario = scenario
        self.rng = random.Random(scenario.seed + 1)
        self.now = 0.0
        self.events = 0
        self.lives = 0
        self.jobs: list[_Job] = []
        self.initial = torch.tensor([self.rng.uniform(-1, 1) for _ in range(PARAMETERS + 1)], dtype=torch.float64)
        self.description = RunDescription(
            model="four numbers",
            dtype="float64",
            names=["weight"],
            shapes=[[PARAMETERS]],
            buffers=[("mean", [1])],
            algorithm="HALoS",
            settings={"local_steps": scenario.local_steps, "has_momentum": True},
            global_optimizer={"lr": 1.0, "momentum": 0.0, "delay": 1, "activation": 0.0},
            data="numbers" if scenario.steps_per_epoch else None,
            steps_per_epoch=scenario.steps_per_epoch,
            epochs=scenario.epochs,
            max_steps=scenario.max_steps,
        )
        self._trace = trace
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._queued = 0
        self._faults = list(scenario.faults)
        self._top: Founding | OpenGlobalNode | None = None  # None while the server is down
        self._life = 0  # of the server
        self._connections: dict[int, _Connection] = {}
        self._disk: list[tuple[Any, Ledger]] = []
        self._storing = 0.0  # when the storage is free again
        self._ledgers: dict[int, Ledger] = {}  # of snapshots under way
        self._since = 0  # updates since the last snapshot
        self._revivals = 0
        self._forgotten: set[str] = set()  # sessions some of whose updates were only in a damaged snapshot
        self._plateaus_lost = False
        self.given_up: set[int] = set()  # data of members that the server has lost at some time
        self.expelled: set[str] = set()  # sessions that have let the others wait twice
        self.replaced: set[str] = set()  # sessions of regions that other processes have joined for
        self.ledger = Ledger(self.initial.tolist()[:PARAMETERS])
        self._start_server()
        for number, workers in enumerate(scenario.jobs):
            self.jobs.append(_Job(self, f"region {number}", workers))

    @property
    def server_is_up(self) -> bool:
        return self._top is not None

    @property
    def node(self) -> OpenGlobalNode | None:
        return self._top if isinstance(self._top, OpenGlobalNode) else None

    @property
    def is_finished(self) -> bool:
        return self.node is not None and self.node.state is GlobalState.FINISHED

    def run(self) -> None:
        """Runs to the end.

        Raises:
            InvariantError: If an invariant is violated.
            ProtocolError: If a node refuses a message.
        """
        while True:
            while self._heap:
                self.events += 1
                require(self.events < _MOST_EVENTS, "the run does not end within {} events: {}", _MOST_EVENTS, self)
                self._inject()
                if self._heap:
                    self.now, _, happen = heapq.heappop(self._heap)
                    happen()
                    self._tick()
            if self.is_finished:
                break
            self._revive()
        self._check_end()

    def at(self, moment: float, happen: Callable[[], None]) -> None:
        """Schedules an event."""
        self._queued += 1
        heapq.heappush(self._heap, (moment, self._queued, happen))

    def soon(self, mean: float, happen: Callable[[], None]) -> None:
        self.at(self.now + mean * self.rng.expovariate(1.0), happen)

    def draw_vector(self) -> Tensor:
        """Draws a random vector."""
        values = [self.rng.uniform(-1, 1) for _ in range(PARAMETERS + 1)]
        if self.rng.random() < self.scenario.bad:
            values[self.rng.randrange(PARAMETERS)] = float("nan")
        return torch.tensor(values, dtype=torch.float64)

    # ------------------------------------------------------------------ faults

    def _inject(self) -> None:
        due = [what for moment, what in self._faults if moment <= self.events]
        self._faults = [(moment, what) for moment, what in self._faults if moment > self.events]
        for what in due:
            alive = [job for job in self.jobs if job.is_alive]
            connected = [job for job in alive if job.connection is not None and job.connection.is_open]
            if self.is_finished and what not in ("kill the server", "cut", "join", "kill a member"):
                continue
            self.note(what)
            if what == "kill the server" and self._top is not None:
                self._kill_server()
            elif what == "join" and len({job.name for job in self.jobs}) < 5:
                self._new_job(self.rng.choice(["region 0", "region 1", "late", "later"]), self.rng.random() < 0.2)
            elif what == "publish":
                self._publish()
            elif what in ("cut", "silence") and connected:
                connection = self.rng.choice(connected).connection
                assert connection is not None
                if what == "cut":
                    self.cut(connection)
                elif connection.index is not None and self._connections.get(connection.index) is connection:
                    self._lose(connection)
            elif alive and what == "kill a member":
                self._kill(self.rng.choice(alive))
            elif alive and what == "hang":
                self.rng.choice(alive).hang(self.scenario.patience * 10 ** self.rng.uniform(-0.5, 1.0))
            elif alive and what == "leave":
                job = self.rng.choice(alive)
                job.leave()
                if self.rng.random() < 0.5:
                    self.soon(20.0, partial(self._new_job, job.name))
            elif what == "stop":
                workers = [worker for job in alive for worker in job.workers]
                if workers:
                    self.rng.choice(workers).wants_stop = True

    def _new_job(self, name: str, again: bool = False) -> None:
        """Starts a process of a region, unless one is running, or a second one by mistake."""
        if again or not self._runs(name):
            self.jobs.append(_Job(self, name, self.rng.randint(1, 2)))

    def _publish(self) -> None:
        for job in self.jobs:
            if job.is_alive and job.node is not None and job.node.decides:
                steps = [(0, self.rng.random()) for _ in range(self.rng.randint(0, 2))]
                job.send(completed(job.node.publish(steps, {"loss": self.rng.random()}, f"{self.rng.random()}")))
                return

    def _kill(self, job: _Job) -> None:
        job.is_dead = True
        self._plateaus_lost = True  # perhaps: its publications on the way
        if job.connection is not None:
            self.cut(job.connection, drains=self.rng.random() < 0.5)
        if self.rng.random() < 0.8:
            self.soon(10.0, partial(self._new_job, job.name))

    def cut(self, connection: _Connection, drains: bool = False) -> None:
        """Cuts a connection. Each side notices it some time later, or not before the member counts as lost."""
        connection.close(drains)
        self.soon(2.0, partial(connection.job.notice, connection))
        if self.rng.random() < 0.7:
            self.soon(2.0 + 5 * drains, partial(self.server_notices, connection))
        else:
            self.at(self.now + self.scenario.liveness, partial(self._lose, connection))

    def server_notices(self, connection: _Connection) -> None:
        """The server notices that a connection is lost, and loses the member later unless it returns."""
        connection.is_heard = False
        index = connection.index
        if index is None or self._top is None or self._connections.get(index) is not connection:
            return
        del self._connections[index]
        self._post(self._top.disconnected(index))
        self._after()
        self._expect(index)

    def _expect(self, index: int) -> None:
        life = self._life

        def lose() -> None:
            if self._life != life or self.node is None or index in self._connections:
                return
            member = self.node._members[index]
            if member.state is MemberState.DISCONNECTED:
                self._give_up(index)
                self._post(self.node.lose(index))
                self._after()

        self.at(self.now + self.scenario.liveness, lose)

    def _lose(self, connection: _Connection) -> None:
        """The server gives up a member that was silent for too long, and closes its connection."""
        connection.close()
        self.soon(2.0, partial(connection.job.notice, connection))
        index = connection.index
        if index is not None and self._top is not None and self._connections.get(index) is connection:
            del self._connections[index]
            self._give_up(index)
            self._post(self._top.lose(index))
            self._after()

    def _give_up(self, index: int) -> None:
        if self.node is not None:
            member = self.node._members[index]
            self.given_up |= {index for start, stop in member.leased for index in range(start, stop)}
            for job in self.jobs:
                job.was_given_up = job.was_given_up or job.session == member.session

    def _tick(self) -> None:
        """Tells the server the time."""
        node = self.node
        active = [] if node is None else node._members.active
        sends = [] if self._top is None else self._top.tick(self.now)
        for member in [member for member in active if not member.is_active]:
            self.note("{} has let the others wait", member)
            self._give_up(member.index)
            if member.was_given_up and node is not None and node._members.refusal(member, member.session):
                self.expelled.add(member.session)
        if sends:
            self._post(sends)
            self._after()

    def _kill_server(self) -> None:
        self._top = None
        self._life += 1
        for connection in self._connections.values():
            connection.close()
            self.soon(2.0, partial(connection.job.notice, connection))
        for job in self.jobs:  # those that have not joined yet
            if job.connection is not None and job.connection.is_open:
                job.connection.close()
                self.soon(2.0, partial(job.notice, job.connection))
        self._connections = {}
        self._plateaus_lost = True
        self.soon(5.0, self._start_server)

    def _start_server(self) -> None:
        scenario = self.scenario
        if len(self._disk) > 1 and scenario.damages and self.rng.random() < 0.5:
            _, newest = self._disk.pop()
            gone = newest.applied - self._disk[-1][1].applied
            self.note("the newest snapshot is damaged, and with it {}", sorted(gone))
            self._forgotten |= {session for session, _ in newest.updates.items()}
        self._since = 0
        self._ledgers = {}
        if not self._disk:
            self._top = Founding(f"run {self._life}", scenario.min_regions, patience=scenario.patience)
            self.ledger = Ledger(self.initial.tolist()[:PARAMETERS])
            return
        state, ledger = self._disk[-1]
        self._top = OpenGlobalNode.restored(copy.deepcopy(state), patience=scenario.patience)
        self.ledger = ledger.copied()
        for index in self._top._leasing.awaited:
            self._expect(index)
        self.check()

    def _revive(self) -> None:
        """Somebody starts a process, or ends the run, when nothing else can happen."""
        self._revivals += 1
        require(self._revivals < _MOST_REVIVALS, "the run never ends: {}", self)
        for job in self.jobs:
            stuck = job.is_alive and job.node is not None and job.node.state is not RegionState.FLUSHED
            require(not stuck, "{} is stuck: {}", job.session, self)
        free = [name for name in ("region 0", "region 1", "region 2", "later") if not self._runs(name)]
        self.note("revive")
        if self.node is not None and (not free or self.rng.random() < 0.2):
            self._post(self.node.end())
            self._after()
        else:
            self._new_job(free[0])

    def _runs(self, name: str) -> bool:
        return any(job.name == name and job.is_alive for job in self.jobs)

    # ------------------------------------------------------------------ the server

    def at_server(self, connection: _Connection, message: Message) -> None:
        """Gives a message of a job to the global server."""
        top = self._top
        if top is None:
            return
        index = top.index_of(connection.job.name)
        present = self._connections.get(index)
        if isinstance(message, Join):
            self.replaced |= {
                job.session for job in self.jobs if job.name == connection.job.name and job is not connection.job
            }
            if present is not None and present is not connection:
                is_other = present.job is not connection.job
                if is_other and self.scenario.polite:
                    connection.send("down", Refusal("a present region", for_good=False), self._down)
                    return
                present.close()
                self.soon(2.0, partial(present.job.notice, present))
            self._connections[index] = connection
            connection.index = index
        elif present is not connection:
            return
        before = self._numbers()
        sends = top.handle(index, message)
        self._take(before, is_join=isinstance(message, Join))
        self._post(sends)
        self._after()

    def _numbers(self) -> dict[str, int]:
        return {} if self.node is None else {m.session: m.update for m in self.node._members if m.session}

    def _take(self, before: dict[str, int], is_join: bool) -> None:
        """Records the updates that the server has taken."""
        ledger = self.ledger
        for session, number in self._numbers().items():
            first = max(before.get(session, 0), ledger.updates.get(session, 0))
            for taken in range(first + 1, number + 1):
                if is_join:
                    require(session in self._forgotten, "{} {} is given up", session, taken)
                    continue
                update = next(job for job in self.jobs if job.session == session).updates[taken]
                require((session, taken) not in ledger.applied, "{} {} is applied twice", session, taken)
                ledger.applied.add((session, taken))
                ledger.steps += update.steps
                if update.steps:
                    ledger.model = [a - b for a, b in zip(ledger.model, update.vector[:PARAMETERS], strict=True)]
                self._since += 1
            ledger.updates[session] = number

    def _after(self) -> None:
        """Does what the server process does after each event, and checks the node."""
        if isinstance(self._top, Founding) and self._top.node is not None:
            self._top = self._top.node
            token = self._begin_snapshot()
            self._post(self._top.start(), hold=token)
        node = self.node
        if node is None:
            return
        if node.wants_snapshot or self._since >= self.scenario.snapshot_every:
            self._begin_snapshot()
        self.check()

    def _begin_snapshot(self) -> int:
        node = self.node
        assert node is not None
        self._since = 0
        (send,) = node.begin_snapshot()
        shard = send.message
        assert isinstance(shard, Shard)
        number = int(shard.marker.save)
        self._ledgers[number] = self.ledger.copied()
        self.soon(0.1, partial(self._copy, self._life, shard))
        return number

    def _copy(self, life: int, shard: Shard) -> None:
        """Copies a part of a snapshot, while the server goes on. When all parts are copied, it is written."""
        if life != self._life:
            return
        if not shard.advance():
            self.soon(0.1, partial(self._copy, life, shard))
            return
        self._storing = max(self._storing, self.now + 0.5 * self.rng.expovariate(1.0))
        self.at(self._storing, partial(self._written, life, shard))

    def _written(self, life: int, shard: Shard) -> None:
        if life != self._life:
            return
        number = int(shard.marker.save)
        if number not in self._ledgers:
            return  # a later one is on disk
        self._disk = [*self._disk[-1:], (shard.state, self._ledgers[number])]
        for other in [other for other in self._ledgers if other <= number]:
            del self._ledgers[other]
        self.soon(0.1, partial(self._saved, life, shard.marker.save))

    def _saved(self, life: int, token: str) -> None:
        node = self.node
        if life != self._life or node is None or token not in node._confirmations:
            return
        self.note("snapshot {} is on disk", token)
        sends = node.saved(token)
        for connection in list(self._connections.values()):
            while connection.held and connection.held[0][0] <= int(token):
                connection.send("down", connection.held.popleft()[1], self._down)
        self._post(sends)
        self._after()

    def _post(self, sends: Sequence[Send], hold: int = 0) -> None:
        """Sends messages. The final model, and what follows it, waits until a snapshot knows of it."""
        for send in sends:
            message, connection = send.complete(), self._connections.get(send.to)
            assert not isinstance(message, Shard)
            if connection is None:
                continue
            if isinstance(message, GlobalModel):
                message = copy.copy(message)
                assert message.vector is not None
                message.vector = message.vector.clone()
                if message.final:
                    hold = self._begin_snapshot()
            elif not self._disk and not hold:
                hold = min(self._ledgers, default=0)  # a server that is killed now would not know the member
            if hold or connection.held:
                connection.held.append((hold, message))
            else:
                connection.send("down", message, self._down)

    def _down(self, connection: _Connection, message: Message) -> None:
        connection.job.receive(connection, message)

    # ------------------------------------------------------------------ checks

    def check(self) -> None:
        """Compares the global node with the ledger."""
        node, ledger = self.node, self.ledger
        if node is None:
            return
        model = node.model.tolist()[:PARAMETERS]
        require(same(model, ledger.model), "the global model is {}, not {}", model, ledger.model)
        require(node.server.steps == ledger.steps, "the model has {} steps, not {}", node.server.steps, ledger.steps)
        members = node._members
        unsent = sum(report.steps for member in members for report in member.uncovered)
        total = node.budget.total
        require(
            total == ledger.steps + unsent,
            "{} steps count, {} are in the model, {} to come",
            total,
            ledger.steps,
            unsent,
        )
        for member in members:
            gone = member.state in (MemberState.LOST, MemberState.LEFT)
            require(not gone or not member.uncovered, "{} is {} and has reports", member, member.state)
            require(not gone or not member.open.steps, "{} is {} and has data", member, member.state)
        present = [member for member in members if member.is_present]
        senders = max(1, len(present))
        if not self.is_finished:
            require(node.server.senders == senders, "the server has {} members, not {}", node.server.senders, senders)
            decider = None if node._deciding.index is None else node._members[node._deciding.index]
            expected = any(member.is_active for member in present)
            require(decider is None or decider.is_present, "{} decides", decider)
            require(decider is not None or not expected, "nobody decides")
        if self.scenario.steps_per_epoch:
            self._check_data(node)

    def _check_data(self, node: OpenGlobalNode) -> None:
        """Checks that all data is done, or with the cursor, or with one member."""
        cursor = node._leasing.cursor
        assert cursor is not None
        owned = Counter[int]()
        for member in node._members:
            owned.update(index for start, stop in member.open for index in range(start, stop))
        done = {index for start, stop in node._leasing.done for index in range(start, stop)}
        taken = {index for start, stop in cursor._taken for index in range(start, stop)}
        lost = {index for job in self.jobs for index in job.lost}
        twice = {index for index, count in owned.items() if count > 1 or index in done}
        require(twice <= lost, "two have the data {}", twice - lost)
        require(taken == done | set(owned), "the cursor misses {}", taken ^ (done | set(owned)))

    def _check_end(self) -> None:
        scenario, ledger, node = self.scenario, self.ledger, self.node
        assert node is not None
        require(node.budget.total == ledger.steps, "{} steps count, {} are done", node.budget.total, ledger.steps)
        asked = node._asked_to_stop
        for job in self.jobs:
            if job.is_dead:
                continue
            require(job.is_done or job.node is None or not job.node.is_connected, "{} is not done", job.session)
            if job.session in self._forgotten or not job.is_done:
                continue
            taken = [number for number in job.updates if (job.session, number) in ledger.applied]
            known = job.node is not None and job.node.server.number == len(taken)
            final = job.workers[0].final
            assert final is not None
            # A member that was away when the run ended is not waited for.
            require(
                known or not final.number,
                "{} left, but {} of its updates are lost",
                job.session,
                job.updates.keys() - set(taken),
            )
            if known and not job.node._leaving:
                require(same(job.workers[0].model[:PARAMETERS], ledger.model), "{} has another model", job.session)
        steps = None if scenario.max_steps is None else scenario.max_steps * node.budget.workers
        data = None if scenario.epochs is None else scenario.epochs * scenario.steps_per_epoch
        ordered = min(limit for limit in (steps, data) if limit is not None)
        lost = {index for job in self.jobs for index in job.lost}
        require(asked or ledger.steps >= ordered - len(lost), "{} of {} steps are done", ledger.steps, ordered)
        sessions = {job.session: job for job in self.jobs}
        trained = Counter(
            index for session, number in ledger.applied for index in sessions[session].updates[number].data
        )
        twice = {index for index, count in trained.items() if count > 1}
        require(twice <= lost, "the data {} was used twice", twice - lost)
        done = {index for start, stop in node._leasing.done for index in range(start, stop)}
        require(done ^ set(trained) <= lost, "{} is said to be done, not {}", done, set(trained))
        if data is not None and not asked and (steps is None or ledger.steps < steps):
            require(done == set(range(data)), "the data {} was never used", set(range(data)) - done)

    def __str__(self) -> str:
        states = [f"the server is {'down' if self._top is None else self._top.status()}"]
        for job in self.jobs:
            state = "dead" if job.is_dead else "joining" if job.node is None else job.node.state.value
            states.append(f"{job.session} is {state}, its workers {[worker.state for worker in job.workers]}")
        return ", ".join(states)

    def note(self, what: str, *details: object) -> None:
        """Adds a line to the trace."""
        if self._trace is not None:
            self._trace(f"{self.events:5d} {self.now:10.4f}  {what.format(*details)}")
