"""Gives servers what they receive, as the nodes do."""

from __future__ import annotations

from torch import Tensor

from lightning_halos.core.local_server import LocalServer
from lightning_halos.core.messages import Push, RegionUpdate


def receive(server: LocalServer, push: Push) -> tuple[Tensor, RegionUpdate | None]:
    """Gives a push to a local server. Returns the model for the next round, and the update that is due."""
    assert push.vector is not None
    is_accepted = server.judge(push, server.find(push.vector), push.version or 0)
    answer = server.memory_for(push.vector)
    server.apply(push.vector, is_accepted, answer)
    if not server.is_due:
        return answer, None
    update = server.begin_exchange()
    server.fill(update)
    return answer, update
