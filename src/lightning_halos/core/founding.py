"""The decisions before the run of a star of jobs exists: what the run is, its initial model, and when it begins.

Nothing is trained here. When enough members have joined, the run's node takes over.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_halos.core import description as descriptions
from lightning_halos.core.membership import Member, MemberEvent, MemberState, brief, is_possible
from lightning_halos.core.messages import (
    Enrol,
    Enrolled,
    InitialModel,
    Join,
    Message,
    Refusal,
    RunDescription,
    Status,
    Welcome,
)
from lightning_halos.core.open_global_node import OpenGlobalNode
from lightning_halos.core.protocol import ProtocolError, Send
from lightning_halos.core.roster import Roster
from lightning_halos.core.servers import Finding, all_finite

_MOST_CHARACTERS = 500  # of what is wrong with a description


class Founding:
    """Waits for the first members of a star of jobs.

    The first member that joins is the founder: its description is that of the run, and it sends the initial model. If
    it goes before, another one that has joined becomes the founder.

    Args:
        min_regions: Number of members that the run begins with.
        workers: Number of workers that a global step is divided by. Default: those of the first ``min_regions``
            members that enrol, or join without enrolling.
        preferred: Name of the member that decides if it is active.

    Attributes:
        node: The run's node; ``None`` until the run can begin. Its ``start`` must be called, and it must be used
            instead of this object from then on.
        description: What the run is; ``None`` as long as nobody has joined.
    """

    def __init__(self, min_regions: int = 1, workers: int | None = None, preferred: str | None = None) -> None:
        self.node: OpenGlobalNode | None = None
        self.description: RunDescription | None = None
        self._min_regions = min_regions
        self._workers = workers
        self._preferred = preferred
        self._members = Roster()
        self._enrolled: list[int] = []  # in this order
        self._asked: list[int] = []  # members that wait for an answer to their enrolment
        self._founder: int | None = None
        self._model: Tensor | None = None

    @property
    def form(self) -> tuple[int, torch.dtype] | None:
        """Number of elements and dtype of the model; ``None`` as long as nobody has joined."""
        return None if self.description is None else descriptions.form(self.description)

    @property
    def present(self) -> int:
        """Number of members that have joined and are connected."""
        return len(self._members.joining)

    def index_of(self, name: str) -> int:
        """Returns the index of the member with a name, which is the same for ever."""
        member = self._members.named(name)
        return (self._members.add(name) if member is None else member).index

    def name_of(self, index: int) -> str:
        return self._members[index].name

    def inspect(self, message: Message, progress: Iterable[int]) -> Finding | None:
        """Waits for the vector of a message."""
        for _ in progress:
            pass
        return None

    def handle(self, sender: int, message: Message, finding: Finding | None = None) -> list[Send]:
        """Handles a message of a member. Returns the messages to send.

        Raises:
            ProtocolError: If the member must not send it.
        """
        member = self._members[sender]
        match message:
            case Enrol() if is_possible(message) and sender not in self._asked:
                self._enrol(member, message.workers)
                self._asked.append(sender)
                return self._answer_enrolled()
            case Join() if is_possible(message):
                return self._on_join(member, message)
            case InitialModel(vector=Tensor()) if sender == self._founder:
                return self._on_model(member, message)
        raise ProtocolError(f"{member} must not send this before the run has begun: {brief(message)}.")

    def disconnected(self, index: int) -> list[Send]:
        """Forgets a member whose connection is lost. It may join again."""
        member = self._members[index]
        self._asked = [other for other in self._asked if other != index]
        if member.state is MemberState.JOINING:
            member.move(MemberEvent.DISCONNECT)
        return self._found()

    def lose(self, index: int) -> list[Send]:
        """Forgets a member that was silent for too long. It may join again."""
        return self.disconnected(index)

    def expel(self, index: int, reason: str) -> list[Send]:
        """Forgets a member, and refuses its session from now on."""
        self._members.refuse(self._members[index], reason)
        return [Send(index, Refusal(reason)), *self.disconnected(index)]

    def status(self) -> dict[str, Any]:
        """Returns the members that have joined, as plain values."""
        run = {
            "state": "waiting",
            "global_step": 0,
            "max_steps": None if self.description is None else self.description.max_steps,
            "epoch": 0,
            "epochs": None if self.description is None else self.description.epochs,
            "workers": self._workers or 0,
            "total": 0,
            "version": 0,
            "decider": None,
            "min_regions": self._min_regions,
        }
        joined = self._members.joining
        members = {m.name: {"state": m.state.value, "workers": m.workers, "session": m.session} for m in joined}
        return {"run": run, "members": members}

    def _enrol(self, member: Member, workers: int) -> None:
        if member.index not in self._enrolled:
            member.first = sum(self._members[index].workers for index in self._enrolled)
            member.workers = workers
            self._enrolled.append(member.index)
        first = self._enrolled[: self._min_regions]
        if self._workers is None and len(first) == self._min_regions:
            self._workers = sum(self._members[index].workers for index in first)

    def _answer_enrolled(self) -> list[Send]:
        if self._workers is None:
            return []
        asked, self._asked = self._asked, []
        return [Send(index, Enrolled(self._workers, self._members[index].first)) for index in asked]

    def _on_join(self, member: Member, join: Join) -> list[Send]:
        if reason := self._members.refusal(member, join.session):
            return [Send(member.index, Refusal(reason))]
        try:
            descriptions.check(join.description)
        except ValueError as error:
            reason = str(error)[:_MOST_CHARACTERS]
            return [Send(member.index, Refusal(f"This job cannot be part of a run: {reason}."))]
        if self.description and (reason := descriptions.reason_against(self.description, join.description)):
            return [Send(member.index, Refusal(reason))]
        self.description = self.description or join.description
        self._enrol(member, join.workers)
        member.begin(join.session, join.workers, epoch=0)
        member.move(MemberEvent.JOIN)
        if self._founder == member.index:
            self._founder = None  # it has a new connection, and is asked for the model again
        return [*self._answer_enrolled(), *self._found()]

    def _on_model(self, member: Member, message: InitialModel) -> list[Send]:
        vector = message.vector
        assert vector is not None
        if (vector.numel(), vector.dtype) != self.form or vector.dim() != 1 or not all_finite(vector):
            raise ProtocolError(f"{member} sent a model of another form, or with NaN or infinite values.")
        self._model = vector if self._model is None else self._model
        return self._found()

    def _found(self) -> list[Send]:
        """Begins the run if everything is there; else asks the founder for the model, if it was not asked yet."""
        joined = self._members.joining
        if not joined:
            self.description = self._founder = self._model = None
            return []
        if self._model is None:
            if self._founder in [member.index for member in joined]:
                return []
            self._founder = joined[0].index
            return [Send(self._founder, Welcome(self._founder, self._workers or 0, Status(0, 0.0, False), True))]
        if len(joined) >= self._min_regions and self.node is None:
            assert self.description is not None
            workers = self._workers or sum(member.workers for member in joined)
            self.node = OpenGlobalNode(self._model, self.description, workers, self._members, self._preferred)
        return []
