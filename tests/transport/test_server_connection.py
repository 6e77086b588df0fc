"""What a job's threads do at the same moment with its connection to the global server."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from lightning_halos.core.messages import Failure, Join, LeaseRequest, Message, RunDescription, Welcome
from lightning_halos.core.messages import Status as News
from lightning_halos.transport import server_connection
from lightning_halos.transport.errors import PeerFailedError, PeerLostError
from lightning_halos.transport.server_connection import ServerConnection

LIMIT = 10.0
DESCRIPTION = RunDescription("", "float32", [], [], [], "HALoS", {})
JOIN, WELCOME, REQUEST = Join("session", 1, DESCRIPTION), Welcome(0, 1, News(0, 0.0, False)), LeaseRequest(1, 1)


class Control:
    """The link of a session. It notes what is posted, and a test is the server at its other end."""

    has_said_goodbye = False
    bytes_sent = bytes_received = 0
    heard = None

    def __init__(self) -> None:
        self.posted: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.on_message: Callable[[Message, Iterable[int]], None]
        self.on_failure: Callable[[Exception], None]
        self.answer: Callable[[Message], None] = lambda message: None

    def start(self, on_message: Any, on_failure: Any) -> None:
        self.on_message, self.on_failure = on_message, on_failure

    def post(self, message: Message, fill: object = None, sent: object = None) -> None:
        self.posted.put(message)
        self.answer(message)

    def close(self) -> None: ...

    def silence(self, now: float) -> float:
        return 0.0


class FakeSession:
    def __init__(self) -> None:
        self.control = Control()
        self.can_be_dialed = threading.Event()
        self.can_be_dialed.set()

    def abort(self) -> None: ...

    def close(self, timeout: float) -> None: ...


class Region:
    """A party that joins, and asks for data when it is welcome."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.when_disconnected: Callable[[], object] = lambda: None
        self.when_connected: Callable[[], object] = lambda: None
        self.connection: ServerConnection

    def connected(self) -> list[Message]:
        self.when_connected()
        self.calls.append("connected")
        return [JOIN]

    def disconnected(self) -> None:
        self.when_disconnected()
        self.calls.append("disconnected")

    def receive(self, message: Message, progress: Iterable[int]) -> bool:
        if isinstance(message, Welcome):
            self.connection.post(REQUEST)
        return True


@pytest.fixture
def sessions() -> list[FakeSession]:
    return [FakeSession() for _ in range(3)]


@pytest.fixture
def connection(sessions: list[FakeSession], monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerConnection]:
    monkeypatch.setattr(server_connection, "_PAUSE", 0.0)
    left = iter(sessions)

    def dial(limit: float, check: Callable[[], None]) -> Any:
        session = next(left)
        assert session.can_be_dialed.wait(LIMIT)
        return session

    opened = ServerConnection("the server", dial, LIMIT)
    opened.open(LIMIT, lambda: None)
    yield opened
    opened.close(0.0)


def in_thread(run: Callable[..., object], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=run, args=args, daemon=True)
    thread.start()
    return thread


def test_a_server_that_answers_at_once_finds_the_connection_open(
    connection: ServerConnection, sessions: list[FakeSession]
) -> None:
    """As if the thread that greets were slow: the answer is there before its ``post`` returns."""
    region, control = Region(), sessions[0].control
    region.connection = connection

    def answer(message: Message) -> None:
        if message is JOIN:
            in_thread(control.on_message, WELCOME, ()).join(0.5)

    control.answer = answer
    connection.serve(region)
    assert control.posted.get(timeout=LIMIT) is JOIN
    assert control.posted.get(timeout=LIMIT) is REQUEST


def test_a_region_that_takes_over_is_told_of_a_loss_before_it_joins_again(
    connection: ServerConnection, sessions: list[FakeSession]
) -> None:
    connection.serve(Region())
    connection.serve(None)
    region, is_greeted = Region(), threading.Event()
    region.when_connected = is_greeted.set

    def while_the_connection_comes_back() -> None:
        sessions[1].can_be_dialed.set()
        is_greeted.wait(0.5)

    region.when_disconnected = while_the_connection_comes_back
    sessions[1].can_be_dialed.clear()
    sessions[0].control.on_failure(PeerLostError("the network is down"))
    connection.serve(region, goes_on=True)
    assert sessions[1].control.posted.get(timeout=LIMIT) is JOIN
    assert region.calls == ["disconnected", "connected"]


def test_a_slow_greeting_of_a_lost_session_leaves_the_next_one_open(
    connection: ServerConnection, sessions: list[FakeSession]
) -> None:
    region, again = Region(), sessions[1].control
    region.connection = connection

    def while_another_thread_greets() -> None:
        region.when_connected = lambda: None
        sessions[0].control.on_failure(PeerLostError("the network is down"))
        assert again.posted.get(timeout=LIMIT) is JOIN

    region.when_connected = while_another_thread_greets
    connection.serve(region)
    connection.post(REQUEST)
    assert again.posted.get(timeout=LIMIT) is REQUEST


def test_an_error_before_anybody_asked_for_errors_is_told(
    connection: ServerConnection, sessions: list[FakeSession]
) -> None:
    connection.serve(Region())
    sessions[0].control.on_message(Failure("the global server", "Too few regions took part."), ())
    failures: list[Exception] = []
    connection.on_failure(failures.append)
    assert [type(failure) for failure in failures] == [PeerFailedError]
