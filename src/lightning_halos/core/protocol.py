"""The common parts of the two server nodes: addresses, sent messages, states and their transitions.

This file has no decisions. The transition tables are data, which :mod:`~lightning_halos.core.region_node` and
:mod:`~lightning_halos.core.global_node` follow, and which a test checks completely.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from lightning_halos.core.messages import GlobalModel, Marker, Message, RegionModel, RegionUpdate, Shard
from lightning_halos.core.vector import Advance, ignore_progress

GLOBAL = -1
"""Address of the global node. A local server's workers have their ranks as addresses, local servers their indices."""
STORAGE = -2
"""Address of whatever writes the parts of a snapshot."""


class ProtocolError(RuntimeError):
    """A message that the state of its receiver does not allow, or that its sender must not send."""


@dataclass(frozen=True)
class Send:
    """A message to be sent.

    Attributes:
        to: Address of the receiver.
        message: The message.
        fill: Computes the message's vector from front to back and reports the number of complete elements; ``None`` if
            the vector is complete. It must run before the node handles another message, and in the order of the list.
            A shard may be completed later, with :meth:`Shard.advance`.
    """

    to: int
    message: Message | Shard
    fill: Callable[[Advance], object] | None = None

    def complete(self) -> Message | Shard:
        """Computes the message's vector, if necessary, and returns the message."""
        if self.fill is not None:
            self.fill(ignore_progress)
        if isinstance(self.message, Shard):
            while not self.message.advance():
                pass
        return self.message


def uses_models_link(message: Message) -> bool:
    """Returns whether a message between a local server and the global server is sent on the models link.

    Other messages have a link of their own, so that a stop notice overtakes a model. A marker is sent on the models
    link, because it separates the answers before a snapshot from those after it.
    """
    return isinstance(message, (RegionUpdate, RegionModel, GlobalModel, Marker))


class RegionState(Enum):
    """The state of a local server."""

    SERVING = "serving"  # no update is unanswered
    EXCHANGING = "exchanging"  # an update is unanswered
    FLUSHED = "flushed"  # all workers have finished, and the last update is sent
    FINISHED = "finished"  # the final model has arrived


class RegionEvent(Enum):
    """An event of a local server."""

    PUSH = "push"
    UPDATE = "update"  # the server sends an update
    LAST_PUSH = "last push"  # the last worker has finished
    ANSWER = "answer"  # the answer to an update arrives
    FINAL_MODEL = "final model"
    STATUS = "status"
    LEASE_REQUEST = "lease request"
    LEASE_GRANT = "lease grant"
    MARKER = "marker"


class GlobalState(Enum):
    """The state of the global node."""

    RUNNING = "running"
    STOPPING = "stopping"  # every local server is told that no worker starts another round
    FINISHED = "finished"  # every local server has sent its last message, and the final model is sent


class GlobalEvent(Enum):
    """An event of the global node."""

    UPDATE = "update"
    LAST_UPDATE = "last update"  # a local server has sent its last message, others have not
    ALL_UPDATES = "all updates"  # the last local server has sent its last message
    PROGRESS = "progress"
    STOP = "stop"  # the budget is used up, or a worker asks for it
    LEASE_REQUEST = "lease request"
    MARKER_REPLY = "marker reply"
    PUBLISH = "publish"
    SAVE = "save"


S = TypeVar("S", bound=Enum)
E = TypeVar("E", bound=Enum)


class StateMachine(Generic[S, E]):
    """A state that changes according to a table.

    Args:
        name: Name of the owner, for errors.
        state: The first state.
        transitions: The next state for each state and event. Missing events are not allowed.

    Attributes:
        state: The present state.
    """

    def __init__(self, name: str, state: S, transitions: dict[S, dict[E, S]]) -> None:
        self.state = state
        self._name = name
        self._transitions = transitions

    def move(self, event: E) -> None:
        """Goes to the next state.

        Raises:
            ProtocolError: If the state does not allow the event.
        """
        if event not in self._transitions[self.state]:
            raise ProtocolError(f"{self._name} is {self.state.value}, which does not allow this: {event.value}.")
        self.state = self._transitions[self.state][event]


_R, _RE = RegionState, RegionEvent
REGION_TRANSITIONS: dict[RegionState, dict[RegionEvent, RegionState]] = {
    _R.SERVING: {
        _RE.PUSH: _R.SERVING,
        _RE.UPDATE: _R.EXCHANGING,
        _RE.LAST_PUSH: _R.FLUSHED,
        _RE.STATUS: _R.SERVING,
        _RE.LEASE_REQUEST: _R.SERVING,
        _RE.LEASE_GRANT: _R.SERVING,
        _RE.MARKER: _R.SERVING,
    },
    _R.EXCHANGING: {
        _RE.PUSH: _R.EXCHANGING,
        _RE.ANSWER: _R.SERVING,
        _RE.LAST_PUSH: _R.FLUSHED,
        _RE.STATUS: _R.EXCHANGING,
        _RE.LEASE_REQUEST: _R.EXCHANGING,
        _RE.LEASE_GRANT: _R.EXCHANGING,
        _RE.MARKER: _R.EXCHANGING,
    },
    _R.FLUSHED: {
        _RE.ANSWER: _R.FLUSHED,  # to the update before the last: ignored, since the final model follows
        _RE.FINAL_MODEL: _R.FINISHED,
        _RE.STATUS: _R.FLUSHED,
        _RE.LEASE_GRANT: _R.FLUSHED,  # ordered ahead, but no longer needed
        _RE.MARKER: _R.FLUSHED,
    },
    _R.FINISHED: {
        # The control link may be slower than the models link.
        _RE.STATUS: _R.FINISHED,
        _RE.LEASE_GRANT: _R.FINISHED,
    },
}

_G, _GE = GlobalState, GlobalEvent
GLOBAL_TRANSITIONS: dict[GlobalState, dict[GlobalEvent, GlobalState]] = {
    _G.RUNNING: {
        _GE.UPDATE: _G.RUNNING,
        _GE.LAST_UPDATE: _G.RUNNING,
        _GE.ALL_UPDATES: _G.FINISHED,
        _GE.PROGRESS: _G.RUNNING,
        _GE.STOP: _G.STOPPING,
        _GE.LEASE_REQUEST: _G.RUNNING,
        _GE.MARKER_REPLY: _G.RUNNING,
        _GE.PUBLISH: _G.RUNNING,
        _GE.SAVE: _G.RUNNING,
    },
    _G.STOPPING: {
        _GE.UPDATE: _G.STOPPING,
        _GE.LAST_UPDATE: _G.STOPPING,
        _GE.ALL_UPDATES: _G.FINISHED,
        _GE.PROGRESS: _G.STOPPING,
        _GE.LEASE_REQUEST: _G.STOPPING,
        _GE.MARKER_REPLY: _G.STOPPING,
        _GE.PUBLISH: _G.STOPPING,
        _GE.SAVE: _G.STOPPING,
    },
    _G.FINISHED: {
        # The control link may be slower than the models link.
        _GE.PROGRESS: _G.FINISHED,
        _GE.LEASE_REQUEST: _G.FINISHED,
        _GE.MARKER_REPLY: _G.FINISHED,
        _GE.PUBLISH: _G.FINISHED,
    },
}
