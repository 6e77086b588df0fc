"""The decisions before the run of a star of jobs exists: what the run is, its initial model, and when it begins.

Nothing is trained here. When enough members have joined, the run's node takes over. The caller tells the time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
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

log = logging.getLogger(__name__)

_MOST_CHARACTERS = 500  # of what is wrong with a description
_PARTS = 10  # the initial model must arrive within this multiple of `patience`


class Founding:
    """Waits for the first members of a star of jobs.

    The first member that joins is the founder: its description is that of the run, and it is asked for the initial
    model. If it goes before, another one that has joined becomes the founder.

    A founder that stays and does not send its model loses its part, but not its membership: it may only be slow, and
    the run can use its work as that of any other. The next one that has joined is asked, too, and the model that is
    complete first counts. While nothing arrives from anybody, a job with another description may found the run
    instead. Otherwise a job that sends nothing could keep all others out.

    Args:
        min_regions: Number of members that the run begins with.
        workers: Number of workers that a global step is divided by. Default: those of the first ``min_regions``
            members that enrol, or join without enrolling.
        preferred: Name of the member that decides if it is active.
        patience: Seconds in which a tenth of the initial model must arrive; also for the run's node.
        state: The result of :meth:`state_dict` of an earlier process.

    Attributes:
        node: The run's node; ``None`` until the run can begin. Its ``start`` must be called, and it must be used
            instead of this object from then on.
        description: What the run is; ``None`` as long as nobody has joined.
    """

    def __init__(
        self,
        min_regions: int = 1,
        workers: int | None = None,
        preferred: str | None = None,
        patience: float = 600.0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.node: OpenGlobalNode | None = None
        self.description: RunDescription | None = None
        self._min_regions = min_regions
        self._workers = workers
        self._preferred = preferred
        self._patience = patience
        self._members = Roster()
        self._enrolled: list[int] = []  # in this order
        self._asked: list[int] = []  # members that wait for an answer to their enrolment
        self._founders: list[int] = []  # members that have been asked for the model; the last one is the founder
        self._model: Tensor | None = None
        self._now: float | None = None
        self._last_founder: int | None = None
        self._waited = 0.0  # seconds since a tenth of the model arrived, or another founder was asked first
        self._arrived = self._noted = 0  # elements of initial models until now, and when that tenth was complete
        self._is_overdue = False  # whether nothing has arrived in time
        if state is not None:
            self._load(state)

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
        """Waits for the vector of a message, and notes how much of an initial model has arrived."""
        before = 0
        for elements in progress:
            if isinstance(message, InitialModel):
                self._arrived, before = self._arrived + elements - before, elements
        return None

    def handle(self, sender: int, message: Message, finding: Finding | None = None) -> list[Send]:
        """Handles a message of a member. Returns the messages to send.

        An answer to an enrolment must be sent only when a state of :meth:`state_dict` that has it is on disk.

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
            case InitialModel(vector=Tensor()) if member.owes_model:
                return self._on_model(member, message)
        raise ProtocolError(f"{member} must not send this before the run has begun: {brief(message)}.")

    def tick(self, now: float) -> list[Send]:
        """Asks the next member for the initial model if nothing has arrived for too long.

        Args:
            now: The time in seconds, by a clock that never goes back.
        """
        passed, self._now = 0.0 if self._now is None else now - self._now, now
        if self._model is not None or self.form is None or not self._founders:
            return []
        if (self._arrived - self._noted) * _PARTS >= max(1, self.form[0]):
            self._waited, self._noted, self._is_overdue = 0.0, self._arrived, False
            return []
        self._waited += passed
        if self._waited < self._patience:
            return []
        self._waited, self._noted, self._is_overdue = 0.0, self._arrived, True
        late = self._members[self._founders[-1]]
        others = [member for member in self._members.joining if not member.owes_model]
        if not others:
            log.warning("%s has not sent the initial model in %g s, and nobody else can.", late, self._patience)
            return []
        log.warning(
            "%s has not sent the initial model in %g s. Region %r is the founder instead.",
            late,
            self._patience,
            others[0].name,
        )
        return self._ask(others[0])

    def disconnected(self, index: int) -> list[Send]:
        """Forgets a member whose connection is lost. It may join again."""
        member = self._members[index]
        self._forget(member)
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
            "founder": self._members[self._founders[-1]].name if self._founders else None,
            "min_regions": self._min_regions,
        }
        joined = self._members.joining
        members = {m.name: {"state": m.state.value, "workers": m.workers, "session": m.session} for m in joined}
        return {"run": run, "members": members}

    def state_dict(self) -> dict[str, Any]:
        """Returns what the regions that have enrolled were told, or will be, as plain values.

        Nothing else must survive this process: its members join again, with their descriptions.
        """
        enrolled = [self._members[index] for index in self._enrolled]
        regions = [{"name": m.name, "first": m.first, "workers": m.workers} for m in enrolled]
        return {"workers": self._workers, "regions": regions}

    def _load(self, state: Mapping[str, Any]) -> None:
        for region in state["regions"]:
            member = self._members.add(region["name"])
            member.first, member.workers = region["first"], region["workers"]
            self._enrolled.append(member.index)
        told = state["workers"]
        if told is not None:
            if self._workers not in (None, told):
                log.warning("A global step stays divided by %d workers, as the regions have been told.", told)
            self._workers = told

    def _enrol(self, member: Member, workers: int) -> None:
        if member.index not in self._enrolled:
            self._members.enrol(member, workers)
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
        replaced = []
        if self.description and (reason := descriptions.reason_against(self.description, join.description)):
            if self._model is not None or not self._is_overdue:
                return [Send(member.index, Refusal(reason))]
            replaced = self._replace_all(member, join.description)
        self._forget(member, is_gone=False)  # it has a new connection, and is asked for the model again
        self.description = self.description or join.description
        self._enrol(member, join.workers)
        member.begin(join.session, join.workers, epoch=0)
        member.move(MemberEvent.JOIN)
        return [*replaced, *self._answer_enrolled(), *self._found()]

    def _replace_all(self, member: Member, description: RunDescription) -> list[Send]:
        """Lets a member found another run than those that have joined, from which no initial model arrives."""
        log.warning("%s founds another run, because no initial model of the first one arrives.", member)
        sends = []
        for other in self._members.joining:
            assert self.description is not None
            reason = descriptions.reason_against(description, self.description)
            sends.append(Send(other.index, Refusal(f"No initial model has arrived in time. {reason}")))
            self._forget(other)
            other.move(MemberEvent.DISCONNECT)
        self.description = None
        return sends

    def _forget(self, member: Member, is_gone: bool = True) -> None:
        """Forgets what a member was asked for, and, if it is gone, what it has asked for."""
        if is_gone:
            self._asked = [other for other in self._asked if other != member.index]
        self._founders = [other for other in self._founders if other != member.index]
        member.owes_model = False

    def _on_model(self, member: Member, message: InitialModel) -> list[Send]:
        vector = message.vector
        assert vector is not None
        if (vector.numel(), vector.dtype) != self.form or vector.dim() != 1 or not all_finite(vector):
            raise ProtocolError(f"{member} sent a model of another form, or with NaN or infinite values.")
        member.owes_model = False
        self._model = vector if self._model is None else self._model
        return self._found()

    def _ask(self, member: Member) -> list[Send]:
        """Asks a member for the initial model."""
        if not self._founders and member.index != self._last_founder:
            self._waited, self._is_overdue = 0.0, False
        self._last_founder, member.owes_model = member.index, True
        self._founders.append(member.index)
        return [Send(member.index, Welcome(member.index, self._workers or 0, Status(0, 0.0, False), True))]

    def _found(self) -> list[Send]:
        """Begins the run if everything is there; else asks a founder for the model, if nobody has been asked yet."""
        joined = self._members.joining
        if not joined:
            self.description = self._model = None
            return []
        if self._model is None:
            return [] if self._founders else self._ask(joined[0])
        if len(joined) >= self._min_regions and self.node is None:
            assert self.description is not None
            workers = self._workers or sum(member.workers for member in joined)
            self.node = OpenGlobalNode(
                self._model, self.description, workers, self._members, self._preferred, self._patience
            )
        return []
