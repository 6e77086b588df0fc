"""Which messages to members wait for a snapshot.

A member that has got its last message is gone and repeats nothing, so what it has given must be on disk before. A
member that has been welcomed must not be forgotten, nor must the run, nor what a region was told when it enrolled. When
snapshots are written is decided in ``snapshots``; what is sent, by the run's node.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lightning_halos.core.messages import Enrolled, GlobalModel, Message, Welcome
from lightning_halos.core.protocol import Send
from lightning_halos.core.snapshot import Shard
from lightning_halos.serving.client import Client


class SnapshotGate:
    """Holds messages back until a snapshot has the state in which they were decided. Its user holds a lock.

    Messages to one member keep their order.

    Args:
        is_on_disk: Whether there is a snapshot of the run already.

    Attributes:
        must_save: Whether a message waits for a snapshot that has not begun.
    """

    def __init__(self, is_on_disk: bool) -> None:
        self.must_save = False
        self._is_on_disk = is_on_disk
        self._begun = self._written = 0  # numbers of the last snapshots of this process

    def begin(self) -> int:
        """Records that a snapshot begins. Returns its number."""
        self._begun += 1
        self.must_save = False
        return self._begun

    def written(self, number: int, has_run: bool = True) -> None:
        """Records that a snapshot is on disk: of the run, or of what was decided before it has begun."""
        self._written, self._is_on_disk = number, self._is_on_disk or has_run

    def failed(self, number: int) -> None:
        """Lets messages pass that wait for a snapshot which could not be written, as nobody would gain by waiting.

        Before the first snapshot members wait, because a run that cannot be written does not begin.
        """
        if self._is_on_disk:
            self._written = number

    def hold(self, client: Client, send: Send) -> bool:
        """Holds a message back if it has to wait. Returns whether it does."""
        must_wait = _must_wait(send.message)
        if must_wait or client.held:
            client.held.append((self._begun + 1 if must_wait else 0, send))
        self.must_save = self.must_save or must_wait
        return bool(client.held)

    def released(self, clients: Iterable[Client]) -> Iterator[tuple[Client, Send]]:
        """Yields the messages that need not wait any more."""
        for client in clients:
            while client.held and client.held[0][0] <= self._written:
                yield client, client.held.popleft()[1]


def _must_wait(message: Message | Shard) -> bool:
    if isinstance(message, Welcome):
        return message.is_new and not message.needs_model
    return isinstance(message, Enrolled) or (isinstance(message, GlobalModel) and message.final)
