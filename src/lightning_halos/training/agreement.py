"""What the processes of one worker decide together, once per batch, as Lightning does with a SIGTERM.

A signal, a stop or a decision of the server reaches them at different moments, but they train in step: one that left a
batch out would make the others wait for ever. A worker of one process asks nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from lightning_halos.training.site import Site

T = TypeVar("T")


class Agreement:
    """Asks the processes of this worker.

    Args:
        site: This process's place and connections.

    Attributes:
        is_needed: Whether the worker has several processes.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self.is_needed = len(site.worker_processes) > 1

    def ask(self, flags: Sequence[bool]) -> list[list[bool]]:
        """Returns the flags of all processes of this worker, by lane. All of them must call it at the same moment.

        Raises:
            PeerLostError: If one of them has ended.
        """
        if not self.is_needed:
            return [list(flags)]
        texts = self._site.worker_collectives.gather_texts("".join(str(int(flag)) for flag in flags))
        return [[digit == "1" for digit in text] for text in texts]

    def of_lane_0(self, value: T) -> T:
        """Returns the value of the worker's lane 0, of which others hear later. All must call it at the same moment."""
        return self._site.worker_collectives.broadcast_object(value) if self.is_needed else value

    def is_same(self, text: str) -> bool:
        """Returns whether all processes of this worker have the same text. All of them must call it together."""
        return not self.is_needed or len(set(self._site.worker_collectives.gather_texts(text))) == 1
