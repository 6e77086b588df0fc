"""The peers hear of a failure before the main thread may end this process."""

from __future__ import annotations

import pytest

from lightning_halos.core.messages import Failure, Message
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.link import Link


class Told(Link):
    """A link at whose other end nobody is. The main thread looks whether it must end while something is posted."""

    def __init__(self, alarm: Alarm) -> None:
        super().__init__("rank 1")
        self.alarm = alarm
        self.messages: list[Message] = []

    def post(self, message: Message, fill: object = None, sent: object = None) -> None:
        self.alarm.check()
        self.messages.append(message)

    def _receive_all(self, on_message: object) -> None: ...


def test_a_failure_of_another_thread_is_raised_when_the_peers_are_told() -> None:
    alarm = Alarm("rank 0")
    links = [Told(alarm), Told(alarm)]
    alarm.add(*links)
    alarm.fail(KeyError("of a server"))
    try:
        assert alarm.has_failed
        assert all(isinstance(message, Failure) for link in links for message in link.messages)
        assert [len(link.messages) for link in links] == [1, 1]
        with pytest.raises(KeyError, match="of a server"):
            alarm.check()
    finally:
        alarm.disarm()  # else it would end this process later
