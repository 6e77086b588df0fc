"""What happened under the virtual clock.

Rules of this room: plain records.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Event:
    """Something that happened to a server.

    Attributes:
        time: Virtual milliseconds.
        kind: ``"push"``: a worker's round arrived at its local server, which applied it or, with NaN for example,
            dropped it; ``"update"``: a local server's update arrived at the global server, at the end also an empty
            one; ``"merge"``: a local server merged the global model; ``"round"``: all workers finished a synchronous
            round; ``"end"``: the final model is there. ``version`` shows what was applied: it is one more then.
        server: Index of the local server, also of the sender of an update; -1 where there is only the global server.
        worker: Global rank of the worker of a push; -1 otherwise.
        version: Updates that the server has applied.
        steps: Local steps that all workers have finished.
        staleness: Of a push or an update: server versions between the model that it started from and its arrival.
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
