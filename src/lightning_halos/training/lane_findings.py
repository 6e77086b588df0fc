"""Lets the lanes of a worker agree on what they find in an update where no host does so, when all of them are in step.

In a real run with servers, their hosts do so; see ``transport/lanes.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from lightning_halos.core.finding import Finding, combine, plain_finding
from lightning_halos.core.parameter_server import ParameterServer
from lightning_halos.training.site import Site
from lightning_halos.transport.collectives import Collectives


def slice_of(site: Site, connect: Callable[[], Collectives] | None = None) -> Callable[[ParameterServer], None]:
    """Returns a function that makes a server that of this process's lane; it does nothing if there is one lane.

    What the server finds by itself is then found by all lanes of this worker together, so all must do so in step.

    Args:
        site: This process's place and connections.
        connect: Returns collectives over the lanes of this worker. Default: those for the main thread.
    """
    if site.lanes == 1:
        return lambda server: None
    collectives = site.collectives_among(site.worker_processes[: site.lanes]) if connect is None else connect()

    def agree(finding: Finding) -> Finding:
        return combine([Finding(*json.loads(text)) for text in collectives.gather_texts(json.dumps(finding))])

    def prepare(server: ParameterServer) -> None:
        server.become_slice(warns=site.lane == 0)
        server.agree = agree

    return prepare


def add_findings(updates: Iterable[dict[str, Any]], server: ParameterServer) -> None:
    """Adds the findings to updates of a checkpoint that was saved with one lane."""
    for update in updates:
        finding = update.get("finding") or plain_finding(server.find(update["vector"]))
        if finding is not None:
            update["finding"] = finding
