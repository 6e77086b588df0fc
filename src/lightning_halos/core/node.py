"""The common part of the two server nodes.

A node takes one message and returns the messages to send. It has no links, threads or clock, so that the hosts of
``transport`` and the virtual network of ``simulation`` can both drive it. What the nodes decide is in ``region_node``
and ``global_node``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, Generic, TypeVar

from torch import Tensor

from lightning_halos.core.cursor import Lease
from lightning_halos.core.finding import Finding
from lightning_halos.core.messages import GlobalModel, LeaseGrant, Message, Push, RegionUpdate
from lightning_halos.core.parameter_server import ParameterServer
from lightning_halos.core.protocol import ProtocolError, Send
from lightning_halos.core.schedule import StepBudget
from lightning_halos.core.shadow import Shadow

S = TypeVar("S", bound=Enum)
E = TypeVar("E", bound=Enum)


class Node(ABC, Generic[S, E]):
    """A node.

    Args:
        name: Its name in errors.
        state: The first state.
        transitions: The next state for each state and event. Missing events are not allowed.
        budget: The step budget, which the node updates.

    Attributes:
        server: The server; ``None`` if the node has none.
        state: The state of the node.
        budget: The step budget.
    """

    server: ParameterServer | None

    def __init__(self, name: str, state: S, transitions: Mapping[S, Mapping[E, S]], budget: StepBudget) -> None:
        self.state = state
        self.budget = budget
        self._name = name
        self._transitions = transitions
        self._asked_to_stop = False  # by a worker
        self._plateau_steps: list[tuple[int, float]] = []
        self._metrics: dict[str, float] = {}
        self._final: GlobalModel | None = None

    @property
    def version(self) -> int:
        """Number of updates in the server's model."""
        return 0 if self.server is None else self.server.version

    @property
    def model(self) -> Tensor:
        """The server's model."""
        assert self.server is not None
        return self.server.model

    @abstractmethod
    def start(self) -> list[Send]:
        """Returns the first messages to send."""

    def inspect(self, message: Message, progress: Iterable[int]) -> Finding | None:
        """Inspects the vector of a message while it arrives. Reads nothing that :meth:`handle` changes.

        ``progress`` yields the number of elements that have arrived so far.
        """
        if isinstance(message, Push | RegionUpdate) and message.vector is not None and self.server is not None:
            return self.server.inspect(message.vector, progress)
        for _ in progress:
            pass
        return None

    @abstractmethod
    def handle(self, sender: int, message: Message, finding: Finding | None = None) -> list[Send]:
        """Handles a message. Returns the messages to send, in this order.

        Args:
            sender: Address of the sender.
            message: The message. Its vector may be written to.
            finding: The result of :meth:`inspect`. Default: inspect the vector now.

        Raises:
            ProtocolError: If the node's state does not allow the message, or the sender may not send it.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of the state from which a later run can continue, without messages in flight."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state of :meth:`state_dict` or of a snapshot, before :meth:`start`."""

    def _move(self, event: E) -> None:
        """Goes to the next state, or raises a :class:`ProtocolError`."""
        if event not in self._transitions[self.state]:
            raise ProtocolError(f"{self._name} is {self.state.value}, which does not allow this: {event.value}.")
        self.state = self._transitions[self.state][event]


def grant_of(lease: Lease | None, number: int) -> LeaseGrant:
    """Returns the answer to the lease request ``number``; ``None`` means that no data is left."""
    return LeaseGrant(0, 0, 0, number) if lease is None else LeaseGrant(lease.epoch, lease.first, lease.steps, number)


def send_model(index: int, answer: GlobalModel, shadow: Shadow) -> Send:
    """Returns the sending of the global model to a local server that has a shadow of it."""
    assert answer.vector is not None
    answer.is_difference, fill = shadow.sending(lambda advance: None, answer.vector)
    return Send(index, answer, fill)
