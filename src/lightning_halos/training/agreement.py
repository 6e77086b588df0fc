"""What the processes of one worker decide together, once per batch, as Lightning does with a SIGTERM.

A signal, a stop or a decision of the server reaches them at different moments, but they train in step: one that left a
batch out would make the others wait for ever. A worker of one process asks nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from lightning_halos.training.site import Site
from lightning_halos.transport.errors import PeerLostError, is_lost_connection

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
        group = self._site.inner_group
        if not self.is_needed or group is None:
            return [list(flags)]
        rows = torch.empty(group.size(), len(flags), dtype=torch.uint8)
        try:  # not with the site's collectives, whose errors say more, but which take longer than a small step
            dist.all_gather(list(rows), torch.tensor(flags, dtype=torch.uint8), group)
        except RuntimeError as error:
            if not is_lost_connection(error):
                raise
            raise PeerLostError(
                f"{self._site.here} waited for the other processes of its worker at the end of a batch, but one of them"
                f" has ended, or is stopped. {error}"
            ) from None
        return [[bool(flag) for flag in row] for row in rows.tolist()]

    def of_lane_0(self, value: T) -> T:
        """Returns the value of the worker's lane 0, of which others hear later. All must call it at the same moment."""
        return self._site.worker_collectives.broadcast_object(value) if self.is_needed else value

    def is_same(self, text: str) -> bool:
        """Returns whether all processes of this worker have the same text. All of them must call it together."""
        return not self.is_needed or len(set(self._site.worker_collectives.gather_texts(text))) == 1
