"""A job's connection with the global server of a star of jobs. When it is lost, a thread dials again.

What is said on a connection is decided by the party that uses it: before a fit one that joins, then the region's
server. Messages that are posted while there is no connection are dropped, because the party repeats what is missing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from lightning_halos.core.messages import Failure, Message, Preempted, Refusal
from lightning_halos.core.protocol import uses_models_link
from lightning_halos.core.vector import Fill, ignore_progress
from lightning_halos.transport.errors import PeerFailedError, PeerLostError, ServerRefusedError
from lightning_halos.transport.link import Form, Link, OnFailure, OnMessage, since, wait_all

if TYPE_CHECKING:
    from lightning_halos.transport.session import Session  # which needs cryptography

Dial = Callable[[float, Callable[[], None]], "Session"]
"""Dials for so many seconds, and calls a function that may raise several times a second meanwhile."""

LIVENESS = 30.0
"""Seconds of silence after which the global server counts as unreachable. A living one is never silent for so long."""
_PAUSE, _LONGEST_PAUSE = 1.0, 30.0  # seconds before a lost connection is dialed again; longer after useless ones

log = logging.getLogger(__name__)


class Party(Protocol):
    """The user of a connection. Its methods are called in the connection's threads, which hold no lock then."""

    def connected(self) -> Sequence[Message]:
        """Returns the first messages of a new connection."""

    def disconnected(self) -> None:
        """Is called when the connection is lost."""

    def receive(self, message: Message, progress: Iterable[int]) -> bool:
        """Handles a message, whose vector arrives while ``progress`` is iterated over.

        Returns:
            Whether it did; otherwise the message waits for the next party.
        """


class ServerConnection:
    """The connection.

    Args:
        dial: Dials the global server.
        limit: Seconds without a connection after which the job fails.

    Attributes:
        server: Address of the server, for messages.
        models: The link for models, for a host.
        control: The link for everything else, for a host.
    """

    def __init__(self, server: str, dial: Dial, limit: float) -> None:
        self.server = server
        self.models = RedialedLink(self)
        self.control = RedialedLink(self)
        self._dial = dial
        self._limit = limit
        self._form: Form | None = None
        self._changed = threading.Condition()
        self._session: Session | None = None
        self._greeted: Session | None = None
        self._open: Session | None = None  # on which the first message is sent
        self._carried = 0  # bytes on earlier connections
        self._models: Link | None = None
        self._party: Party | None = None
        self._is_lost = self._is_closed = False
        self._pause = _PAUSE
        self._refusal: Refusal | None = None
        self._refused_since: float | None = None  # by `time.monotonic`; `None` after any other message
        self._patience = limit  # seconds of refusals that may pass
        self._error: Exception | None = None
        self._on_failure: Callable[[Exception], None] = lambda error: None

    def open(self, limit: float, interrupted: Callable[[], None]) -> None:
        """Dials, and waits at most ``limit`` seconds for the connection.

        The job also fails if the server refuses it for so long, for reasons that may pass.
        """
        self._patience = limit
        self._adopt(self._dial(limit, interrupted))
        for run in (self._keep, self._watch):
            threading.Thread(target=run, name=f"halos connection {self.server}", daemon=True).start()

    def serve(self, party: Party | None, goes_on: bool = False) -> None:
        """Lets a party use the connection instead of the present one; ``None``: nobody, and messages wait.

        Args:
            party: The party.
            goes_on: Whether it goes on where the one before has ended, so that only a new connection is greeted.
        """
        if not self._hand_over(party, goes_on) and party is not None:
            party.disconnected()  # before another thread may greet the server for it
            self._hand_over(party, goes_on, is_told=True)
        self._greet()

    def _hand_over(self, party: Party | None, goes_on: bool, is_told: bool = False) -> bool:
        """Hands the connection to a party, unless it first has to be told that the one before has lost it."""
        with self._changed:
            was_lost = self._is_lost or self._session is not self._greeted
            if party is not None and goes_on and was_lost and not is_told:
                return False
            self._party = party
            if party is not None and not goes_on:
                self._greeted = None
            self._changed.notify_all()
            return True

    def expect_models(self, form: Form) -> None:
        """Allows vectors of a form."""
        with self._changed:
            self._form = form
            self._start_models()

    def on_failure(self, fail: Callable[[Exception], None]) -> None:
        """Sets the function that is called if the connection cannot be restored, or the server refuses the job.

        It is called at once if that has happened already.
        """
        with self._changed:
            self._on_failure, error = fail, self._error
        if error is not None:
            fail(error)

    def check(self) -> None:
        """Raises the error after which the connection cannot be restored, if any."""
        if self._error is not None:
            raise self._error

    @property
    def is_refused(self) -> bool:
        """Whether the server has refused the job, and has not let it in since."""
        return self._refusal is not None or self._refused_since is not None

    def post(self, message: Message, fill: Fill | None = None, sent: Callable[[], None] | None = None) -> None:
        """Sends a message, if there is a connection; see :meth:`Link.post`."""
        with self._changed:
            session, models = (None, None) if self._is_lost else (self._session, self._models)
            if session is not self._open:
                session = None
            link = None if session is None else models if uses_models_link(message) else session.control
        if link is not None:
            link.post(message, fill, sent)
        elif fill is not None:
            fill(ignore_progress)

    def say_goodbye(self) -> None:
        """Says goodbye, without waiting, when the server has nothing more to say. It is not dialed again."""
        with self._changed:
            session, models, self._is_closed, self._party = self._session, self._models, True, None
            self._changed.notify_all()
        for link in (models, None if session is None else session.control):
            if link is not None:
                link.close()

    def close(self, timeout: float) -> None:
        """Says goodbye, and waits at most ``timeout`` seconds for the server's."""
        self.say_goodbye()
        if self._session is not None:
            self._session.close(timeout)

    @property
    def traffic(self) -> int:
        """Bytes that the connections of this process have carried."""
        with self._changed:
            links = [] if self._session is None else [self._session.control, self._models]
            return self._carried + sum(link.bytes_sent + link.bytes_received for link in links if link is not None)

    # ------------------------------------------------------------------ the connection's threads

    def _adopt(self, session: Session) -> None:
        carried = self.traffic
        with self._changed:
            if self._is_closed:
                session.abort()
                return
            self._carried, self._models, self._is_lost, self._refusal = carried, None, False, None
            self._session = session
            session.control.start(self._receiver(session), self._loser(session))
            self._start_models()
        self._greet()

    def _start_models(self) -> None:
        session = self._session
        if session is not None and self._form is not None and self._models is None and not self._is_lost:
            self._models = session.models(self._form)
            self._models.start(self._receiver(session), self._loser(session))

    def _greet(self) -> None:
        with self._changed:
            party = self._party
            if party is None or self._is_lost or self._is_closed or self._session is self._greeted:
                return
            session = self._greeted = self._session
        assert session is not None
        messages = party.connected()
        with self._changed:  # what the party answers to the server's answer must find the session open
            if session is self._session:
                for message in messages:
                    session.control.post(message)
                self._open = session

    def _receiver(self, session: Session) -> OnMessage:
        def receive(message: Message, progress: Iterable[int]) -> None:
            if isinstance(message, Refusal):
                self._refusal = message
                return
            if isinstance(message, Failure):
                self._server_has_ended(session, message.reason)
                return
            party: Party | None = None
            while True:
                with self._changed:
                    if self._refused_since is not None:
                        log.warning("The global server %s lets this job in now.", self.server)
                        self._refused_since = None
                    while self._party in (None, party) and not self._is_closed and session is self._session:
                        self._changed.wait()
                    party = self._party if session is self._session and not self._is_lost else None
                    self._pause = _PAUSE
                if party is None:
                    wait_all(progress)
                    return
                if party.receive(message, progress):
                    return

        return receive

    def _loser(self, session: Session) -> OnFailure:
        def lose(error: Exception) -> None:
            with self._changed:
                if session is self._session and not self._is_lost and not self._is_closed:
                    if not isinstance(error, PeerLostError):
                        self._fail(error)
                        return
                    if self._refusal is None:
                        log.warning("The connection with the global server is lost: %s It is dialed again.", error)
                    self._is_lost = True
                    self._changed.notify_all()

        return lose

    def _watch(self) -> None:
        """Notices a server that is silent, with its connection open, or that has said goodbye."""
        while not self._is_closed:
            time.sleep(1.0)
            with self._changed:
                session, models = self._session, self._models
                links = [] if session is None or self._is_lost else [session.control, models]
            now = time.monotonic()
            for link in links:
                if session is not None and link is not None and (link.has_said_goodbye or link.silence(now) > LIVENESS):
                    what = "has said goodbye" if link.has_said_goodbye else f"was last heard of {since(link.heard)}"
                    self._loser(session)(PeerLostError(f"The global server {self.server} {what}."))

    def _keep(self) -> None:
        """Dials again whenever the connection is lost."""
        try:
            while self._wait_for_loss():
                self._redial(self._refusal)
        except _ClosedError:
            pass
        except Exception as error:
            self._fail(error)

    def _wait_for_loss(self) -> bool:
        with self._changed:
            while not self._is_lost and not self._is_closed:
                self._changed.wait()
            if self._is_closed:
                return False
            session, party = self._session, self._party
        if session is not None:
            session.abort()
        if party is not None:
            party.disconnected()
        return True

    def _redial(self, refusal: Refusal | None) -> None:
        deadline = time.monotonic() + self._pause
        if refusal is not None:
            self._tell_refusal(refusal, deadline)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)  # until a connection brings a message
        self._wait_until(deadline)
        session = self._dial_patiently()
        if refusal is None:
            log.warning("The global server %s is connected again.", self.server)
        self._adopt(session)

    def _tell_refusal(self, refusal: Refusal, next_at: float) -> None:
        """Logs why the server refuses the job, or raises an error if it will not be dialed again."""
        if refusal.for_good:
            raise PeerFailedError(f"The global server {self.server} refuses this job: {refusal.reason}")
        now = time.monotonic()
        is_new = self._refused_since is None
        since = self._refused_since = now if self._refused_since is None else self._refused_since
        if next_at > since + self._patience:
            raise PeerFailedError(
                f"The global server {self.server} has refused this job for timeout={self._patience:g} s:"
                f" {refusal.reason}"
            )
        if is_new:
            log.warning(
                "The global server %s refuses this job now: %s It is asked again for up to %.0f s.",
                *(self.server, refusal.reason, self._patience),
            )

    def _dial_patiently(self) -> Session:
        """Dials. What was right once may become right again, so it is tried until the limit, whatever is wrong.

        Examples are keys that are replaced just now, here or at the server, and a proxy that answers for a server that
        is away. Only what the server itself refuses for good is believed at once.
        """
        deadline, pause = time.monotonic() + self._limit, _PAUSE
        told = ""
        while True:
            try:
                return self._dial(max(0.0, deadline - time.monotonic()), self._check_closed)
            except (ServerRefusedError, OSError, ValueError) as error:  # the last two: the keys cannot be read
                is_final = isinstance(error, ServerRefusedError) and error.is_answer
                if is_final or time.monotonic() + pause > deadline:
                    raise
                if str(error) != told:
                    told = str(error)
                    log.warning("%s It is tried again for up to %.0f s.", told, deadline - time.monotonic())
            self._wait_until(time.monotonic() + pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _wait_until(self, moment: float) -> None:
        while time.monotonic() < moment:
            self._check_closed()
            time.sleep(0.1)

    def _check_closed(self) -> None:
        if self._is_closed:
            raise _ClosedError

    def _server_has_ended(self, session: Session, reason: str) -> None:
        """Ends the job, because the server has given the run up, and will not be back by itself."""
        with self._changed:
            if session is not self._session or self._is_closed:
                return
            self.say_goodbye()
        self._fail(PeerFailedError(f"The global server {self.server} has given up: {reason}"))

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._error, fail = error, self._on_failure
        fail(error)


class _ClosedError(Exception):
    """The connection was closed while it was dialed again."""


class RedialedLink(Link):
    """One of the two links of a connection, for a host. It stays the same when the connection is dialed again.

    It passes a failure of the job on to the server, but not a preemption, which only concerns the job.
    """

    def __init__(self, connection: ServerConnection) -> None:
        super().__init__(connection.server)
        self._connection = connection

    def post(self, message: Message, fill: Fill | None = None, sent: Callable[[], None] | None = None) -> None:
        if not isinstance(message, Preempted):
            self._connection.post(message, fill, sent)

    def start(self, on_message: OnMessage, on_failure: OnFailure) -> None:
        """Does nothing, because the connection itself receives."""

    def _receive_all(self, on_message: OnMessage) -> None:
        raise AssertionError
