"""The records of the events of a simulation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Event:
    """An event of a server.

    Attributes:
        time: Virtual milliseconds.
        kind: ``"push"``: a worker's push arrived at its local server, which applied or rejected it. ``"update"``: a
            local server's update arrived at the global server; the last one may be empty. ``"merge"``: a local server
            merged the global model. ``"round"``: all workers finished a synchronous round. ``"end"``: the final model
            is complete.
        server: Index of the local server of a push or merge, or of the sender of an update; -1 for other events.
        worker: Global rank of the worker of a push; -1 for other events.
        version: Number of updates that the server has applied. It grows by one if this event's push or update was
            applied.
        steps: Local steps that all workers together have finished.
        staleness: For a push or an update: versions between the model that it started from and its arrival.
        parameters: The server's model after the event, if the cluster records parameters.
    """

    time: float
    kind: str
    server: int
    worker: int
    version: int
    steps: int
    staleness: int = 0
    parameters: Tensor | None = None
