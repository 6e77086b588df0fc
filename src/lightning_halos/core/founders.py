"""Which members have been asked for the initial model, and whether it arrives in time.

The founding asks them, and decides what follows if nothing arrives. The caller tells the time.
"""

from __future__ import annotations

from lightning_halos.core.members import Member

_PARTS = 10


class Founders:
    """The members that have been asked for the initial model. The last one is the founder.

    Args:
        seconds: Time in which the initial model must arrive: a tenth of it in each tenth of this time.

    Attributes:
        seconds: The time in which a tenth of the model must arrive.
        is_overdue: Whether nothing arrives from any of them.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds / _PARTS
        self.is_overdue = False
        self._asked: list[Member] = []
        self._last: Member | None = None  # the one that was asked last, even if it is gone
        self._now: float | None = None
        self._waited = 0.0  # seconds since a tenth has arrived, or somebody else was asked first
        self._arrived = self._noted = 0  # elements until now, and when that tenth was complete

    @property
    def founder(self) -> Member | None:
        return self._asked[-1] if self._asked else None

    def add(self, member: Member) -> None:
        """Records that a member has been asked."""
        if not self._asked and member is not self._last:
            self._waited, self.is_overdue = 0.0, False
        self._last, member.owes_model = member, True
        self._asked.append(member)

    def forget(self, member: Member) -> None:
        """Forgets a member. If it comes back and is asked again, the time goes on."""
        member.owes_model = False
        self._asked = [other for other in self._asked if other is not member]

    def count(self, elements: int) -> None:
        """Records that a part of an initial model has arrived."""
        self._arrived += elements

    def wait(self, now: float, elements: int | None) -> bool:
        """Returns whether the founder's time is over. Then it begins anew.

        Args:
            now: The time in seconds.
            elements: Number of elements of the model; ``None`` if it has arrived.
        """
        passed, self._now = 0.0 if self._now is None else now - self._now, now
        if elements is None:
            self._waited, self.is_overdue = 0.0, False
        if elements is None or not self._asked:
            return False
        has_arrived = (self._arrived - self._noted) * _PARTS >= max(1, elements)
        self._waited += passed
        if not has_arrived and self._waited < self.seconds:
            return False
        self._waited, self._noted, self.is_overdue = 0.0, self._arrived, not has_arrived
        return self.is_overdue
