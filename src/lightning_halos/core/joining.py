"""How a new process becomes a member of a star of jobs. The rest of its life is in ``open_region_node``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lightning_halos.core.messages import (
    GlobalModel,
    InitialModel,
    Join,
    Message,
    ModelCopy,
    ModelRequest,
    RunDescription,
    Status,
    Welcome,
)
from lightning_halos.core.protocol import GLOBAL, ProtocolError, Send

OTHER_RUN = (
    "The global server serves another run than the one that this job trains in. Start the server with the --directory"
    " of this job's run; or start this job anew, and it takes part in the server's run."
)
"""Why a process that takes part in a run cannot go on with a server of another one, or of none yet."""


class Joining:
    """Joins a run: gives it the initial model if it is asked for it, and takes the global model.

    A lost connection changes nothing: the next one begins with :meth:`join` again.

    Args:
        session: A random text, which no other process has.
        workers: Number of the member's workers.
        description: What the run is.
        model: Returns the initial model, which the receiver may overwrite. Called only if it is needed.

    Attributes:
        welcome: The welcome; ``None`` before it.
        copy: The global model that the member starts from; ``None`` before it has arrived.
        status: The last status; ``None`` before the welcome.
        final: The final model; ``None`` unless the run has ended.
    """

    def __init__(self, session: str, workers: int, description: RunDescription, model: Callable[[], Tensor]) -> None:
        self.session = session
        self.workers = workers
        self.description = description
        self.welcome: Welcome | None = None
        self.copy: ModelCopy | None = None
        self.status: Status | None = None
        self.final: GlobalModel | None = None
        self._model = model

    @property
    def is_ready(self) -> bool:
        """Whether the member's node can be made."""
        return self.welcome is not None and self.copy is not None

    def join(self) -> Join:
        """Returns the first message of a connection."""
        self.welcome = self.copy = self.status = None
        return Join(self.session, self.workers, self.description)

    def handle(self, message: Message) -> list[Send]:
        """Handles a message of the global server. Returns the messages to send.

        Raises:
            ProtocolError: If the message is not expected.
        """
        match message:
            case Welcome(needs_model=True):
                return [Send(GLOBAL, InitialModel(self._model()))]
            case Welcome():
                self.welcome, self.status = message, message.status
                return [Send(GLOBAL, ModelRequest(1))]
            case ModelCopy(vector=Tensor()):
                self.copy = message
            case Status() if self.status is not None and message.number > self.status.number:
                # A status has only the plateau steps that are new.
                message.plateau_steps = [*self.status.plateau_steps, *message.plateau_steps]
                message.first_plateau_step = 0
                self.status = message
            case Status():
                pass
            case GlobalModel(final=True):
                self.final = message
            case _:
                raise ProtocolError(f"A new member got an unexpected message: {message!r}.")
        return []
