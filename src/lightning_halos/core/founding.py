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
from lightning_halos.core.enrolment import Enrolment
from lightning_halos.core.finding import Finding
from lightning_halos.core.founders import Founders
from lightning_halos.core.joining import OTHER_RUN
from lightning_halos.core.member_checks import check_join
from lightning_halos.core.members import Member, MemberEvent, MemberState, brief, is_possible
from lightning_halos.core.messages import (
    Enrol,
    InitialModel,
    Join,
    Message,
    Refusal,
    RunDescription,
    Status,
    Welcome,
)
from lightning_halos.core.open_global_node import OpenGlobalNode
from lightning_halos.core.parameter_server import all_finite
from lightning_halos.core.protocol import ProtocolError, Send
from lightning_halos.core.roster import Roster

log = logging.getLogger(__name__)

_MOST_CHARACTERS = 500  # of what is wrong with a description


class Founding:
    """Waits for the first members of a star of jobs.

    The first member that joins is the founder: its description is that of the run, and it is asked for the initial
    model. If it goes before, another one that has joined becomes the founder.

    A founder that stays and does not send its model loses its part, but not its membership: it may only be slow, and
    the run can use its work as that of any other. The next one that has joined is asked, too, and the model that is
    complete first counts. While nothing arrives from anybody, a job with another description may found the run
    instead. Otherwise a job that sends nothing could keep all others out.

    Args:
        run: A random text, which no other run has.
        min_regions: Number of members that the run begins with.
        workers: Number of workers that a global step is divided by. Default: those of the first ``min_regions``
            members that enrol, or join without enrolling.
        preferred: Name of the member that decides if it is active.
        patience: Seconds in which the initial model must arrive; see :class:`Founders`. Also for the run's node.
        state: The result of :meth:`state_dict` of an earlier process.

    Attributes:
        node: The run's node; ``None`` until the run can begin. Its ``start`` must be called, and it must be used
            instead of this object from then on.
        description: What the run is; ``None`` as long as nobody has joined.
    """

    def __init__(
        self,
        run: str,
        min_regions: int = 1,
        workers: int | None = None,
        preferred: str | None = None,
        patience: float = 1800.0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.node: OpenGlobalNode | None = None
        self.description: RunDescription | None = None
        self._run = run
        self._min_regions = min_regions
        self._preferred = preferred
        self._patience = patience
        self._members = Roster()
        self._enrolment = Enrolment(self._members, min_regions, workers)
        self._founders = Founders(patience)
        self._model: Tensor | None = None
        if state is not None:
            self._enrolment.load_state_dict(state)

    @property
    def form(self) -> tuple[int, torch.dtype] | None:
        """Number of elements and dtype of the model; ``None`` as long as nobody has joined."""
        return None if self.description is None else descriptions.form(self.description)

    @property
    def present(self) -> int:
        """Number of members that have joined and are connected."""
        return len(self._members.joining)

    @property
    def told(self) -> list[int]:
        """Indices of the members that were told numbers, and may still live. They are to be lost like all others."""
        return self._enrolment.told

    def index_of(self, name: str) -> int:
        """Returns the index of the member with a name, which is the same for ever."""
        return self._members.index_of(name)

    def name_of(self, index: int) -> str:
        return self._members[index].name

    def inspect(self, message: Message, progress: Iterable[int]) -> Finding | None:
        """Waits for the vector of a message, and notes how much of an initial model has arrived."""
        before = 0
        for elements in progress:
            if isinstance(message, InitialModel):
                self._founders.count(elements - before)
                before = elements
        return None

    def handle(self, sender: int, message: Message, finding: Finding | None = None) -> list[Send]:
        """Handles a message of a member. Returns the messages to send.

        An answer to an enrolment must be sent only when a state of :meth:`state_dict` that has it is on disk.

        Raises:
            ProtocolError: If the member must not send it.
        """
        member = self._members[sender]
        match message:
            case Enrol() if is_possible(message):
                if reason := self._enrolment.enrol(member, message.session, message.workers):
                    return self._refuse(member, reason)
                self._enrolment.ask(member)
                return self._enrolment.answer()
            case Join():
                return self._on_join(member, message)
            case InitialModel(vector=Tensor()) if member.owes_model:
                return self._on_model(member, message)
        raise ProtocolError(f"{member} must not send this before the run has begun: {brief(message)}.")

    def tick(self, now: float) -> list[Send]:
        """Asks the next member for the initial model if nothing has arrived for too long.

        Args:
            now: The time in seconds, by a clock that never goes back.
        """
        elements, _ = self.form or (0, None)
        if not self._founders.wait(now, elements if self._model is None else None):
            return []
        late, seconds = self._founders.founder, self._founders.seconds
        others = [member for member in self._members.joining if not member.owes_model]
        if not others:
            log.warning("%s has not sent the initial model in %g s, and nobody else can.", late, seconds)
            return []
        then = others[0].name
        log.warning("%s has not sent the initial model in %g s. Region %r is the founder instead.", late, seconds, then)
        return self._ask(others[0])

    def disconnected(self, index: int) -> list[Send]:
        """Forgets a member whose connection is lost. It may join again."""
        member = self._members[index]
        self._enrolment.disconnect(member)
        self._founders.forget(member)
        if member.state is MemberState.JOINING:
            member.move(MemberEvent.DISCONNECT)
        return self._found()

    def lose(self, index: int) -> list[Send]:
        """Forgets a member that was silent for too long, or whose job has ended. It may join again."""
        self._enrolment.withdraw(self._members[index])
        return self.disconnected(index)

    def expel(self, index: int, reason: str) -> list[Send]:
        """Forgets a member, and refuses its session from now on."""
        self._members.refuse(self._members[index], reason)
        return [Send(index, Refusal(reason)), *self.lose(index)]

    def status(self) -> dict[str, Any]:
        """Returns the members that have joined, as plain values."""
        founder = self._founders.founder
        run = {
            "state": "waiting",
            "global_step": 0,
            "max_steps": None if self.description is None else self.description.max_steps,
            "epoch": 0,
            "epochs": None if self.description is None else self.description.epochs,
            "workers": self._enrolment.workers or 0,
            "total": 0,
            "version": 0,
            "decider": None,
            "founder": None if founder is None else founder.name,
            "min_regions": self._min_regions,
        }
        joined = self._members.joining
        members = {m.name: {"state": m.state.value, "workers": m.workers, "session": m.session} for m in joined}
        return {"run": run, "members": members}

    def state_dict(self) -> dict[str, Any]:
        """Returns what the regions that have enrolled were told, or will be, as plain values.

        Nothing else must survive this process: its members join again, with their descriptions.
        """
        return self._enrolment.state_dict()

    def _on_join(self, member: Member, join: Join) -> list[Send]:
        check_join(member, join)
        if join.run:  # somebody may start the server again with the right directory
            return [Send(member.index, Refusal(OTHER_RUN, for_good=False))]
        if reason := self._members.refusal(member, join.session):
            return self._refuse(member, reason)
        try:
            descriptions.check(join.description)
        except ValueError as error:
            reason = str(error)[:_MOST_CHARACTERS]
            return self._refuse(member, f"This job cannot be part of a run: {reason}.")
        reason = descriptions.reason_against(self.description, join.description) if self.description else ""
        if reason and (self._model is not None or not self._founders.is_overdue):
            return self._refuse(member, reason)
        if changed := self._enrolment.enrol(member, join.session, join.workers):
            return self._refuse(member, changed)
        replaced = self._replace_all(member, join.description) if reason else []
        self._founders.forget(member)  # it has a new connection, and is asked for the model again
        self.description = self.description or join.description
        member.begin(join.session, join.workers, epoch=0)
        member.move(MemberEvent.JOIN)
        return [*replaced, *self._enrolment.answer(), *self._found()]

    def _refuse(self, member: Member, reason: str) -> list[Send]:
        """Refuses a member's job, which ends with it."""
        self._enrolment.withdraw(member)
        return [Send(member.index, Refusal(reason))]

    def _replace_all(self, member: Member, description: RunDescription) -> list[Send]:
        """Lets a member found another run than those that have joined, from which no initial model arrives."""
        log.warning("%s founds another run, because no initial model of the first one arrives.", member)
        sends: list[Send] = []
        for other in self._members.joining:
            assert self.description is not None
            reason = descriptions.reason_against(description, self.description)
            sends += self._refuse(other, f"No initial model has arrived in time. {reason}")
            self._founders.forget(other)
            other.move(MemberEvent.DISCONNECT)
        self.description = None
        return sends

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
        self._founders.add(member)
        return [Send(member.index, Welcome(member.index, self._enrolment.workers or 0, Status(0, 0.0, False), True))]

    def _found(self) -> list[Send]:
        """Begins the run if everything is there; else asks a founder for the model, if nobody has been asked yet."""
        joined = self._members.joining
        if not joined:
            self.description = self._model = None
            return []
        if self._model is None:
            return self._ask(joined[0]) if self._founders.founder is None else []
        if len(joined) >= self._min_regions and self.node is None:
            assert self.description is not None
            workers = self._enrolment.workers or sum(member.workers for member in joined)
            self._enrolment.end()
            self.node = OpenGlobalNode(
                self._run, self._model, self.description, workers, self._members, self._preferred, self._patience
            )
        return []
