"""The host of the run's node: its members' connections, one lock, and what a connection may cost.

Each authenticated peer is a client; it becomes a member's connection with its first message. Whatever a member's
message raises costs this member its membership, never the run. The node decides what it means that a member joins,
leaves or is lost; ``snapshots`` decides when a snapshot is written.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from lightning_halos.core.founding import Founding
from lightning_halos.core.members import MemberState
from lightning_halos.core.messages import (
    Decide,
    Enrol,
    Failure,
    GlobalModel,
    InitialModel,
    Join,
    Message,
    ModelRequest,
    Preempted,
    Refusal,
    RegionUpdate,
    StatusReply,
    StatusRequest,
    Welcome,
)
from lightning_halos.core.open_global_node import OpenGlobalNode
from lightning_halos.core.protocol import GlobalState, ProtocolError, Send, uses_models_link
from lightning_halos.core.snapshot import Shard
from lightning_halos.serving.client import MOST_SESSIONS, Client, Clients
from lightning_halos.serving.gate import SnapshotGate
from lightning_halos.serving.journal import Journal
from lightning_halos.transport.certificates import Certificate
from lightning_halos.transport.compute import ComputeThreads, threads_beside
from lightning_halos.transport.errors import PeerLostError
from lightning_halos.transport.link import Link
from lightning_halos.transport.session import Session
from lightning_halos.transport.vector_parts import VectorForm
from lightning_halos.transport.wire import vector_of

log = logging.getLogger(__name__)

T = TypeVar("T")
Node = Founding | OpenGlobalNode

GOODBYE = 30.0
"""Seconds in which a member that has got its last message must say goodbye."""

_PAUSE = 0.01  # seconds between two looks

RETURN = 30.0
"""Seconds that members have for their return after a restart of the server, at least."""

_MOST_UNSENT = 10_000  # messages that wait to be sent to a member; more come together only if it reads nothing
_MOST_ANSWERS = 100  # messages that wait to be sent to a peer that asks for the status
_MOST_CHARACTERS = 2000  # of a reason


class RunHost:
    """Hosts the node of a run, and serves its clients.

    Args:
        node: The node of a run, or of its founding.
        liveness: Seconds of silence after which a member is lost.
        status: Returns the text for who asks for the status.

    Attributes:
        node: The node. Other threads use it through :meth:`ask` and :meth:`act`.
        returns_within: Seconds that members have for their return after a restart of the server.
        changed: Set whenever something happened that a snapshot should have.
        updates: Number of updates that have arrived since this process started.
    """

    def __init__(self, node: Node, liveness: float, status: Callable[[], str] = lambda: "{}") -> None:
        self._compute = ComputeThreads(threads_beside(1))
        self._use(node)
        self.changed = threading.Event()
        self.updates = 0
        self._journal = Journal()
        self._liveness = liveness
        self._status = status
        self._lock = threading.RLock()
        self._clients = Clients()
        self._members: dict[int, Client] = {}  # those that are connected
        self._gate = SnapshotGate(is_on_disk=isinstance(node, OpenGlobalNode))  # which then comes from a snapshot
        self._traffic: dict[str, list[int]] = {}  # bytes sent and received on connections that have ended, by name
        # Since when a member has been without connection, by `time.monotonic`. After a restart they get more time,
        # because they may have been away for long, and then dial only now and then.
        self.returns_within = max(RETURN, liveness)
        since = time.monotonic() + self.returns_within - liveness
        self._missing = dict.fromkeys(node.told if isinstance(node, Founding) else _disconnected(node), since)

    def ask(self, question: Callable[[Node], T]) -> T:
        """Returns what a function returns for the node, which handles no message meanwhile."""
        with self._lock:
            return question(self.node)

    def act(self, action: Callable[[Node], Sequence[Send]]) -> None:
        """Posts the messages that a function of the node returns."""
        with self._lock:
            self._post(action(self.node))

    def admit(self, session: Session) -> None:
        """Starts to serve an authenticated peer. It does not wait for the node, which may be busy with an update."""
        client = Client(session, time.time())
        if not self._clients.add(client):  # it does not even take a reason
            self._note(client, f"{client} is refused: it has too many connections already.", logging.WARNING)
            session.abort()
            return
        self._start(client, session.control)
        if client.is_refused:
            self._refuse(
                client,
                f"{session.name} has {MOST_SESSIONS} connections already. Somebody may ask for the status with its keys"
                " again and again.",
            )

    def watch(self, now: float) -> None:
        """Notices goodbyes, and loses the members of which nothing came for too long.

        ``now`` is by ``time.monotonic``.
        """
        with self._lock:
            for client in [client for client in self._clients if not client.is_closing]:
                if client.session.control.has_said_goodbye:
                    self._on_goodbye(client)
                elif client.silence(now) > self._liveness:
                    self._drop(client)
                    if client.index is not None:
                        self._lose(client.index, client.session.name)
            for index, since in list(self._missing.items()):
                if now - since > self._liveness:
                    self._lose(index, self.node.name_of(index))

    def expel_if(self, objection: Callable[[Certificate], str | None]) -> None:
        """Expels the clients to whose certificates there is an objection."""
        with self._lock:
            for client in list(self._clients):
                if not client.is_closing and (reason := objection(client.session.certificate)):
                    self._expel(client, reason)

    @property
    def must_save(self) -> bool:
        """Whether a message, or a new member's data, waits for a snapshot."""
        with self._lock:
            return self._gate.must_save or (isinstance(self.node, OpenGlobalNode) and self.node.wants_snapshot)

    def begin_founding(self) -> tuple[int, dict[str, Any]] | None:
        """Begins to save what was decided before the run has begun; ``None`` if it has.

        Returns:
            The number of the snapshot, and the state.
        """
        with self._lock:
            return (self._gate.begin(), self.node.state_dict()) if isinstance(self.node, Founding) else None

    def founding_written(self, number: int) -> None:
        """Records that the state of :meth:`begin_founding` is on disk, and sends what has waited for it."""
        with self._lock:
            self._gate.written(number, has_run=False)
            self._send_held()

    def begin_snapshot(self) -> tuple[int, Shard]:
        """Begins a snapshot. Returns its number, and its state as far as it has been copied."""
        with self._lock:
            assert isinstance(self.node, OpenGlobalNode)
            (send,) = self.node.begin_snapshot()
            assert isinstance(send.message, Shard)
            return self._gate.begin(), send.message

    def snapshot_written(self, number: int, shard: Shard) -> None:
        """Records that a snapshot is on disk, tells the members, and sends what has waited for it."""
        with self._lock:
            assert isinstance(self.node, OpenGlobalNode)
            self._gate.written(number)
            self._post(self.node.saved(shard.marker.save))
            self._send_held()

    def snapshot_failed(self, number: int) -> None:
        """Records that a snapshot could not be written, and sends what need not wait for it."""
        with self._lock:
            self._gate.failed(number)
            self._send_held()

    def give_up(self, reason: str, timeout: float) -> None:
        """Tells all members that this server ends and is not to be waited for, and why.

        It waits until they have said goodbye, but at most ``timeout`` seconds.
        """
        with self._lock:
            for client in self._clients:
                client.session.control.post(Failure("the global server", reason))
                self._close(client, timeout)
        deadline = time.monotonic() + timeout
        while list(self._clients) and time.monotonic() < deadline:
            time.sleep(_PAUSE)

    def abort(self) -> None:
        """Cuts all connections, so that members dial again."""
        with self._lock:
            for client in list(self._clients):
                self._drop(client)

    def note(self, sentence: str, level: int = logging.INFO) -> None:
        """Logs a sentence, which may have a member's words, and keeps it for the status."""
        self._journal.note(sentence, level)

    def _note(self, client: Client, sentence: str, level: int = logging.INFO) -> None:
        """Logs a sentence about a client, and keeps it, unless there are too many about it."""
        self._journal.note(sentence, level, client.session.name, client.session.address)

    @property
    def events(self) -> list[tuple[float, str]]:
        """The latest events, as pairs of their time (by ``time.time``) and a sentence."""
        return self._journal.latest

    def connections(self) -> dict[str, dict[str, Any]]:
        """Returns what is known of the members' connections, by the members' names.

        ``address``, ``connected`` (since when, by ``time.time``) and ``certificate_end`` (likewise), which are ``None``
        without a connection; ``silence`` (seconds for which nothing has come); and ``bytes_sent`` and
        ``bytes_received`` since this process started.
        """
        now = time.monotonic()
        with self._lock:
            members = [client for client in self._clients if client.index is not None and not client.is_refused]
            present = {client.session.name: client for client in members}
            missing = {self.node.name_of(index): since for index, since in self._missing.items()}
            found = {}
            for name in {**present, **missing, **self._traffic}:
                client = present.get(name)
                traffic = [self._traffic.get(name, [0, 0]), [0, 0] if client is None else client.traffic()]
                sent, received = map(sum, zip(*traffic, strict=True))
                silence = None if client is None else client.silence(now)
                found[name] = {
                    "address": None if client is None else client.session.address,
                    "connected": None if client is None else client.since,
                    "certificate_end": None if client is None else client.session.certificate.end.timestamp(),
                    "silence": now - missing[name] if name in missing else silence,
                    "bytes_sent": sent,
                    "bytes_received": received,
                }
            return found

    @property
    def _state(self) -> GlobalState | None:
        return self.node.state if isinstance(self.node, OpenGlobalNode) else None

    @property
    def is_alone(self) -> bool:
        """Whether no member is connected, or is waited for because its connection was lost."""
        return not self._members and not self._missing

    def _start(self, client: Client, link: Link) -> None:
        link.start(partial(self._on_message, client), partial(self._on_failure, client))

    def _on_message(self, client: Client, message: Message, progress: Iterable[int]) -> None:
        vector, is_taken = vector_of(message), False
        try:
            if isinstance(message, RegionUpdate | ModelRequest) and vector is None:
                client.wait_for_room(self._liveness)
            finding = self.node.inspect(message, progress)
            with self._lock:
                if client.is_gone or client.is_refused or self._is_replaced(client):
                    return
                sends = self._handle(client, message, finding)
                is_taken = True  # the vector of an update comes back in the answer, perhaps later
                if isinstance(message, InitialModel):
                    client.give_away()
                self._post(sends)
        finally:
            if vector is not None and not is_taken:
                client.release()

    def _handle(self, client: Client, message: Message, finding: Any) -> list[Send]:
        match message:
            case StatusRequest():
                if client.unsent >= _MOST_ANSWERS:
                    raise ProtocolError(f"it does not take what it asks for: {client.unsent} messages wait for it")
                client.begins_to_send(None)
                client.session.control.post(StatusReply(self._status()), sent=partial(self._sent, client, None))
                if client.index is None:
                    self._close(client, GOODBYE)
                return []
            case Enrol() | Join():
                if not self._identify(client, message):
                    return []
            case Failure():
                self._drop(client)
                if client.index is None:
                    return []
                reason = message.reason.strip().splitlines()[-1:] or ["it gave no reason"]
                self._note(client, f"The job of {client} failed: {reason[0][:_MOST_CHARACTERS]}", logging.WARNING)
                return self._lost(client.index)
            case Preempted():
                return []
        if client.index is None:
            raise ProtocolError(f"it sent {type(message).__name__} before it joined")
        before = self._state
        sends = self.node.handle(client.index, message, finding)
        if before is not self._state is GlobalState.STOPPING:
            self.note("The run stops: its steps are done, or its deciding member asks for it.")
        self.updates += isinstance(message, RegionUpdate)
        description = self.node.description
        if isinstance(message, Join) and client.models is None and description is not None:
            client.form = VectorForm.of_run(description)
            client.release()
            client.models = client.session.models(client.form, client.memory)
            self._start(client, client.models)
        if isinstance(self.node, Founding) and (node := self.node.node) is not None:
            self._use(node)
            self.note("The run begins.")
            sends = [*sends, *node.start()]
        self.changed.set()
        return sends

    def _use(self, node: Node) -> None:
        self.node = node
        if isinstance(node, OpenGlobalNode):
            node.server.map = self._compute.map

    def _identify(self, client: Client, message: Enrol | Join) -> bool:
        """Makes a client the connection of its member, unless another process with its name is present."""
        if client.models is None and not client.session.has_models:
            raise ProtocolError("it has no connection for models, which a member needs")
        if client.index is None:
            index = self.node.index_of(client.session.name)
            other = self._members.get(index)
            if other is not None and other.process != message.session:
                since = datetime.fromtimestamp(other.since, timezone.utc)
                self._refuse(
                    client,
                    f"{client.session.name} is present already, from {other.session.address}, since {since:%F %T} UTC."
                    " Two jobs must not use the same key file: stop one of them, or give it a key of its own."
                    f" If the other one has just died, it is lost after {self._liveness:g} s of silence, and this one"
                    " may join.",
                )
                return False
            client.missing_since = self._missing.get(index)
            if other is not None:
                self._drop(other)
                client.missing_since = time.monotonic()
            client.index, client.process = index, message.session
            self._members[index] = client
            self._note(client, f"{client} is connected.")
        elif client.process != message.session:
            raise ProtocolError("it changed its session on one connection")
        if type(message) in client.said:
            raise ProtocolError(f"it sent {type(message).__name__} twice on one connection")
        client.said.add(type(message))
        if isinstance(message, Join) or isinstance(self.node, Founding):
            # In a run, not before it joins: until then it takes the place of no other, and may never do so.
            self._missing.pop(client.index, None)
        return True

    def _is_replaced(self, client: Client) -> bool:
        """Whether a member has said goodbye on this connection, or has another one by now."""
        return client.index is not None and self._members.get(client.index) is not client

    def _on_failure(self, client: Client, error: Exception) -> None:
        with self._lock:
            if client.is_gone:
                return
            if self._is_replaced(client):
                self._drop(client)
                return
            if not isinstance(error, PeerLostError | OSError):
                self._expel(client, str(error) or repr(error), error)
                return
            self._drop(client)
            if client.index is None or client.is_refused:
                return
            self._note(client, f"The connection of {client} is lost: {error}", logging.WARNING)
            self._disconnect(client.index)

    def _on_goodbye(self, client: Client) -> None:
        self._close(client, GOODBYE)
        if client.index is None:
            return
        self._members.pop(client.index, None)
        if not client.is_done:
            self._note(
                client, f"{client} has said goodbye before the run's end, and without its last update.", logging.WARNING
            )
            if isinstance(self.node, Founding):  # its job ends
                self._post(self._lost(client.index))
            else:
                self._disconnect(client.index)

    def _disconnect(self, index: int) -> None:
        self._missing.setdefault(index, time.monotonic())
        self._post(self.node.disconnected(index))

    def _expel(self, client: Client, reason: str, error: Exception | None = None) -> None:
        unexpected = None if error is None or isinstance(error, ProtocolError | ValueError) else error
        reason = reason[:_MOST_CHARACTERS]
        if client.index is None:
            self._note(client, f"{client} is refused: {reason}", logging.WARNING)
        else:
            self._note(client, f"{client} loses its membership: {reason}", logging.ERROR)
        if unexpected is not None:
            log.error("The error was not expected.", exc_info=unexpected)
        client.is_refused = True
        if client.index is not None:
            self._members.pop(client.index, None)
            self._post(self.node.expel(client.index, reason))
        client.session.control.post(Refusal(reason))
        self._close(client, GOODBYE)
        self.changed.set()

    def _turn_away(self, client: Client) -> None:
        """Closes the connection of a job that the node refuses.

        Its member is without connection for as long as before, so that no job can let the others wait for it.
        """
        assert client.index is not None
        client.is_refused = True
        if self._members.get(client.index) is client:
            del self._members[client.index]
            if client.missing_since is not None:
                self._missing[client.index] = client.missing_since
            self._post(self.node.disconnected(client.index))
        self._close(client, GOODBYE)

    def _refuse(self, client: Client, reason: str) -> None:
        self._note(client, f"{client} is refused: {reason}", logging.WARNING)
        client.is_refused = True
        client.session.control.post(Refusal(reason, for_good=False))
        self._close(client, GOODBYE)

    def _lose(self, index: int, name: str) -> None:
        self._journal.note(f"{name} is lost: nothing came from it for {self._liveness:g} s.", logging.WARNING, name)
        self._post(self._lost(index))

    def _lost(self, index: int) -> list[Send]:
        self._missing.pop(index, None)
        if (client := self._members.get(index)) is not None:  # another job with its name has enrolled
            client.missing_since = None
        self.changed.set()
        return self.node.lose(index)

    def _drop(self, client: Client) -> None:
        """Cuts a client's connection and forgets it."""
        if client.is_gone:
            return
        client.is_gone = True
        client.held.clear()
        before = self._traffic.setdefault(client.session.name, [0, 0])
        self._traffic[client.session.name] = [a + b for a, b in zip(before, client.traffic(), strict=True)]
        self._clients.remove(client)
        if client.index is not None and self._members.get(client.index) is client:
            del self._members[client.index]
        client.session.abort()
        client.release()  # so that no thread waits for memory

    def _close(self, client: Client, timeout: float) -> None:
        """Says goodbye to a client after what it has still to be sent, and drops it when it has said goodbye, too."""
        if client.is_closing:
            return
        client.is_closing = True

        def close() -> None:
            try:
                client.session.close(timeout)
            finally:
                with self._lock:
                    self._drop(client)

        threading.Thread(target=close, name=f"halos goodbye {client.session.name}", daemon=True).start()

    def _post(self, sends: Sequence[Send]) -> None:
        for send in sends:
            client = self._members.get(send.to)
            if client is None:
                continue  # its connection is lost, and it gets all it needs when it is back
            if self._gate.hold(client, send):
                self.changed.set()
            else:
                self._send(client, send)

    def _send_held(self) -> None:
        for client, send in self._gate.released(list(self._members.values())):
            self._send(client, send)

    def _send(self, client: Client, send: Send) -> None:
        message = send.message
        assert not isinstance(message, Shard)
        link = client.models if uses_models_link(message) else client.session.control
        assert link is not None
        if isinstance(message, Welcome):
            client.missing_since = None
        match message:
            case Refusal():
                self._note(client, f"{client} is refused: {message.reason}", logging.WARNING)
            case Decide():
                self._note(client, f"{client.session.name} decides from now on.")
            case Welcome(needs_model=True):
                self._note(client, f"{client.session.name} is asked for the initial model.")
            case GlobalModel(final=True) if self._state is not GlobalState.FINISHED:
                self._note(client, f"{client.session.name} leaves the run.")
        client.begins_to_send(vector_of(message))
        link.post(message, send.fill, partial(self._sent, client, vector_of(message)))
        if client.unsent > _MOST_UNSENT:
            self._expel(client, f"it does not take what it is sent: {client.unsent} messages wait for it")
        elif isinstance(message, Refusal):
            self._turn_away(client)
        elif isinstance(message, GlobalModel) and message.final:
            client.is_done = True  # and says goodbye when it has all it wants

    def _sent(self, client: Client, vector: Tensor | None) -> None:
        with self._lock:
            client.has_sent(vector)


def _disconnected(node: OpenGlobalNode) -> list[int]:
    members = node.status()["members"].items()
    return [node.index_of(name) for name, member in members if member["state"] == MemberState.DISCONNECTED.value]
