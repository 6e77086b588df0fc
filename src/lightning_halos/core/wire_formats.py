"""Which format the vectors on a link have, as users order it, and which messages have it. It converts nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from lightning_halos.core.messages import GlobalModel, Message, Pull, Push, RegionUpdate
from lightning_halos.core.protocol import GLOBAL
from lightning_halos.core.quantization import FORMATS, Format, check_format
from lightning_halos.core.topology import ServerGroup


@dataclass(frozen=True)
class WireFormats:
    """The formats of a run's links.

    Attributes:
        within: The format on links inside a region.
        between: The format on links between regions.
    """

    within: Format = "float32"
    between: Format = "float32"

    @classmethod
    def of(cls, wire: Any) -> WireFormats:
        """Returns the formats that a user orders.

        Args:
            wire: The name of a format for all links, or a mapping with the names for the links ``"within"`` and
                ``"between"`` regions. A link that is missing has ``"float32"``.

        Raises:
            TypeError: If it is neither.
            ValueError: If there is no such link or format.
        """
        if isinstance(wire, WireFormats):
            return wire
        if isinstance(wire, str):
            check_format("wire", wire)
            return cls(wire, wire)  # type: ignore[arg-type]  # it is checked
        if not isinstance(wire, Mapping):
            _refuse(TypeError, wire)
        if not wire.keys() <= {"within", "between"}:
            _refuse(ValueError, wire)
        for link, form in wire.items():
            check_format(f"wire[{link!r}]", form)
        return cls(**wire)

    @property
    def is_plain(self) -> bool:
        """Whether vectors travel on all links as they are."""
        return self.within == self.between == "float32"

    def of_server(self, group: ServerGroup, region_of: Callable[[int], int], home: int) -> dict[int, Format]:
        """Returns the formats on the links of a local server, by the addresses of its peers.

        Args:
            group: The server, and its workers.
            region_of: Returns the region of a worker.
            home: The region of the global server.
        """
        formats = {rank: self.on(region_of(rank), group.region) for rank in group.ranks}
        return {**formats, GLOBAL: self.on(group.region, home)}

    def on(self, one: int, other: int) -> Format:
        """Returns the format on a link, given the regions of its ends."""
        return self.within if one == other else self.between


PLAIN = WireFormats()
"""Vectors travel as they are."""


def is_rounded(message: Message) -> bool:
    """Returns whether the parameters in a message's vector have the values of the link's format.

    All else travels as it is: the averaged buffers, because a variance must not become 0; complete models; and
    everything that is the last of its kind, so that nothing remains in a residual.
    """
    match message:
        case Push() | RegionUpdate():
            return not message.final
        case Pull() | GlobalModel():
            return message.is_difference
    return False


def _refuse(kind: type[Exception], wire: Any) -> NoReturn:
    raise kind(
        f"wire={wire!r} must be one of {', '.join(map(repr, FORMATS))}, or a dict with formats for the links 'within'"
        " and 'between' regions, such as {'within': 'float32', 'between': 'int4'}."
    )
