"""The members of a star of jobs: their states, and what the global node knows of each.

Data and arithmetic only. The global node decides when a member changes its state.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from lightning_halos.core import description as descriptions
from lightning_halos.core.counters import ServerCounters
from lightning_halos.core.cursor import Spans
from lightning_halos.core.finding import Finding
from lightning_halos.core.messages import Enrol, Join, LeaseGrant, LeaseRequest, Message, RegionUpdate
from lightning_halos.core.protocol import ProtocolError


class MemberState(Enum):
    """The state of a member."""

    JOINING = "joining"  # not welcome yet
    ACTIVE = "active"
    DISCONNECTED = "disconnected"  # its connection is lost; it trains on and is expected back
    LEFT = "left"  # it has said goodbye, and all that it trained is in the global model
    LOST = "lost"  # it was away for too long, or its process has ended


class MemberEvent(Enum):
    """What happens to a member."""

    JOIN = "join"  # a new process
    WELCOME = "welcome"
    DISCONNECT = "disconnect"
    RETURN = "return"  # the same process, on a new connection
    LEAVE = "leave"
    LOSE = "lose"


_S, _E = MemberState, MemberEvent
MEMBER_TRANSITIONS: dict[MemberState, dict[MemberEvent, MemberState]] = {
    _S.JOINING: {
        _E.JOIN: _S.JOINING,
        _E.RETURN: _S.JOINING,
        _E.WELCOME: _S.ACTIVE,
        _E.DISCONNECT: _S.LOST,
        _E.LOSE: _S.LOST,
    },
    _S.ACTIVE: {
        _E.RETURN: _S.ACTIVE,  # before the loss of the old connection was noticed
        _E.DISCONNECT: _S.DISCONNECTED,
        _E.LEAVE: _S.LEFT,
        _E.LOSE: _S.LOST,
    },
    _S.DISCONNECTED: {_E.RETURN: _S.ACTIVE, _E.DISCONNECT: _S.DISCONNECTED, _E.LOSE: _S.LOST},
    _S.LOST: {_E.JOIN: _S.JOINING, _E.RETURN: _S.ACTIVE, _E.DISCONNECT: _S.LOST, _E.LOSE: _S.LOST},
    # A member that has left may ask again for the model that it left with.
    _S.LEFT: {_E.JOIN: _S.JOINING, _E.RETURN: _S.LEFT, _E.DISCONNECT: _S.LEFT, _E.LOSE: _S.LEFT},
}
"""The next state of a member for each state and event. Missing events are not allowed."""


class Report(NamedTuple):
    """What must be taken back of a report if its update never arrives."""

    number: int
    update: int  # number of the update that contains its push
    steps: int
    counted: list[tuple[int, int]]  # its data that no other report had


@dataclass
class Member:
    """The global node's record of a member. Everything from ``begins`` on belongs to its present process.

    Attributes:
        name: Its name, by its certificate.
        index: Its index.
        first: Workers of the members that have enrolled before it.
        state: Its state.
        counters: Counters for monitoring, of all its sessions.
        begins: The epoch with which its process begins.
        epochs: Epochs that its workers have finished, by worker, as far as they have reported.
        session: Its process.
        workers: Number of its workers.
        is_stale: Whether this record is from a snapshot, and the member may have gone on since.
        is_saved: Whether a snapshot on disk has the member, with that session, as present.
        has_decided: Whether it decides, or has decided.
        was_given_up: Whether it was lost because it had let the others wait for too long.
        owes_model: Whether it has been asked for the initial model on its present connection, and has not sent it.
        update: Number of its last update.
        report: Number of its last report.
        publication: Number of its last publication.
        counted: Local steps in its reports.
        reported: Data in its reports.
        open: Data that was leased to it, and that it has not reported.
        leased: All data that was leased to it.
        uncovered: Reports of pushes whose update has not arrived.
        is_flushed: Whether its last update has arrived.
        fastest: Its fastest worker's local steps per second.
        status: Number of its last status.
        told: Number of plateau steps that it was told.
        saved: Numbers of its last update and publication that a snapshot on disk has.
        request: Its lease request that waits.
        grant: The answer to its last lease request.
        waiting: Updates that wait for reports of pushes that they contain.
    """

    name: str
    index: int
    first: int = 0
    state: MemberState = MemberState.JOINING
    counters: ServerCounters = field(default_factory=ServerCounters)
    begins: int = 0
    epochs: dict[int, int] = field(default_factory=dict)
    session: str = ""
    workers: int = 0
    is_stale: bool = False
    is_saved: bool = False
    has_decided: bool = False
    was_given_up: bool = False
    owes_model: bool = False
    update: int = 0
    report: int = 0
    publication: int = 0
    counted: int = 0
    reported: Spans = field(default_factory=Spans)
    open: Spans = field(default_factory=Spans)
    leased: Spans = field(default_factory=Spans)
    uncovered: deque[Report] = field(default_factory=deque)
    is_flushed: bool = False
    fastest: float = 0.0
    status: int = 0
    told: int = 0
    saved: tuple[int, int] = 0, 0
    request: LeaseRequest | None = None
    grant: LeaseGrant | None = None
    waiting: deque[tuple[RegionUpdate, Finding | None]] = field(default_factory=deque)

    @property
    def is_present(self) -> bool:
        """Whether it takes part in the run, even if it is not connected just now."""
        return self.state in (MemberState.ACTIVE, MemberState.DISCONNECTED)

    @property
    def is_active(self) -> bool:
        return self.state is MemberState.ACTIVE

    def move(self, event: MemberEvent) -> None:
        """Goes to the next state, or raises a :class:`ProtocolError`."""
        if event not in MEMBER_TRANSITIONS[self.state]:
            raise ProtocolError(f"{self} is {self.state.value}, which does not allow this: {event.value}.")
        self.state = MEMBER_TRANSITIONS[self.state][event]

    @property
    def epoch(self) -> int:
        """Epochs that all its workers have finished."""
        return min(self.epochs.get(worker, self.begins) for worker in range(max(1, self.workers)))

    def count_epochs(self, worker: int, finished: int) -> None:
        """Records how many epochs a worker says that it has finished."""
        known = self.epochs.get(worker, self.begins)
        self.epochs[worker] = max(known, min(finished, known + _MOST_EPOCHS))

    def begin(self, session: str, workers: int, epoch: int) -> None:
        """Begins a new session, with an epoch."""
        fresh = Member(
            self.name, self.index, self.first, self.state, self.counters, epoch, session=session, workers=workers
        )
        vars(self).update(vars(fresh))

    def disconnect(self) -> None:
        """Forgets what belongs to the connection. The member repeats it on the next one."""
        self.request = self.grant = None
        self.owes_model = False
        self.waiting.clear()

    def cover(self, update: int) -> None:
        """Records that an update has arrived."""
        self.update = update
        while self.uncovered and self.uncovered[0].update <= update:
            self.uncovered.popleft()

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values, without what depends on the connection."""
        state = {name: copy.copy(getattr(self, name)) for name in _PLAIN}  # a snapshot is written while the run goes on
        spans = {name: list(getattr(self, name)) for name in _SPANS}
        uncovered = [tuple(report) for report in self.uncovered]
        counters = dataclasses.asdict(self.counters)
        return {**state, **spans, "state": self.state.value, "uncovered": uncovered, "counters": counters}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Member:
        """Returns the member of a state of :meth:`state_dict`, not connected."""
        member = cls(state["name"], state["index"])
        vars(member).update({name: state[name] for name in _PLAIN})
        vars(member).update({name: Spans(state[name]) for name in _SPANS})
        member.state = MemberState(state["state"])
        if member.session and member.state is MemberState.JOINING:  # it may have been welcomed since
            member.move(MemberEvent.WELCOME)
        if member.is_active:
            member.move(MemberEvent.DISCONNECT)
        member.uncovered = deque(Report(*report) for report in state["uncovered"])
        member.counters = ServerCounters(**state["counters"])
        member.saved, member.is_stale = (member.update, member.publication), True
        member.is_saved = member.is_present
        return member

    def __str__(self) -> str:
        return f"Region {self.name!r}"


def is_possible(message: Enrol | Join) -> bool:
    """Whether a process can have the identity and the number of workers that a message has."""
    return 0 < message.workers <= descriptions.MOST_WORKERS and 0 < len(message.session) <= _MOST_CHARACTERS


def brief(message: Message) -> str:
    """Returns a message as text for errors: the beginning of its fields, without its vector."""
    fields = ", ".join(f"{name}={value!r}" for name, value in vars(message).items() if name != "vector")
    return f"{type(message).__name__}({fields[:_SHOWN]}{'...' if len(fields) > _SHOWN else ''})"


_MOST_EPOCHS = 1000  # that a worker may finish between two reports; more of them do not count
_MOST_CHARACTERS = 64  # of the identity of a process, which is kept
_SHOWN = 200  # characters of a message in errors
_PLAIN = (
    "name",
    "index",
    "first",
    "begins",
    "epochs",
    "session",
    "workers",
    "has_decided",
    "update",
    "report",
    "publication",
    "counted",
    "is_flushed",
    "fastest",
    "status",
)
_SPANS = ("reported", "open", "leased")
