"""A ledger of a run, which is kept from the messages alone and compared with the nodes after every event.

It implements the rules of the algorithm a second time, for plain SGD with a rate of 1, in Python numbers and without
the code of ``core``, so that the two cannot share a mistake. It sends, delays and decides nothing.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lightning_halos.core.cursor import Lease, LeaseStock
from lightning_halos.core.global_node import GlobalNode
from lightning_halos.core.messages import (
    GlobalModel,
    LeaseGrant,
    MarkerReply,
    Message,
    Progress,
    Pull,
    Push,
    RegionModel,
    RegionUpdate,
    Status,
)
from lightning_halos.core.region_node import RegionNode
from lightning_halos.core.snapshot import Shard
from lightning_halos.core.topology import ServerGroup

PARAMETERS = 3
"""Number of parameters in a vector. The other elements are buffers."""

Vector = list[float]
Sent = Sequence[tuple[int, Message]]
"""Addresses and messages, with complete vectors."""


class InvariantError(AssertionError):
    """An invariant of the nodes is violated."""


def require(holds: bool, broken: str, *details: object) -> None:
    """Raises an error unless a condition holds.

    Args:
        holds: The condition.
        broken: The message, with ``{}`` for each of the details.
        details: The details, which are formatted only if they are needed.

    Raises:
        InvariantError: If the condition does not hold.
    """
    if not holds:
        raise InvariantError(broken.format(*details))


@dataclass(frozen=True)
class Update:
    """An update of a local server, or its model if it is the only one."""

    vector: Vector
    steps: int
    final: bool


@dataclass
class RegionBook:
    """The expected state of a local server.

    Attributes:
        model: Its model.
        base: The model from which its next update is computed.
        version: Number of applied pushes.
        merged_at: The version at the last merge.
        base_version: The version of the model that the next update is measured from.
        exchanging: Number of the unanswered update, 0 if there is none.
        number: Number of the last update.
        updates: The updates by number.
        unsent: Local steps that are in no update yet.
        finished: Local steps of all pushes.
        total: Local steps of all workers that the server can know of.
        reported: Local steps of all pushes that were reported to the global node.
        reports: Steps and data of each report, in the order of their numbers from 1.
        pushes: Number of each worker's last push.
        left: Workers that have sent their final push.
        granted: Number of each worker's last answered lease request.
        orders: Number of the last answered order of data.
        trained: The data of all pushes.
    """

    model: Vector
    base: Vector
    version: int = 0
    merged_at: int = 0
    base_version: int = 0
    exchanging: int = 0
    number: int = 0
    updates: dict[int, Update] = field(default_factory=dict)
    unsent: int = 0
    finished: int = 0
    total: int = 0
    reported: int = 0
    reports: list[tuple[int, list[tuple[int, int]]]] = field(default_factory=list)
    pushes: dict[int, int] = field(default_factory=dict)
    left: set[int] = field(default_factory=set)
    granted: dict[int, int] = field(default_factory=dict)
    orders: int = 0
    trained: list[tuple[int, int]] = field(default_factory=list)

    @property
    def has_flushed(self) -> bool:
        """Whether the last update has been sent."""
        return self.number > 0 and self.updates[self.number].final


@dataclass
class GlobalBook:
    """The expected state of the global node.

    Attributes:
        model: The global model.
        applied: Number of each local server's last applied update.
        left: Local servers that have sent their last message.
        reports: Number of each local server's last report.
        counted: Local steps in each local server's reports.
        total: Reported local steps of all workers.
        granted: Number of each local server's last answered order of data.
    """

    model: Vector
    applied: dict[int, int] = field(default_factory=dict)
    left: set[int] = field(default_factory=set)
    reports: dict[int, int] = field(default_factory=dict)
    counted: Counter[int] = field(default_factory=Counter)
    total: int = 0
    granted: dict[int, int] = field(default_factory=dict)


class Data:
    """The owner of the data of every local step: the cursor, a server, a worker, or, after training on it, nobody.

    Args:
        steps_per_epoch: Data of an epoch, in local steps.
        done: The data that was trained on before.
    """

    def __init__(self, steps_per_epoch: int, done: Iterable[Sequence[int]] = ()) -> None:
        self._steps_per_epoch = steps_per_epoch
        self._owner = {index: "nobody" for start, stop in done for index in range(start, stop)}
        self.count = Counter(self._owner.values())

    def move(self, grant: LeaseGrant, source: str, target: str) -> None:
        """Moves the data of a grant from one owner to another."""
        stop = grant.first + grant.steps
        require(grant.first >= 0 and stop <= self._steps_per_epoch, "{} gets data of two epochs: {}", target, grant)
        self._move(self.indices(grant), source, target)

    def finish(self, spans: Iterable[Sequence[int]], worker: str) -> None:
        """Records that a worker has trained on its data."""
        for start, stop in spans:
            self._move(range(start, stop), worker, "nobody")

    def of(self, owner: str) -> set[int]:
        """Returns all data of an owner other than the cursor."""
        return {index for index, mine in self._owner.items() if mine == owner}

    def left(self, end: int) -> set[int]:
        """Returns all data before an end that still belongs to the cursor."""
        return set(range(end)) - set(self._owner)

    def indices(self, lease: Lease | LeaseGrant) -> range:
        """Returns the data of a lease."""
        first = lease.epoch * self._steps_per_epoch + lease.first
        return range(first, first + lease.steps)

    def _move(self, indices: range, source: str, target: str) -> None:
        for index in indices:
            owner = self._owner.get(index, "the cursor")
            require(owner == source, "data {} goes from {} to {}, but belongs to {}", index, source, target, owner)
            self._owner[index] = target
        self.count[source] -= len(indices)
        self.count[target] += len(indices)


@dataclass
class Snapshot:
    """A snapshot in progress.

    Attributes:
        globals: The expected state of the global node when it started the snapshot.
        regions: The expected state of each local server when it took its part.
        replied: Local servers whose replies have arrived.
        taken: Local servers that have taken their parts; ``None`` is the global node.
        shards: The parts that are copied completely, by local server; ``None`` is the global node.
    """

    globals: GlobalBook
    regions: dict[int, RegionBook] = field(default_factory=dict)
    replied: set[int] = field(default_factory=set)
    taken: set[int | None] = field(default_factory=set)
    shards: dict[int | None, Shard] = field(default_factory=dict)

    def under_way(self) -> dict[tuple[int, int], Update]:
        """Returns the updates in flight, which belong to neither side, by local server and number."""
        return {
            (index, number): update
            for index, book in self.regions.items()
            for number, update in book.updates.items()
            if number > self.globals.applied.get(index, 0)
        }


class Ledger:
    """Computes the expected states of all nodes in a run, and compares them with the nodes.

    Args:
        groups: The local servers and their workers.
        model: The initial model.
        accumulate: Pushes per exchange of each local server; ``None`` if there is no global server.
        merge_weight: Weight of the global model in a merge.
        ordered: Ordered local steps; may be infinite.
        data: The owners of the data; ``None`` if the workers do not share data.
    """

    def __init__(
        self,
        groups: Sequence[ServerGroup],
        model: Vector,
        accumulate: Sequence[int] | None,
        merge_weight: float,
        ordered: float,
        data: Data | None,
    ) -> None:
        self.regions = [RegionBook(list(model), list(model)) for _ in groups]
        self.globals = GlobalBook(list(model))
        self.data = data
        self.published: list[tuple[int, float]] = []
        self.snapshots: dict[str, Snapshot] = {}
        self._groups = groups
        self._accumulate = accumulate
        self._merge_weight = merge_weight
        self._ordered = ordered

    def restarted(self, model: Vector, data: Data | None) -> Ledger:
        """Returns an empty ledger for a run of the same nodes and workers that starts from scratch."""
        return Ledger(self._groups, model, self._accumulate, self._merge_weight, self._ordered, data)

    @property
    def finished(self) -> int:
        """Local steps that the workers have finished and pushed."""
        return sum(book.finished for book in self.regions)

    def at_region(self, index: int, sender: int, message: Message, vector: Vector, sent: Sent) -> None:
        """Records how a local server handled a message.

        Args:
            index: Index of the local server.
            sender: Address of the sender.
            message: The message.
            vector: The values of its vector before the server overwrote it.
            sent: The messages that the server sends.

        Raises:
            InvariantError: If they are not the expected messages.
        """
        book, due = self.regions[index], list[Update]()
        push = message if isinstance(message, Push) and message.number > book.pushes.get(sender, 0) else None
        if push is not None:
            due = self._push(index, push, vector)
        elif isinstance(message, GlobalModel) and not message.final:
            self._merge(book, message, vector)
        elif isinstance(message, LeaseGrant):
            book.orders = max(book.orders, message.number)
        elif isinstance(message, Status):
            known = message.total - message.counted + sum(steps for steps, _ in book.reports)
            book.total = max(book.total, known)  # a repeated status may be older
        answers = 0
        for to, answer in sent:
            if isinstance(answer, Pull):
                answers += 1
                self._check_pull(index, sender, message, to, answer)
            elif isinstance(answer, RegionUpdate | RegionModel):
                self._send(index, answer, due)
            elif isinstance(answer, Progress):
                self._report(index, answer, push)
            elif isinstance(answer, LeaseGrant):
                is_new = answer.steps > 0 and answer.number > book.granted.get(to, 0)
                require(not is_new or to not in book.left, "worker {} has left and gets {}", to, answer)
                self._grant(book.granted, to, answer, f"server {index}", f"worker {to}")
        require(not due, "server {} does not send the update {}", index, due)
        require(book.reported == book.finished, "server {} does not report {}", index, message)
        if isinstance(message, Push):
            require(answers == (not message.final), "server {} answers {} {} times", index, message, answers)

    def at_globals(self, sender: int, message: Message, vector: Vector, sent: Sent) -> None:
        """Records how the global node handled a message; see :meth:`at_region`.

        Raises:
            InvariantError: If it does not send the expected messages.
        """
        book = self.globals
        if isinstance(message, RegionUpdate | RegionModel):
            if message.number > book.applied.get(sender, 0):
                self._apply(sender, message.number, vector)
        elif isinstance(message, Progress) and message.number > book.reports.get(sender, 0):
            require(message.number == book.reports.get(sender, 0) + 1, "report {} overtakes another", message.number)
            book.reports[sender] = message.number
            book.counted[sender] += message.steps
            book.total += message.steps
        elif isinstance(message, MarkerReply):
            self.snapshots[message.save].replied.add(message.server)
        answers = 0
        for to, answer in sent:
            if isinstance(answer, GlobalModel):
                require(same(values_of(answer), book.model), "{} is not the global model {}", answer, book.model)
                if answer.final:
                    require(len(book.left) == len(self.regions), "the model is final, but only {} have left", book.left)
                else:
                    answers += 1
                    number = getattr(message, "number", 0)
                    require((to, answer.number) == (sender, number), "{} answers {}", answer, message)
            elif isinstance(answer, Status):
                have, want = (answer.total, answer.counted), (book.total, book.counted[to])
                require(have == want, "server {} is told of (total, counted) {} instead of {}", to, have, want)
            elif isinstance(answer, LeaseGrant):
                self._grant(book.granted, to, answer, "the cursor", f"server {to}")
        if isinstance(message, RegionUpdate):
            require(answers == (not message.final), "{} is answered {} times", message, answers)

    def taken(self, shard: Shard) -> None:
        """Records that a node has taken its part of a snapshot, whose tensors may be copied later.

        Raises:
            InvariantError: If the node has taken the part before.
        """
        snapshot = self.snapshots[shard.marker.save]
        require(shard.server not in snapshot.taken, "server {} takes part in {} twice", shard.server, shard.marker)
        snapshot.taken.add(shard.server)
        if shard.server is not None:
            snapshot.regions[shard.server] = copy.deepcopy(self.regions[shard.server])

    def stored(self, shard: Shard) -> bool:
        """Records a part of a snapshot that is complete. Returns whether the snapshot is complete.

        Raises:
            InvariantError: If the complete snapshot is not consistent.
        """
        snapshot = self.snapshots[shard.marker.save]
        snapshot.shards[shard.server] = shard
        if len(snapshot.shards) <= len(self.regions):
            return False
        self._check_snapshot(snapshot)
        return True

    def save(self, save: str) -> None:
        """Records that the global node has started a snapshot."""
        self.snapshots[save] = Snapshot(copy.deepcopy(self.globals))

    def restart(self, snapshot: Snapshot, steps_per_epoch: int) -> None:
        """Resets to a complete snapshot. All nodes and workers number their messages from 1 again."""
        self.globals = copy.deepcopy(snapshot.globals)
        self.globals.total, spans = sum(b.finished for b in snapshot.regions.values()), list[tuple[int, int]]()
        for index in range(len(self.regions)):
            book = self.regions[index] = copy.deepcopy(snapshot.regions[index])
            spans += book.trained
            if book.has_flushed:
                book.exchanging, book.merged_at = 0, book.version
            if self._accumulate is None:
                book.number = 0  # it has not sent its model, which is its only message
            book.reports, book.pushes, book.left, book.granted, book.orders = [], {}, set(), {}, 0
            book.total = self.globals.total
        self.globals.left, self.globals.reports, self.globals.granted = set(), {}, {}
        self.globals.counted = Counter()
        self.data = None if self.data is None else Data(steps_per_epoch, spans)
        self.published, self.snapshots = [], {}

    def at_start(self, updates: Iterable[tuple[int, int]], sent: Sent) -> None:
        """Records how the global node applies the updates in flight when it starts.

        Args:
            updates: Local server and number of each update, in the order in which they are applied.
            sent: The messages that the node sends.

        Raises:
            InvariantError: If they are not the expected messages.
        """
        answers = {(to, getattr(message, "number", 0)): values_of(message) for to, message in sent}
        for index, number in updates:
            book = self.regions[index]
            self._apply(index, number, book.updates[number].vector)
            answer = answers.pop((index, number), None)
            require(
                (answer is not None) == (book.exchanging == number), "server {} gets {} for {}", index, answer, number
            )
            require(answer is None or same(answer, self.globals.model), "{} is not the model", answer)
        require(not answers, "nobody waits for {}", answers)
        self.globals.left = set()
        for book in self.regions:
            book.updates = {n: Update(u.vector, u.steps, final=False) for n, u in book.updates.items()}

    def check(self, regions: Sequence[RegionNode], globals_: GlobalNode, stocks: Sequence[LeaseStock]) -> None:
        """Compares the nodes with their expected states.

        Raises:
            InvariantError: If they differ.
        """
        under_way = unsent = in_model = 0
        for index, (node, book) in enumerate(zip(regions, self.regions, strict=True)):
            model = node.server.model.tolist()
            require(same(model, book.model), "the model of server {} is {}, not {}", index, model, book.model)
            have, due = (node.server.version, node.server.steps), (book.version, book.unsent)
            require(have == due, "server {} has (version, unsent steps) {}, not {}", index, have, due)
            total = node.budget.total
            require(total == book.total, "server {} counts {} steps of all workers, not {}", index, total, book.total)
            unsent += node.server.steps
            if self._accumulate is not None:
                applied = self.globals.applied.get(index, 0)
                under_way += sum(book.updates[number].steps for number in range(applied + 1, book.number + 1))
        if globals_.server is not None:
            in_model, model = globals_.applied, globals_.model.tolist()
            require(same(model, self.globals.model), "the global model is {}, not {}", model, self.globals.model)
        require(
            self.finished == in_model + under_way + unsent,
            "steps are not conserved: {} are finished, {} in the global model, {} under way, {} unsent",
            self.finished,
            in_model,
            under_way,
            unsent,
        )
        total = globals_.budget.total
        require(total == self.globals.total, "the global node counts {} steps, not {}", total, self.globals.total)
        if self.data is not None:
            self._check_data(self.data, stocks)
        if self.snapshots:
            self._check_newest(*next(reversed(self.snapshots.items())))

    def _check_data(self, data: Data, stocks: Sequence[LeaseStock]) -> None:
        used = data.count["nobody"]
        require(used == self.finished, "{} steps are finished, and the data of {} is used", self.finished, used)
        for index, stock in enumerate(stocks):
            owned, held = data.count[f"server {index}"], sum(lease.steps for lease in stock)
            if self.globals.granted.get(index, 0) == self.regions[index].orders:  # else a grant is in flight
                require(owned == held, "server {} was given data for {} steps and has {} left", index, owned, held)

    def _check_newest(self, save: str, snapshot: Snapshot) -> None:
        """Checks that a snapshot is written as soon as all its parts have arrived."""
        if None not in snapshot.taken and len(snapshot.replied) == len(self.regions):
            misses = [key for key in snapshot.under_way() if key[1] > self.globals.applied.get(key[0], 0)]
            require(bool(misses), "{} has all its parts and is not written", save)

    def _check_vectors(self, shard: Shard, name: str, expected: Vector) -> None:
        """Checks that a copy is the state at the marker, though the server went on while it was made."""
        vector = None if shard.state["server"] is None else shard.state["server"][name]
        if vector is not None:
            broken = "{} has the {} {} of server {} instead of {}"
            require(same(vector.tolist(), expected), broken, shard.marker, name, vector, shard.server, expected)

    def _check_snapshot(self, snapshot: Snapshot) -> None:
        shard, due = snapshot.shards[None], snapshot.under_way()
        assert shard is not None
        self._check_vectors(shard, "model", snapshot.globals.model)
        for index, book in snapshot.regions.items():
            self._check_vectors(snapshot.shards[index], "model", book.model)
            self._check_vectors(snapshot.shards[index], "base", book.base)
        updates = {(update["server"], update["number"]): update for update in shard.state["updates"]}
        if self._accumulate is not None:
            require(
                set(updates) == set(due), "{} has {} under way instead of {}", shard.marker, list(updates), list(due)
            )
        for key, update in updates.items():
            values = update["vector"].tolist()
            require(same(values, due[key].vector), "{} has {} under way instead of {}", shard.marker, values, due[key])
        under_way = sum(update["steps"] for update in updates.values())
        unsent = sum(snapshot.shards[index].state["server"]["steps"] for index in snapshot.regions)
        finished, applied = sum(book.finished for book in snapshot.regions.values()), shard.state["applied"]
        require(
            finished == shard.progress["total"] == applied + under_way + unsent,
            "{} has {} steps instead of {}: {} in the global model, {} under way, {} unsent",
            shard.marker,
            shard.progress["total"],
            finished,
            applied,
            under_way,
            unsent,
        )
        if self.data is not None:
            done = {index for start, stop in shard.progress["done"] for index in range(start, stop)}
            trained = {
                i for book in snapshot.regions.values() for start, stop in book.trained for i in range(start, stop)
            }
            require(done == trained, "{} says that {} are done instead of {}", shard.marker, done, trained)

    def _push(self, index: int, push: Push, vector: Vector) -> list[Update]:
        """Records a new push. Returns the updates that are due."""
        book, ranks = self.regions[index], self._groups[index].ranks
        require(push.number == book.pushes.get(push.worker, 0) + 1, "a push was lost before {}", push)
        book.pushes[push.worker] = push.number
        book.finished += push.steps
        book.total += push.steps
        book.unsent += push.steps
        book.trained += push.data
        if self.data is not None:
            self.data.finish(push.data, f"worker {push.worker}")
        if push.vector is not None and all(map(math.isfinite, vector)):
            apply(book.model, vector, len(ranks))
            book.version += 1
        book.left |= {push.worker} if push.final else set()
        if book.left == set(ranks):
            return [self._take(index, final=True)]
        if self._accumulate is None or book.exchanging or book.version - book.merged_at < self._accumulate[index]:
            return []
        book.exchanging = book.number + 1
        return [self._take(index, final=False)]

    def _take(self, index: int, final: bool) -> Update:
        book = self.regions[index]
        if self._accumulate is None:
            return Update(list(book.model), book.unsent, final)
        pushes, most = book.version - book.base_version, self._accumulate[index]
        weight = min(1.0, most / pushes) if final and pushes else 1.0
        vector = [weight * (base - value) for base, value in zip(book.base, book.model, strict=True)]
        update = Update(vector[:PARAMETERS] + book.model[PARAMETERS:], book.unsent, final)
        book.base, book.base_version, book.unsent = list(book.model), book.version, 0
        return update

    def _merge(self, book: RegionBook, answer: GlobalModel, vector: Vector) -> None:
        if book.has_flushed or not book.exchanging or answer.number != book.exchanging:
            return
        weight = self._merge_weight
        book.model = [(1 - weight) * own + weight * other for own, other in zip(book.model, vector, strict=True)]
        book.base, book.merged_at, book.exchanging = list(book.model), book.version, 0
        book.base_version = book.version

    def _check_pull(self, index: int, sender: int, message: Message, to: int, pull: Pull) -> None:
        assert isinstance(message, Push)
        book = self.regions[index]
        require((to, pull.number) == (sender, message.number), "server {} answers {} with {}", index, message, pull)
        require((pull.vector is None) == (message.vector is None), "server {} answers {} with {}", index, message, pull)
        if pull.vector is not None:
            require(same(values_of(pull), book.model), "{} is not the model {}", pull, book.model)
            require(pull.version == book.version, "{} has not the version {}", pull, book.version)
        require(pull.stop or book.total < self._ordered, "worker {} goes on after {} steps", to, book.total)

    def _send(self, index: int, sent: RegionUpdate | RegionModel, due: list[Update]) -> None:
        book = self.regions[index]
        require(bool(due), "server {} sends {}, which is not due", index, sent)
        book.number += 1
        expected = book.updates[book.number] = due.pop(0)
        final = isinstance(sent, RegionModel) or sent.final
        have, want = (sent.number, sent.steps, final), (book.number, expected.steps, expected.final)
        require(have == want, "server {} sends (number, steps, final) {}, not {}", index, have, want)
        require(same(values_of(sent), expected.vector), "server {} sends {}, not {}", index, sent, expected.vector)

    def _report(self, index: int, report: Progress, push: Push | None) -> None:
        book = self.regions[index]
        require(push is not None, "server {} reports {} without a push", index, report)
        assert push is not None
        book.reports.append((push.steps, push.data))
        have, want = (report.number, report.steps, report.data), (len(book.reports), push.steps, push.data)
        require(have == want, "server {} reports (number, steps, data) {}, not {}", index, have, want)
        book.reported += report.steps

    def _grant(self, granted: dict[int, int], to: int, grant: LeaseGrant, source: str, target: str) -> None:
        if grant.number <= granted.get(to, 0):
            return  # repeated
        require(grant.number == granted.get(to, 0) + 1, "{} gets {}, and not the one before it", target, grant)
        granted[to] = grant.number
        assert self.data is not None
        self.data.move(grant, source, target)

    def _apply(self, index: int, number: int, vector: Vector) -> None:
        book, sent = self.globals, self.regions[index].updates[number]
        require(number == book.applied.get(index, 0) + 1, "update {} of server {} overtakes another", number, index)
        require(same(vector, sent.vector), "update {} of server {} is {}, not {}", number, index, vector, sent.vector)
        book.applied[index] = number
        if self._accumulate is None:
            book.model = list(vector)
        elif sent.steps or not sent.final:
            apply(book.model, vector, len(self.regions))
        if sent.final:
            book.left.add(index)


def apply(model: Vector, vector: Vector, senders: int) -> None:
    """Applies an update to a model by plain SGD with a rate of 1; buffers are averaged."""
    for index, value in enumerate(vector):
        model[index] -= value if index < PARAMETERS else (model[index] - value) / senders


def same(first: Vector, second: Vector) -> bool:
    """Returns whether two vectors are equal except for rounding."""
    if first == second:
        return True
    return len(first) == len(second) and all(
        abs(a - b) < 1e-9 * (1 + abs(a)) for a, b in zip(first, second, strict=True)
    )


def values_of(message: object) -> Vector:
    """Returns the values of a message's vector, an empty list if it has none."""
    vector = getattr(message, "vector", None)
    return [] if vector is None else vector.tolist()
