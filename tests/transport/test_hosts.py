"""A host serves its peers while a snapshot of its server is written."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from lightning_halos.core import parameter_server
from lightning_halos.core.delayed_nesterov import DelayedNesterov
from lightning_halos.core.global_node import GlobalNode
from lightning_halos.core.global_server import GlobalServer
from lightning_halos.core.messages import Marker, RegionUpdate
from lightning_halos.core.schedule import StepBudget
from lightning_halos.core.snapshot import ServerSnapshot, Shard
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.hosts import Host


def test_the_lock_is_held_for_one_portion_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And an update that arrives in between is applied to the server, not to the snapshot."""
    monkeypatch.setattr(parameter_server, "PART", 4)
    optimizer = partial(DelayedNesterov, lr=0.2, momentum=0.9, delay=2)
    server = GlobalServer(torch.zeros(40), optimizer, [torch.Size([4])] * 10)
    server.receive(update(1))
    host = Host(GlobalNode(server, 1, StepBudget(1)), Alarm("here"), print, print)
    expected = copy.deepcopy(server._state())
    snapshot = server.snapshot()

    copied, at_release = [], []
    take = ServerSnapshot.take
    monkeypatch.setattr(
        ServerSnapshot,
        "take",
        lambda self, index: (copied.append(index) if index in self._pending else None, take(self, index)),
    )

    class Lock:
        """Counts what was copied while it was held. After the third time, an update has its turn."""

        def __enter__(self) -> None:
            copied.clear()

        def __exit__(self, *_: object) -> None:
            at_release.append(len(copied))
            if len(at_release) == 3:
                server.receive(update(2))

    monkeypatch.setattr(host, "_lock", Lock())
    shard = Shard(Marker("save", "folder"), None, {"server": snapshot.state}, snapshot)
    host._complete(shard)
    assert at_release[:3] == [1, 1, 1]
    assert max(at_release) == 1
    assert torch.equal(shard.state["server"]["model"], expected["model"])
    assert not torch.equal(server.model, expected["model"])


def update(number: int) -> RegionUpdate:
    return RegionUpdate(0, 0, 8, vector=torch.ones(40), number=number)
