"""The addresses, sent messages, states and transitions of the two server nodes.

This file has no decisions. The transition tables are data, which the nodes follow and a test checks completely.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lightning_halos.core.messages import (
    GlobalModel,
    InitialModel,
    Marker,
    Message,
    ModelCopy,
    RegionModel,
    RegionUpdate,
)
from lightning_halos.core.snapshot import Shard
from lightning_halos.core.vector import Fill, ignore_progress

GLOBAL = -1
"""Address of the global node. A local server's workers have their ranks as addresses, local servers their indices."""
STORAGE = -2
"""Address of whatever writes the parts of a snapshot."""


class ProtocolError(RuntimeError):
    """A message that the state of its receiver does not allow, or that its sender must not send."""


@dataclass(frozen=True)
class Send:
    """A message to be sent."""

    to: int  # address of the receiver
    message: Message | Shard  # a shard may be completed later, with `Shard.advance`
    # Computes the message's vector from front to back and reports the number of complete elements; None if the vector
    # is complete. It must run before the node handles another message, and in the order of the list.
    fill: Fill | None = None

    def complete(self) -> Message | Shard:
        """Computes the message's vector, if necessary, and returns the message."""
        if self.fill is not None:
            self.fill(ignore_progress)
        while isinstance(self.message, Shard) and not self.message.advance():
            pass
        return self.message


def uses_models_link(message: Message) -> bool:
    """Returns whether a message between a local server and the global server is sent on the models link.

    Other messages have a link of their own, so that a stop notice overtakes a model. A marker is sent on the models
    link, because it separates the answers before a snapshot from those after it.
    """
    return isinstance(message, (RegionUpdate, RegionModel, GlobalModel, InitialModel, ModelCopy, Marker))


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
    SNAPSHOT = "snapshot"


class OpenEvent(Enum):
    """An event of the global node of a star of jobs."""

    ENROL = "enrol"
    JOIN = "join"  # a member joins, or returns
    GO = "go"  # a member is disconnected, is lost or leaves
    UPDATE = "update"
    PROGRESS = "progress"
    LEASE_REQUEST = "lease request"
    MODEL_REQUEST = "model request"
    PUBLISH = "publish"
    STOP = "stop"  # the budget is used up, or somebody asks for it
    GO_ON = "go on"  # the budget is no longer used up, because a member is lost
    FINISH = "finish"  # the work is done, and all present members have sent their last updates
    SNAPSHOT = "snapshot"


_R, _RE = RegionState, RegionEvent
REGION_TRANSITIONS: dict[RegionState, dict[RegionEvent, RegionState]] = {
    _R.SERVING: {
        **dict.fromkeys((_RE.PUSH, _RE.STATUS, _RE.LEASE_REQUEST, _RE.LEASE_GRANT, _RE.MARKER), _R.SERVING),
        _RE.UPDATE: _R.EXCHANGING,
        _RE.LAST_PUSH: _R.FLUSHED,
    },
    _R.EXCHANGING: {
        **dict.fromkeys((_RE.PUSH, _RE.STATUS, _RE.LEASE_REQUEST, _RE.LEASE_GRANT, _RE.MARKER), _R.EXCHANGING),
        _RE.ANSWER: _R.SERVING,
        _RE.LAST_PUSH: _R.FLUSHED,
    },
    # An answer to the update before the last is ignored, and data that was ordered ahead is no longer needed.
    _R.FLUSHED: {
        **dict.fromkeys((_RE.ANSWER, _RE.STATUS, _RE.LEASE_GRANT, _RE.MARKER), _R.FLUSHED),
        _RE.FINAL_MODEL: _R.FINISHED,
    },
    # The control link may be slower than the models link.
    _R.FINISHED: dict.fromkeys((_RE.STATUS, _RE.LEASE_GRANT), _R.FINISHED),
}
"""The next state of a local server for each state and event. Missing events are not allowed."""

OPEN_REGION_TRANSITIONS: dict[RegionState, dict[RegionEvent, RegionState]] = {
    # The run may have ended while the region was away. Then its workers still have to finish.
    **{state: {**REGION_TRANSITIONS[state], _RE.FINAL_MODEL: state} for state in (_R.SERVING, _R.EXCHANGING)},
    _R.FLUSHED: REGION_TRANSITIONS[_R.FLUSHED],
    _R.FINISHED: REGION_TRANSITIONS[_R.FINISHED],
}
"""The same for the local server of a member in a star of jobs."""

_G, _GE = GlobalState, GlobalEvent
_AT_ANY_TIME = (_GE.PROGRESS, _GE.LEASE_REQUEST, _GE.MARKER_REPLY, _GE.PUBLISH)
_UNTIL_THE_END = (*_AT_ANY_TIME, _GE.UPDATE, _GE.LAST_UPDATE, _GE.SNAPSHOT)
GLOBAL_TRANSITIONS: dict[GlobalState, dict[GlobalEvent, GlobalState]] = {
    _G.RUNNING: {
        **dict.fromkeys(_UNTIL_THE_END, _G.RUNNING),
        _GE.STOP: _G.STOPPING,
        _GE.ALL_UPDATES: _G.FINISHED,
    },
    _G.STOPPING: {**dict.fromkeys(_UNTIL_THE_END, _G.STOPPING), _GE.ALL_UPDATES: _G.FINISHED},
    _G.FINISHED: dict.fromkeys(_AT_ANY_TIME, _G.FINISHED),
}
"""The next state of the global node for each state and event. Missing events are not allowed."""

_OE = OpenEvent
_ALWAYS = (
    _OE.ENROL,
    _OE.JOIN,
    _OE.GO,
    _OE.UPDATE,
    _OE.PROGRESS,
    _OE.LEASE_REQUEST,
    _OE.MODEL_REQUEST,
    _OE.PUBLISH,
    _OE.SNAPSHOT,
)
OPEN_GLOBAL_TRANSITIONS: dict[GlobalState, dict[OpenEvent, GlobalState]] = {
    _G.RUNNING: {**dict.fromkeys(_ALWAYS, _G.RUNNING), _OE.STOP: _G.STOPPING, _OE.FINISH: _G.FINISHED},
    _G.STOPPING: {**dict.fromkeys(_ALWAYS, _G.STOPPING), _OE.GO_ON: _G.RUNNING, _OE.FINISH: _G.FINISHED},
    # A member that was lost may return, and get the final model.
    _G.FINISHED: dict.fromkeys(
        (_OE.ENROL, _OE.JOIN, _OE.GO, _OE.LEASE_REQUEST, _OE.MODEL_REQUEST, _OE.SNAPSHOT), _G.FINISHED
    ),
}
"""The next state of the global node of a star of jobs for each state and event. Missing events are not allowed."""
