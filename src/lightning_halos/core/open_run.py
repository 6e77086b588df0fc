"""The state of a run whose members come and go: what a snapshot has of it, and what members and people are told.

It decides nothing: ``open_global_node`` says what changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_halos.core import description as descriptions
from lightning_halos.core.confirmations import Confirmations
from lightning_halos.core.cursor import Spans
from lightning_halos.core.deciding import Deciding
from lightning_halos.core.global_server import GlobalServer
from lightning_halos.core.leasing import Leasing
from lightning_halos.core.member_status import status_of
from lightning_halos.core.members import Member
from lightning_halos.core.messages import GlobalModel, RunDescription, Status, Welcome
from lightning_halos.core.node import Node
from lightning_halos.core.patience import Patience
from lightning_halos.core.protocol import OPEN_GLOBAL_TRANSITIONS, GlobalState, OpenEvent, Send
from lightning_halos.core.roster import Roster
from lightning_halos.core.schedule import StepBudget
from lightning_halos.core.shadow import Shadow

R = TypeVar("R", bound="OpenRun")


class OpenRun(Node[GlobalState, OpenEvent]):
    """The state of a star of jobs, on the global server.

    Args:
        run: A random text, which no other run has.
        model: The initial model. The server owns it from here on.
        description: What the run is.
        workers: Number of workers that a global step is divided by.
        members: The members; those that are joining are welcomed by :meth:`start`.
        preferred: Name of the member that decides if it is active.
        patience: Seconds that the others wait, at least, for a member that is connected; see :class:`Patience`.

    Attributes:
        run: As above.
        server: The global server.
        description: What the run is.
    """

    server: GlobalServer

    def __init__(
        self,
        run: str,
        model: Tensor,
        description: RunDescription,
        workers: int,
        members: Roster | None = None,
        preferred: str | None = None,
        patience: float = 1800.0,
    ) -> None:
        budget = StepBudget(workers, description.max_steps)
        super().__init__("The global server", GlobalState.RUNNING, OPEN_GLOBAL_TRANSITIONS, budget)
        self.run = run
        self.description = description
        shapes = [torch.Size(shape) for shape in description.shapes]
        self.server = GlobalServer(model, descriptions.global_optimizer(description, 1), shapes)
        self.server.num_teachers = description.teachers
        self._is_restored = False
        self._deciding = Deciding(preferred)
        self._patience = Patience(patience)
        self._shadows: dict[int, Shadow] = {}  # of the members' present connections
        self._set_members(Roster() if members is None else members)

    def _set_members(self, members: Roster, done: Spans | None = None, awaited: Iterable[int] = ()) -> None:
        self._members = members
        self._leasing = Leasing(self.description, members, done, awaited)
        self._confirmations = Confirmations(members)

    @classmethod
    def restored(cls: type[R], state: Mapping[str, Any], preferred: str | None = None, patience: float = 1800.0) -> R:
        """Returns the node of a snapshot on disk. None of its members is connected."""
        fields = state["description"]
        description = RunDescription(
            **{**fields, "buffers": [(name, list(shape)) for name, shape in fields["buffers"]]}
        )
        elements, dtype = descriptions.form(description)
        model = torch.zeros(elements, dtype=dtype)
        node = cls(state["run"], model, description, state["workers"], preferred=preferred, patience=patience)
        node.load_state_dict(state)
        return node

    @property
    def present(self) -> int:
        """Number of members that are connected; 0 if work is left, and all of them have sent their last updates."""
        active = self._members.active
        can_work = self.state is not GlobalState.RUNNING or not all(member.is_flushed for member in active)
        return len(active) if can_work else 0

    @property
    def wants_snapshot(self) -> bool:
        """Whether a member waits for a snapshot that has it."""
        return self._confirmations.is_needed

    def index_of(self, name: str) -> int:
        """Returns the index of the member with a name, which is the same for ever."""
        return self._members.index_of(name, is_stale=self._is_restored)

    def name_of(self, index: int) -> str:
        return self._members[index].name

    def status(self) -> dict[str, Any]:
        """Returns the state of the run and of its members, as plain values."""
        run = {
            "state": self.state.value,
            "global_step": self.budget.position,
            "max_steps": self.budget.max_steps,
            "epoch": self._leasing.epoch,
            "epochs": self.description.epochs,
            "workers": self.budget.workers,
            "total": self.budget.total,
            "applied": self.server.steps,
            "version": self.version,
            "metrics": dict(self._metrics),
            "decider": None if self._deciding.index is None else self._members[self._deciding.index].name,
        }
        rejections = self.server.rejections
        members = {m.name: status_of(m, rejections.get(m.index, 0)) for m in self._members if m.session}
        return {"run": run, "members": members}

    def state_dict(self) -> dict[str, Any]:
        return self._state(self.server.state_dict())

    def _state(self, server: dict[str, Any]) -> dict[str, Any]:
        return {
            "run": self.run,
            "description": dataclasses.asdict(self.description),
            "workers": self.budget.workers,
            "total": self.budget.total,
            "state": self.state.value,
            "asked_to_stop": self._asked_to_stop,
            "done": list(self._leasing.done),
            "members": [member.state_dict() for member in self._members],
            "decider": self._deciding.index,
            "plateau_steps": list(self._plateau_steps),
            "metrics": dict(self._metrics),
            "callbacks": self._deciding.callbacks,
            "refused": dict(self._members.refused),
            "server": server,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        # Has the rates of the snapshot's number of members, so that the optimizer's windows go on.
        senders = state["server"]["senders"]
        self.server.follow(senders, descriptions.global_rates(self.description, senders))
        self.server.load_state_dict(state["server"])
        self.budget.total = state["total"]
        self.state = GlobalState(state["state"])
        self._asked_to_stop = state["asked_to_stop"]
        self._is_restored = True
        members = Roster(map(Member.restored, state["members"]), state["refused"])
        self._set_members(members, Spans(state["done"]), [member.index for member in members.present])
        self._deciding.index, self._deciding.callbacks = state["decider"], state["callbacks"]
        self._plateau_steps = [(index, value) for index, value in state["plateau_steps"]]
        self._metrics = dict(state["metrics"])
        if self.state is GlobalState.FINISHED:
            self._final = self._model_at_end()
        self._follow()

    def _follow(self) -> None:
        """Adapts the server to the number of members."""
        present = max(1, len(self._members.present))
        self.server.follow(present, descriptions.global_rates(self.description, present))

    def _welcome(self, member: Member, is_new: bool, lost: Spans | None = None) -> Send:
        status = self._status(member)
        status.first_plateau_step, status.plateau_steps = 0, list(self._plateau_steps)
        welcome = Welcome(
            member=member.index,
            workers=self.budget.workers,
            status=status,
            is_new=is_new,
            received=member.update,
            reports=member.report,
            publications=member.publication,
            epoch=self._leasing.epoch_of(member),
            lost=list(lost or ()),
            callbacks=self._deciding.callbacks if status.decides else "",
            run=self.run,
        )
        return Send(member.index, welcome)

    def _model_at_end(self) -> GlobalModel:
        return GlobalModel(self.version, True, self._asked_to_stop, self.budget.position, self.model)

    def _tell_all(self) -> list[Send]:
        return [self._tell(member) for member in self._members.active]

    def _tell(self, member: Member) -> Send:
        return Send(member.index, self._status(member))

    def _status(self, member: Member) -> Status:
        first, member.told = member.told, len(self._plateau_steps)
        member.status += 1
        return Status(
            total=self.budget.total,
            fastest=max((other.fastest for other in self._members.present), default=0.0),
            stop=self.state is not GlobalState.RUNNING,
            counted=member.counted,
            first_plateau_step=first,
            plateau_steps=self._plateau_steps[first:],
            metrics=dict(self._metrics),
            number=member.status,
            saved=member.saved[0],
            saved_publication=member.saved[1],
            decides=self._deciding.is_part_of(member),
        )
